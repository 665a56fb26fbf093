"""What is told of DAREx's numbers: each with its source, and nothing that only a machine or a caption says."""

import csv
from pathlib import Path

import pytest

import dppa_jax
from dppa_jax.report.darex_published import MARKS, told, told_table

TRUSTED = {"abstract": "arXiv 2410.09344 abstract", "repository": "github vengdeng/DAREx 0873fc2"}
TRUSTED |= {"human reviewer": "second-hand: human reviewer"}
TASKS = ("cola", "sst2", "mrpc", "stsb")


@pytest.fixture(scope="module")
def sources(golden) -> list[dict]:
    """Every number that was found, whoever tells it."""
    with (golden / "darex/published.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def mark_of(row: dict) -> str | None:
    return next((mark for mark, source in TRUSTED.items() if row["source"].startswith(source)), None)


def test_every_number_with_a_source_is_there_and_no_other(sources):
    wanted = [(mark_of(row), row["table"], row["task"], float(row["value"])) for row in sources if mark_of(row)]
    assert sorted((one.mark, one.table, one.task, one.value) for one in told()) == sorted(wanted)
    assert len(wanted) == 9
    assert {one.mark for one in told()} == set(MARKS)


def test_what_a_machine_a_caption_or_a_notebook_tells_is_nowhere_in_the_product(sources):
    """Numbers of three digits and more; shorter ones, such as 4, stand for other things as well."""
    left_out = [row for row in sources if not mark_of(row)]
    assert len(left_out) == 13
    digits = {row["value"] for row in left_out if len(row["value"].replace(".", "").lstrip("0")) >= 4}
    assert digits == {"34.87"}
    package = Path(dppa_jax.__file__).parent
    for file in [*package.rglob("*.py"), *package.rglob("*.csv"), *package.rglob("*.md"), *package.rglob("*.html")]:
        assert not any(number in file.read_text() for number in digits), file
    shown = {(model, one.task, one.rate, one.value) for one in told() for model in one.models}
    for row in left_out:
        model = {"bert": "bert-base-uncased", "roberta": "roberta-base"}.get(row["model"].split()[0], row["model"])
        assert (model, row["task"], float(row["rate"] or 0) or None, float(row["value"])) not in shown


def test_only_the_papers_bases_and_tasks_have_them_each_marked():
    experts = {task: f"models/{task}" for task in TASKS}
    table = told_table("models/roberta-base", experts, ("cola", "mrpc"))
    assert {section for section, _ in table.rows} == {"cola"}
    shown = table.markdown()
    assert "| AdamR-L2, then DARE: mean at rate 0.99 | 59.01 (human reviewer) |" in shown
    assert "(human reviewer): second-hand" in shown
    assert "(repository)" not in shown
    bert = told_table("google-bert/bert-base-uncased@main", experts, TASKS)
    assert sorted({section for section, _ in bert.rows}) == sorted(TASKS)
    assert told_table("bert-large-uncased", experts, TASKS) is None
    assert told_table("roberta-base", experts, ("gsm8k",)) is None
    assert told_table("roberta-base", {"math": "models/math"}, TASKS) is None
