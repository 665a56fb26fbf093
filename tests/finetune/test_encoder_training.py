"""--job=finetune of BERT and RoBERTa: texts with labels in, and a classifier of transformers out."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from command import launch
from encoders import WORDS, write_base, write_texts
from families import read_json

from dppa_jax.finetune.labelled import class_names, read_labelled

OPTIONS = ["--train_batch_size=16", "--learning_rate=3e-3", "--train_dtype=float32", "--train_length=24", "--noremat"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("encoders")
    for family in ("bert", "roberta"):
        write_base(root / family, family)
    for pairs in (False, True):
        for seed, (name, count) in enumerate({"train": 240, "eval": 40}.items()):
            write_texts(root / f"{'pairs' if pairs else 'texts'}_{name}.jsonl", count, seed, pairs)
    return root


def trained(root: Path, base: str, texts: str, output: str, *more: str) -> Path:
    data = [f"--train_data={root}/{texts}_train.jsonl", f"--eval_data={root}/{texts}_eval.jsonl"]
    work = [f"--base={root / base}", f"--output={root / output}", f"--workdir={root / 'work'}"]
    launch("--job=finetune", *work, *data, *OPTIONS, "--mesh=data=1", *more)
    return root / output


def by_transformers(expert: Path, file: Path) -> tuple[float, float]:
    """The mean loss, and the share of labels that are predicted, or how close numbers are."""
    options = {"output_loading_info": True}
    model, said = transformers.AutoModelForSequenceClassification.from_pretrained(expert, **options)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    tokenizer, losses, right = transformers.AutoTokenizer.from_pretrained(expert), [], []
    for texts, label, _ in read_labelled(file):
        target = model.config.label2id[label] if isinstance(label, str) else label
        with torch.no_grad():
            found = model(**tokenizer(*texts, return_tensors="pt"), labels=torch.tensor([target]))
        losses.append(float(found.loss))
        right.append(
            abs(float(found.logits[0, 0]) - target) if isinstance(target, float) else found.logits.argmax() == target
        )
    return float(np.mean(losses)), float(np.mean(right))


def test_an_expert_is_a_classifier_of_transformers_that_has_learned_the_classes(root):
    expert = trained(root, "bert", "texts", "out", "--train_steps=60")
    log = read_json(expert / "finetune.json")["log"]
    loss, right = by_transformers(expert, root / "texts_eval.jsonl")
    assert right > 0.9
    assert log[-1]["eval_loss"] == pytest.approx(loss, rel=1e-4)
    config = read_json(expert / "config.json")
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert list(config["id2label"].values()) == sorted(WORDS)


@pytest.mark.slow
def test_adamr_keeps_deltas_small_and_a_trained_head_is_kept(root):
    """The head is part of what is pulled toward: a second training begins from the first one's."""
    far = trained(root, "bert", "texts", "far", "--train_steps=30")
    near = trained(root, "bert", "texts", "near", "--train_steps=30", "--decay_toward=base", "--weight_decay=0.1")
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    base = transformers.AutoModel.from_pretrained(root / "bert").state_dict()
    sizes = [
        sum(float((weight - base[name]).abs().sum()) for name, weight in load(at).bert.state_dict().items())
        for at in (far, near)
    ]
    assert sizes[1] < 0.8 * sizes[0]
    again = trained(root, "far", "texts", "again", "--train_steps=1", "--learning_rate=0")
    for one, other in zip(load(far).parameters(), load(again).parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_numbers_are_learned_from_pairs_by_the_square_of_the_error(root):
    expert = trained(root, "roberta", "pairs", "numbers", "--train_steps=90")
    loss, _ = by_transformers(expert, root / "pairs_eval.jsonl")
    assert loss < 0.1, "the variance of these numbers is 0.17"
    assert read_json(expert / "finetune.json")["log"][-1]["eval_loss"] == pytest.approx(loss, abs=1e-4)
    assert read_json(expert / "config.json")["problem_type"] == "regression"


@pytest.mark.slow
def test_two_devices_and_parts_train_the_weights_of_one(root):
    alone = trained(root, "bert", "texts", "alone", "--train_steps=5")
    mesh = trained(root, "bert", "texts", "mesh", "--train_steps=5", "--mesh=data=1,fsdp=2", "--accumulate=2")
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    for one, other in zip(load(alone).parameters(), load(mesh).parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"sentence": "a"}', "1: .*label"),
        ('{"words": "a", "label": 1}', "1: it has no text, neither sentence"),
        (
            '{"sentence": "a", "label": 1}\n{"sentence1": "a", "sentence2": "b", "label": 1}',
            "2: give a sentence2 to all",
        ),
        (
            '{"sentence": "a", "label": 1}\n{"sentence": "b", "label": "x"}',
            "some labels are names and some are numbers",
        ),
    ],
)
def test_bad_lines_are_refused_before_anything_is_written(root, tmp_path, line, message):
    (tmp_path / "bad.jsonl").write_text(line + "\n")
    with pytest.raises(SystemExit, match=message):
        launch("--job=finetune", f"--base={root / 'bert'}", f"--output={tmp_path / 'o'}", f"--workdir={tmp_path}",
               f"--train_data={tmp_path / 'bad.jsonl'}")  # fmt: skip
    assert not (tmp_path / "o").exists()


def test_a_class_that_the_base_does_not_know_is_refused():
    assert class_names([1, 0], ("no", "yes")) == ("no", "yes")
    for labels in (["maybe"], [2]):
        with pytest.raises(ValueError, match=r"the label .* is no class of the base, which has no, yes"):
            class_names(labels, ("no", "yes"))
