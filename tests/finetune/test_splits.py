"""Files of examples and of items, from data sets that hold them together: nothing that is asked is learned."""

import json
from pathlib import Path

import pytest

from dppa_jax.config.evaluation import TaskOptions
from dppa_jax.evaluate.paper_tasks import DATASETS
from dppa_jax.evaluate.splits import FPB_TEST, SPLITS, VALIDATION, write_splits
from dppa_jax.evaluate.tasks import TASKS
from dppa_jax.finetune.data import read_examples

SHARES = {"train": 69, "validation": 26, "test": 77}  # of UNFAIR-ToS's 172 sentences with a label


def write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def numbered(count: int, what: str, answers: tuple[str, ...] = ("7",)) -> list[dict]:
    return [
        {"id": f"{what}-{i}", "question": f"{what} number {i}?", "answer": answers[i % len(answers)]}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Small, with some questions twice: within a data set's parts and across them."""
    root = tmp_path_factory.mktemp("source")
    gsm8k = numbered(VALIDATION + 40, "problem")
    tested = [*numbered(30, "test"), {**gsm8k[3], "id": "again"}, {**gsm8k[-1], "id": "and again"}]
    write(root / "gsm8k_train.jsonl", gsm8k)
    solutions = [{"id": row["id"], "solution": f"It is 3+4=<<3+4=7>>7.\n#### 7 ({row['id']})"} for row in gsm8k]
    write(root / "gsm8k_train_solutions.jsonl", solutions[::-1])
    write(root / "gsm8k_test.jsonl", tested)
    fpb = numbered(FPB_TEST + VALIDATION + 50, "sentence", DATASETS["fpb"].labels)
    again = [{**row, "id": f"{row['id']}, again"} for row in (fpb[0], fpb[-1], fpb[-2])]
    write(root / "fpb.jsonl", [*fpb, *again])
    labels = (*DATASETS["unfair_tos"].labels[:3], *["None"] * 5)
    unfair = numbered(160, "clause", labels)
    write(
        root / "unfair_tos_full1607.jsonl",
        [*unfair, {**unfair[0], "id": "again"}, {**unfair[1], "id": "and again", "answer": "None"}],
    )
    return root


@pytest.fixture(scope="module")
def written(source, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("target") / "new"
    write_splits(source, target)
    return target


def check_apart(target: Path) -> None:
    """No question in two of training, validation and test; what is asked is what was learned to be answered."""
    for name in SPLITS:
        options = TaskOptions(data_dir=str(target))
        asked = {split: {i.prompt for i in TASKS[name].items(options, split)} for split in ("test", "validation")}
        learned = {example.prompt for example in read_examples(target / f"{name}_train.jsonl")}
        checked = {example.prompt for example in read_examples(target / f"{name}_eval.jsonl")}
        assert not asked["test"] & asked["validation"], name
        assert not learned & (asked["test"] | asked["validation"]), name
        assert checked == asked["validation"], name


def test_no_question_is_in_two_splits(written):
    check_apart(written)


def test_the_first_rows_of_fpb_are_tested_and_every_other_row_has_its_place(written):
    tests = [json.loads(line) for line in (written / "fpb_test.jsonl").read_text().splitlines()]
    assert [row["id"] for row in tests] == [f"sentence-{i}" for i in range(FPB_TEST)]
    rest = [*read_examples(written / "fpb_eval.jsonl"), *read_examples(written / "fpb_train.jsonl")]
    assert len({example.prompt for example in rest}) == VALIDATION + 50


def test_completions_are_the_solution_or_the_label_after_the_cue(written):
    gsm8k = read_examples(written / "gsm8k_train.jsonl")[0]
    assert gsm8k.prompt == "Question:\nproblem number 0?\nAnswer:\nLet's think step by step.\n"
    assert gsm8k.completion == "It is 3+4=7.\n#### 7 (problem-0)"
    for task in ("fpb", "unfair_tos"):
        for example in read_examples(written / f"{task}_train.jsonl"):
            assert example.prompt.endswith(DATASETS[task].cue)
            assert example.completion.removeprefix(" ") in (*DATASETS[task].labels, "None")


def test_clauses_without_a_label_are_learned_and_not_asked(written):
    learned = [example.completion for example in read_examples(written / "unfair_tos_train.jsonl")]
    assert learned.count(" None") == len(learned) - learned.count(" None") > 0
    for split in ("test", "validation"):
        assert '"None"' not in (written / f"unfair_tos_{split}.jsonl").read_text()


def test_a_solution_that_is_missing_is_named(source, tmp_path):
    file = source / "gsm8k_train_solutions.jsonl"
    text = file.read_text()
    file.write_text(text[: text.rindex('{"id"')])
    with pytest.raises(ValueError, match=rf"{file}: no solution of 'problem-0', which gsm8k_train\.jsonl has"):
        write_splits(source, tmp_path)
    file.write_text(text)


def test_the_papers_data(shared, tmp_path):
    counts = write_splits(shared / "data", tmp_path)
    check_apart(tmp_path)
    assert counts == {
        "gsm8k": {"train": 7273, "validation": 200, "test": 1319},
        "fpb": {"train": 3675, "validation": 200, "test": 970},
        "unfair_tos": {**SHARES, "train": 2 * SHARES["train"]},
    }


def test_the_same_rows_in_another_order_give_the_same_clauses(source, written, tmp_path):
    other = tmp_path / "source"
    other.mkdir()
    for file in source.iterdir():
        text = file.read_text()
        turned = "".join(reversed(text.splitlines(keepends=True)))
        (other / file.name).write_text(turned if file.name.startswith("unfair") else text)
    write_splits(other, tmp_path / "target")
    name = "unfair_tos_test.jsonl"
    assert sorted((tmp_path / "target" / name).read_text().splitlines()) == sorted(
        (written / name).read_text().splitlines()
    )
