"""Tasks of encoders: items with labels, GLUE's metrics, and merges of a classifier that are evaluated end to end."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from command import launch
from encoders import WORDS, write_base, write_texts
from families import llama_config, random_weights, read_json, write_model

from dppa_jax.checkpoint import SafetensorsDirectory
from dppa_jax.checkpoint.tokenizer import encode_whole, load_tokenizer
from dppa_jax.config.evaluation import TaskOptions
from dppa_jax.evaluate.classes import ACCURACY_F1, CORRELATIONS, MATTHEWS
from dppa_jax.evaluate.scores import Score
from dppa_jax.evaluate.tasks import TASKS, task_of
from dppa_jax.finetune.labelled import read_labelled
from dppa_jax.jobs.evaluated import check_answers

FLAGS = ["--train_batch_size=16", "--learning_rate=3e-3", "--train_dtype=float32", "--train_length=24", "--noremat"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A base without a head, an expert of its, and texts of three classes."""
    root = tmp_path_factory.mktemp("toy")
    write_base(root / "base")
    for seed, (name, count) in enumerate({"train": 240, "validation": 60, "test": 80}.items()):
        write_texts(root / f"toy_{name}.jsonl", count, seed)
    (root / "text.txt").write_text("\n".join(one.texts[0] for one in read_labelled(root / "toy_train.jsonl")) + "\n")
    launch("--job=finetune", f"--base={root / 'base'}", f"--output={root / 'toy'}", f"--workdir={root / 'work'}",
           f"--train_data={root / 'toy_train.jsonl'}", "--train_steps=60", "--mesh=data=1", *FLAGS)  # fmt: skip
    return root


def accuracy(model: Path, file: Path) -> float:
    """By transformers."""
    network = transformers.AutoModelForSequenceClassification.from_pretrained(model)
    tokenizer, right = transformers.AutoTokenizer.from_pretrained(model), []
    for texts, label, _ in read_labelled(file):
        with torch.no_grad():
            best = int(network(**tokenizer(*texts, return_tensors="pt")).logits.argmax())
        right.append(network.config.id2label[best] == label)
    return float(np.mean(right))


def merge(root: Path, output: str, *flags: str) -> Path:
    work = [f"--output={root / output}", f"--workdir={root / f'work-{output}'}", "--mesh=layer=1,row=1"]
    launch(f"--base={root / 'base'}", f"--expert=toy={root / 'toy'}", *work, f"--data_dir={root}",
           "--evaluate=classify:toy", *flags)  # fmt: skip
    return root / output


# ---- end to end


def test_a_merge_of_a_classifier_is_evaluated_as_transformers_does(root):
    """Half of everything but the head is dropped; the merge keeps the expert's head."""
    output = merge(root, "half", "--method=dare", "--rate=0.5", "--prune=backbone")
    recipe = read_json(output / "recipe.json")
    assert recipe["config"]["prune"] == "backbone"
    report = (root / "work-half" / "tables.md").read_text()
    expert, found = (f"{100 * accuracy(at, root / 'toy_test.jsonl'):.1f}" for at in (root / "toy", output))
    assert float(expert) > 90
    assert expert in report
    assert found in report


@pytest.mark.slow
def test_without_text_and_labels_and_with_them_q_is_found_on_an_encoder(root):
    """At a high rate DARE fails; q by labels and by hidden states is above 1 − rate."""
    for way in ("search", "auto", "bound"):
        flags = [
            "--method=darex_q",
            "--rate=0.9",
            "--prune=backbone",
            f"--q={way}",
            f"--calibration={root / 'text.txt'}",
        ]
        merge(root, f"q-{way}", *flags)
        q = read_json(root / f"work-q-{way}" / "q.json")["q"]["toy"]
        numbers = list(q.values()) if isinstance(q, dict) else [q]
        assert min(numbers) > 0.1 - 1e-9
        assert max(numbers) > 0.1 + 1e-6


@pytest.mark.slow
def test_wanda_prunes_an_encoder(root):
    output = merge(root, "wanda", "--method=wanda", "--rate=0.8", f"--calibration={root / 'text.txt'}")
    assert accuracy(output, root / "toy_test.jsonl") > 0.34


@pytest.mark.slow
def test_a_report_compares_methods_on_an_encoder(root):
    launch("--job=report", f"--base={root / 'base'}", f"--expert=toy={root / 'toy'}", f"--workdir={root / 'report'}",
           f"--data_dir={root}", "--evaluate=classify:toy", "--methods=dare,magnitude", "--rates=0.5,0.99",
           "--prune=backbone", "--seeds=0,1")  # fmt: skip
    assert (root / "report" / "tables.json").read_text().count("classify:toy") > 4


