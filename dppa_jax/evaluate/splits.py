"""Training, validation and test files of three of the paper's tasks, from files that hold them together.

    python -m dppa_jax.evaluate.splits SOURCE TARGET

SOURCE has gsm8k_train.jsonl, gsm8k_train_solutions.jsonl ({"id", "solution"}), gsm8k_test.jsonl, fpb.jsonl (the test
rows first, as many as the paper has) and unfair_tos_full1607.jsonl (LexGLUE's test split, "None" rows included); other
rows are of the form that --data_dir has. TARGET gets TASK_test.jsonl and TASK_validation.jsonl for --data_dir, and
TASK_train.jsonl and TASK_eval.jsonl of prompts and completions for --job=finetune. No question is in two of the splits.
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from absl import logging

from dppa_jax.config.evaluation import TaskOptions
from dppa_jax.evaluate.paper_tasks import SOURCES
from dppa_jax.evaluate.sources import with_cue
from dppa_jax.evaluate.tasks import TASKS, Item

FPB_TEST = 970  # rows, AdaptLLM's number
VALIDATION = 200  # rows of gsm8k and fpb, from those that are not tested
UNFAIR_SHARES = {"train": 0.4, "validation": 0.15}  # of the questions; the rest is tested
NONE_PER_LABEL = 1.0  # of unfair_tos: learned rows without a label, for each with one

Row = Mapping
Splits = dict[str, list[Row]]


def gsm8k(source: Path) -> Splits:
    """Abel learns worked solutions; the calculator's marks are left out of them."""
    solutions = {row["id"]: row["solution"] for row in read_rows(source / "gsm8k_train_solutions.jsonl")}
    test = read_rows(source / "gsm8k_test.jsonl")
    rows = [
        {**row, "completion": re.sub(r"<<.*?>>", "", solutions[row["id"]])}
        for row in without(test, read_rows(source / "gsm8k_train.jsonl"))
    ]
    validation = rows[-VALIDATION:]
    return {"train": without(validation, rows), "validation": validation, "test": test}


def fpb(source: Path) -> Splits:
    rows = [{**row, "completion": f" {row['answer']}"} for row in read_rows(source / "fpb.jsonl")]
    test = rows[:FPB_TEST]
    rest = in_random_order(without(test, rows))
    validation = rest[:VALIDATION]
    return {"train": without(validation, rest), "validation": validation, "test": test}


def unfair_tos(source: Path) -> Splits:
    """Rows with a label are divided by their questions; of the rows without, some are learned, and none are asked."""
    rows = [
        {**row, "completion": f" {row['answer']}"}
        for row in in_random_order(read_rows(source / "unfair_tos_full1607.jsonl"))
    ]
    labelled = [row for row in rows if row["answer"] != "None"]
    place = {row["question"]: number for number, row in enumerate(reversed(labelled))}  # the same question, one place
    first = round(UNFAIR_SHARES["train"] * len(labelled))
    second = first + round(UNFAIR_SHARES["validation"] * len(labelled))

    def placed(low: int, high: int) -> list[Row]:
        return [row for row in labelled if low <= place[row["question"]] < high]

    train = placed(0, first)
    unlabelled = without(labelled, [row for row in rows if row["answer"] == "None"])
    return {
        "train": train + unlabelled[: round(NONE_PER_LABEL * len(train))],
        "validation": placed(first, second),
        "test": placed(second, len(labelled)),
    }


SPLITS: dict[str, Callable[[Path], Splits]] = {"gsm8k": gsm8k, "fpb": fpb, "unfair_tos": unfair_tos}


def write_splits(source: Path, target: Path) -> dict[str, dict[str, int]]:
    """Writes the files of all three tasks; returns how many rows each has."""
    target.mkdir(parents=True, exist_ok=True)
    counts: dict[str, dict[str, int]] = {}
    for task, split in SPLITS.items():
        splits = split(source)
        for name in ("test", "validation"):
            write_rows(target / f"{task}_{name}.jsonl", [_asked(row) for row in splits[name]])
        learned = {"train": splits["train"], "eval": splits["validation"]}
        for name, rows in learned.items():
            examples = [{"prompt": prompt(task, row), "completion": row["completion"]} for row in rows]
            write_rows(target / f"{task}_{name}.jsonl", examples)
        counts[task] = {name: len(rows) for name, rows in splits.items()}
        logging.info("%s: %s", task, ", ".join(f"{count} {name}" for name, count in counts[task].items()))
    return counts


def prompt(task: str, row: Row) -> str:
    """What a model is asked with when the task is evaluated."""
    question = with_cue(row["question"], SOURCES[task])
    return TASKS[task].kind.ask(TaskOptions(), Item(row["id"], question, (row["answer"],)))


def without(others: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """The rows whose question none of the others asks."""
    asked = {row["question"] for row in others}
    return [row for row in rows if row["question"] not in asked]


def in_random_order(rows: Sequence[Row]) -> list[Row]:
    """By a hash of the question, whatever order they come in."""
    return sorted(rows, key=lambda row: hashlib.sha256(row["question"].encode()).digest())


def read_rows(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]


def write_rows(file: Path, rows: Sequence[Row]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _asked(row: Row) -> Row:
    return {key: row[key] for key in ("id", "question", "answer", "choices") if key in row}


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    logging.set_verbosity(logging.INFO)
    logging.set_stderrthreshold("info")
    try:
        write_splits(Path(sys.argv[1]), Path(sys.argv[2]))
    except OSError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
