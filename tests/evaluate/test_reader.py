"""Whose tokenizer and whose end tokens a model is asked with."""

import json
import logging

import pytest
from command import launch
from families import edit_json, llama_config, random_weights, write_model

from dppa_jax.checkpoint.tokenizer import load_tokenizer
from dppa_jax.config.evaluation import TaskOptions
from dppa_jax.evaluate.evaluation import Evaluation
from dppa_jax.evaluate.reader import Readers
from dppa_jax.evaluate.tasks import TASKS

CONFIG = llama_config()


@pytest.fixture
def models(tmp_path):
    """Two models with equal files, a third whose tokenizer has other ids."""
    for name in ("base", "math", "law"):
        write_model(tmp_path / name, CONFIG, random_weights(CONFIG))
    file = tmp_path / "law" / "tokenizer.json"
    content = json.loads(file.read_text())
    ids = content["model"]["vocab"]
    ids["word3"], ids["word4"] = ids["word4"], ids["word3"]
    file.write_text(json.dumps(content))
    return tmp_path


class Parrot:
    """An evaluator that answers nothing, and remembers its prompts."""

    decoding, batch_size = {"evaluator": "parrot"}, 99

    def __init__(self):
        self.asked = []

    def use(self, weights):
        pass

    def generate(self, prompts, max_new_tokens):
        self.asked += prompts
        return [[] for _ in prompts]

    def close(self):
        pass


@pytest.fixture
def asked(models):
    """asked(name, **options) is the only prompt of an evaluation of a model, and how many questions were asked."""

    def asked(name: str, question: str = "word3", **settings) -> list:
        (models / "gsm8k.jsonl").write_text(json.dumps({"id": "1", "question": question, "answer": "7"}))
        evaluation = Evaluation(
            Parrot(),
            load_tokenizer(models / "base"),
            TaskOptions(data_dir=str(models)),
            models / "responses",
            **settings,
        )
        reader = evaluation.readers.of(name, CONFIG, models / name)
        evaluation.scores(name, "fingerprint", lambda: models / name, [TASKS["gsm8k"]], reader=reader)
        return evaluation.evaluator.asked

    return asked


def test_each_model_is_asked_with_its_own_tokenizer_unless_one_is_shared(asked, models):
    (base,), (law,) = asked("base"), asked("law")
    assert [(a, b) for a, b in zip(base, law, strict=True) if a != b] == [(6, 7)]
    assert asked("law", shared=True) == []  # the questions of base, to which the responses are known


def test_another_vocabulary_makes_other_responses_to_the_same_tokens(asked):
    base, again, law = (asked(name, "word9") for name in ("base", "base", "law"))
    assert (base, again) == (law, [])


def test_what_differs_from_the_first_model_is_told_once(models, caplog):
    readers = Readers(load_tokenizer(models / "base"))
    base, math, law = (readers.of(name, CONFIG, models / name) for name in ("base", "math", "law"))
    assert math.tokenizer is base.tokenizer
    assert readers.of("law", CONFIG, models / "law") is law
    (said,) = (record.getMessage() for record in caplog.records)
    assert said == "law is asked with its own tokenizer: the id of 'word3' is 7, and 6 in that of base"
    readers.of("math again", CONFIG | {"eos_token_id": 9}, models / "math")
    edit_json(models / "math" / "generation_config.json", eos_token_id=9)
    readers.of("tuned", CONFIG, models / "math")
    assert caplog.records[-1].getMessage() == "tuned is asked with its own end of answers: 9, and 2 in base"
    assert len(caplog.records) == 2


def test_a_model_without_a_tokenizer_is_asked_with_that_of_the_first(models, caplog):
    caplog.set_level(logging.WARNING)
    for file in (models / "math").glob("tokenizer*"):
        file.unlink()
    default = load_tokenizer(models / "base")
    assert Readers(default).of("math", CONFIG, models / "math").tokenizer is default
    assert f"math: {models}/math has no tokenizer; it is asked with that of {models}/base" in caplog.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("remove", "has no tokenizer, none of tokenizer.json, tokenizer.model, vocab.json: copy the tokenizer files"),
        ("model", "in tokenizer.model alone, which needs another library: `pip install sentencepiece protobuf`"),
        ("garbage", "its tokenizer cannot be read"),
        ("deep", "its tokenizer cannot be read"),
        ("settings", "its tokenizer cannot be read"),
        ("code", "its tokenizer cannot be read"),
        ("link", "outside"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_one_line_with_the_directory(models, monkeypatch, change, said):
    directory = models / "base"
    file = directory / "tokenizer.json"
    content = file.read_text()
    file.unlink()
    monkeypatch.setattr("dppa_jax.checkpoint.tokenizer.find_spec", lambda name: None)
    if change == "model":
        (directory / "tokenizer.model").write_bytes(b"\x00\x01")
    elif change == "link":
        (models / "elsewhere").write_text(content)
        file.symlink_to(models / "elsewhere")
    elif change != "remove":
        file.write_text({"garbage": "{", "deep": "[" * 100_000}.get(change, content))
    if change == "settings":
        (directory / "tokenizer_config.json").write_text("[" * 100_000)
    if change == "code":
        settings = {"auto_map": {"AutoTokenizer": [None, "evil.Tokenizer"]}, "tokenizer_class": "Tokenizer"}
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
        (directory / "evil.py").write_text(f"open({str(models / 'ran')!r}, 'w')")
    with pytest.raises(SystemExit) as error:
        launch("--job=evaluate", f"--base={directory}", "--evaluate=addition", f"--workdir={models}/runs")
    assert said in str(error.value)
    assert str(directory) in str(error.value)
    assert "\n" not in str(error.value).strip()
    assert not (models / "ran").exists()