def test_models_and_tasks_that_do_not_fit_are_refused(root, tmp_path):
    evaluate = ["--job=evaluate", f"--base={root / 'base'}", f"--workdir={tmp_path}", f"--data_dir={root}"]
    with pytest.raises(SystemExit, match="has no classification head"):
        launch(*evaluate, "--evaluate=classify:toy")
    with pytest.raises(SystemExit, match=r"--evaluate=addition: .* classifies, and does not generate"):
        launch(*evaluate, "--evaluate=addition")
    with pytest.raises(SystemExit, match="--evaluate=cola: --evaluator=vllm asks decoders"):
        launch(*evaluate, "--evaluate=cola", "--evaluator=vllm")
    write_model(tmp_path / "llama", llama_config(), random_weights(llama_config()))
    decoder = SafetensorsDirectory(tmp_path / "llama")
    with pytest.raises(ValueError, match=r"--evaluate=cola: .* generates, and does not classify"):
        check_answers(decoder, [TASKS["cola"]])


# ---- items and metrics


def test_items_of_pairs_and_numbers(tmp_path):
    lines = [{"idx": i, "sentence1": f"a {i}", "sentence2": "b", "label": i / 2} for i in range(3)]
    (tmp_path / "stsb.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    items = TASKS["stsb"].items(TaskOptions(data_dir=str(tmp_path)))
    assert [item.texts for item in items] == [("a 0", "b"), ("a 1", "b"), ("a 2", "b")]
    assert [item.answers for item in items] == [("0.0",), ("0.5",), ("1.0",)]
    score = TASKS["stsb"].score([True] * 3, ["0.1", "0.4", "1.2"], items)
    assert score.accuracy > 0.9
    assert score.interval[0] <= score.accuracy <= score.interval[1] + 1e-9


def test_a_pair_has_types_and_what_the_tokenizer_puts_around_it(root):
    tokenizer = load_tokenizer(root / "base")
    word = WORDS["bad"][0]
    [(tokens, types)] = encode_whole(tokenizer, [(word, f"{word} {word}")], 32)
    assert tokenizer.convert_ids_to_tokens(tokens) == ["[CLS]", word, "[SEP]", word, word, "[SEP]"]
    assert types == [0, 0, 0, 1, 1, 1]
    assert len(encode_whole(tokenizer, [(word, f"{word} {word}")], 5)[0][0]) == 5


def test_metrics_are_glues():
    right, given = ["1", "1", "0", "0"], ["1", "0", "0", "0"]
    value, (low, high) = MATTHEWS(right, given)
    assert value == pytest.approx(1 / np.sqrt(3))
    assert low <= value <= high
    assert ACCURACY_F1(right, given)[0] == pytest.approx((3 / 4 + 2 / 3) / 2)
    assert MATTHEWS(right, ["0"] * 4)[0] == 0
    values = ["0.5", "2", "3"]
    assert CORRELATIONS(values, ["1", "2", "9"])[0] == pytest.approx(
        (np.corrcoef([0.5, 2, 3], [1, 2, 9])[0, 1] + 1) / 2
    )
    assert CORRELATIONS(values, ["1", "1", "1"])[0] == 0
    assert Score(3, 4, value, (low, high)).interval == (low, high)
    assert Score(3, 4).accuracy == 0.75


def test_a_class_is_right_by_its_number_or_by_its_name():
    task = task_of("classify:toy")
    for answer, right in (("2", True), ("1", False), ("good", True), ("bad", False)):
        item = TASKS["cola"].kind  # kinds are shared by tasks
        assert item.judge(TaskOptions(), "2 good", type("Item", (), {"answers": (answer,)})) is right
    assert task.domain == "toy"
    assert task_of("classify:toy") is task


def test_glue_is_read_from_its_validation_split_on_the_hub(monkeypatch):
    import datasets

    asked = []

    def load(path, name, **options):
        asked.append((path, name, options["split"]))
        return [{"sentence1": "a", "sentence2": "b", "label": 1, "idx": 7}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    (item,) = TASKS["mrpc"].items(TaskOptions())
    assert asked == [("nyu-mll/glue", "mrpc", "validation")]
    assert (item.id, item.texts, item.answers) == ("7", ("a", "b"), ("1",))
    with pytest.raises(ValueError, match="'classify:toy' is not on the hub: give --data_dir"):
        task_of("classify:toy").items(TaskOptions())
