"""Make training, validation and test files of three of the paper's tasks from files that hold all of their rows.

    python -m dppa_jax.evaluate.splits SOURCE TARGET

SOURCE is a directory with these files; their rows are of the form that --data_dir has:
- gsm8k_train.jsonl, gsm8k_test.jsonl, and gsm8k_train_solutions.jsonl with rows {"id", "solution"};
- fpb.jsonl, which begins with the test rows, as many as the paper has;
- unfair_tos_full1607.jsonl, the test split of LexGLUE, including the rows with the answer "None".

TARGET gets TASK_test.jsonl and TASK_validation.jsonl for --data_dir, and TASK_train.jsonl and TASK_eval.jsonl with
prompts and completions for --job=finetune. No question is in two of the splits. TARGET/labels gets the same splits of
FPB as sentences with labels, for encoders and --evaluate=classify:fpb.
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

from absl import logging

from dppa_jax.config.evaluation import TaskOptions
from dppa_jax.evaluate.paper_tasks import DATASETS
from dppa_jax.evaluate.sources import with_cue
from dppa_jax.evaluate.tasks import TASKS, Item
from dppa_jax.runtime.files import write_whole
from dppa_jax.runtime.reading import read_json_lines

FPB_TEST = 970  # rows; AdaptLLM tests as many
VALIDATION = 200  # rows of gsm8k and fpb, from those that are not in the test split
UNFAIR_SHARES = {"train": 0.4, "validation": 0.15}  # of the questions of unfair_tos; the rest is the test split
NONE_PER_LABEL = 1.0  # in the training split of unfair_tos: rows without a label for each row with one

Row = Mapping


class Question(TypedDict):
    """A line with an item of a task."""

    id: str
    question: str
    answer: str
    choices: NotRequired[list[str]]


class Solution(TypedDict):
    """A line with the worked solution of an item of GSM8K."""

    id: str
    solution: str


LABELLED = ("fpb",)  # tasks of one label, of which files for encoders are written as well
Splits = dict[str, list[Row]]


def gsm8k(source: Path) -> Splits:
    """Split GSM8K. A completion is the worked solution, as Abel learns it, without the calculator's marks <<…>>."""
    file = source / "gsm8k_train_solutions.jsonl"
    solutions = {row["id"]: row["solution"] for row in read_rows(file, Solution)}
    test = read_rows(source / "gsm8k_test.jsonl")
    train = without(test, read_rows(source / "gsm8k_train.jsonl"))
    if missing := [row["id"] for row in train if row["id"] not in solutions]:
        raise ValueError(f"{file}: no solution of {missing[0]!r}, which gsm8k_train.jsonl has; add its line.")
    rows = [{**row, "completion": without_marks(solutions[row["id"]])} for row in train]
    validation = rows[-VALIDATION:]
    return {"train": without(validation, rows), "validation": validation, "test": test}


def without_marks(solution: str) -> str:
    """Return a solution without the calculator's marks.

    >>> without_marks("3 + 4 = <<3+4=7>>7 <<")
    '3 + 4 = 7 <<'
    """
    # Where a mark is not closed on its line, the second alternative takes the rest: else each further << would look.
    return re.sub(r"<<(?:.*?(>>)|.*)", lambda found: "" if found[1] else found[0], solution)


def fpb(source: Path) -> Splits:
    """Split FPB: the first rows are the test split, the others are divided by a hash of the question."""
    rows = [{**row, "completion": f" {row['answer']}"} for row in read_rows(source / "fpb.jsonl")]
    test = rows[:FPB_TEST]
    rest = in_random_order(without(test, rows))
    validation = rest[:VALIDATION]
    return {"train": without(validation, rest), "validation": validation, "test": test}


def unfair_tos(source: Path) -> Splits:
    """Split UNFAIR-ToS by questions. Of the rows without a label, some are in the training split and none elsewhere."""
    rows = [
        {**row, "completion": f" {row['answer']}"}
        for row in in_random_order(read_rows(source / "unfair_tos_full1607.jsonl"))
    ]
    labelled = [row for row in rows if row["answer"] != "None"]
    place = {row["question"]: number for number, row in enumerate(reversed(labelled))}  # one for each question
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
    """Write the files of all three tasks; return how many rows each split has, by task."""
    (target / "labels").mkdir(parents=True, exist_ok=True)
    counts: dict[str, dict[str, int]] = {}
    for task, split in SPLITS.items():
        splits = split(source)
        for name in ("test", "validation"):
            write_rows(target / f"{task}_{name}.jsonl", [_item_row(row) for row in splits[name]])
        learned = {"train": splits["train"], "eval": splits["validation"]}
        for name, rows in learned.items():
            examples = [{"prompt": prompt(task, row), "completion": row["completion"]} for row in rows]
            write_rows(target / f"{task}_{name}.jsonl", examples)
        if task in LABELLED:
            for name, rows in {**splits, "eval": splits["validation"]}.items():
                write_rows(target / "labels" / f"{task}_{name}.jsonl", [_labelled_row(row) for row in rows])
        counts[task] = {name: len(rows) for name, rows in splits.items()}
        logging.info("%s: %s", task, ", ".join(f"{count} {name}" for name, count in counts[task].items()))
    return counts


def _labelled_row(row: Row) -> Row:
    """Return a row as a sentence, which is the question without what the template adds, and its label."""
    return {"id": row["id"], "sentence": row["question"].partition("\nQuestion:")[0], "label": row["answer"]}


def prompt(task: str, row: Row) -> str:
    """Return the prompt with which a model is asked when the task is evaluated."""
    question = with_cue(row["question"], DATASETS[task])
    return TASKS[task].kind.ask(TaskOptions(), Item(row["id"], question, (row["answer"],)))


def without(others: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """Return the rows whose question is in none of the others."""
    asked = {row["question"] for row in others}
    return [row for row in rows if row["question"] not in asked]


def in_random_order(rows: Sequence[Row]) -> list[Row]:
    """Sort rows by a hash of the question: a random order that does not depend on the order of the file."""
    return sorted(rows, key=lambda row: hashlib.sha256(row["question"].encode()).digest())


def read_rows(file: Path, shape: type = Question) -> list[Row]:
    """Read a file of JSON lines; keys that the shape does not have are left out."""
    return [row for _, row in read_json_lines(file, shape)]


def write_rows(file: Path, rows: Sequence[Row]) -> None:
    """Write a file of JSON lines."""
    write_whole(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _item_row(row: Row) -> Row:
    """Return the keys of a row that --data_dir reads."""
    return {key: row[key] for key in ("id", "question", "answer", "choices") if key in row}


def main() -> None:
    """Run the command line."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    logging.set_verbosity(logging.INFO)
    logging.set_stderrthreshold("info")
    try:
        write_splits(Path(sys.argv[1]), Path(sys.argv[2]))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
