"""--decay_search: the largest decay toward the base whose expert stays as good."""

import json
from pathlib import Path

import pytest
from command import Merge, launch
from training import WEIGHTS, flags

from dppa_jax.search.decay import HALVINGS, RUNGS, largest_within

GIVEN = ("--decay_search", "--train_steps=4", "--weight_decay=0.1", "--eval_every=0")


@pytest.mark.parametrize("limit", [2e-4, 0.0099, 0.01, 0.05, 0.3, 0.99])
def test_the_answer_is_the_largest_decay_by_a_third_at_most(limit):
    asked = []
    found = largest_within(lambda decay: asked.append(decay) or decay <= limit)
    assert 0.74 * limit < found <= limit
    assert len(asked) == len(set(asked)) <= 1 + RUNGS + HALVINGS


def test_where_none_is_within_the_answer_is_no_decay_and_where_all_are_the_last_one():
    asked = []
    assert largest_within(lambda decay: asked.append(decay)) == 0
    assert asked == [0.01, 0.0032, 0.001, 0.00032, 0.0001]
    assert largest_within(lambda _: True, start=0.1) == 10


@pytest.fixture
def few(monkeypatch):
    """Three trainings with decay at most: each costs seconds."""
    monkeypatch.setattr("dppa_jax.search.decay.RUNGS", 1)
    monkeypatch.setattr("dppa_jax.search.decay.HALVINGS", 1)


def of(root: Path, name: str) -> dict:
    return json.loads((root / "out" / name).read_text())


@pytest.mark.slow
def test_the_found_decay_is_within_the_tolerance_of_none_and_its_expert_is_written(
    material, tmp_path, few, monkeypatch, caplog
):
    """A run that is stopped on the way goes on: no decay is trained twice."""
    given = flags(material, tmp_path, *GIVEN, "--decay_tolerance=0.05")

    def fail(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("dppa_jax.jobs.decay_search._publish", fail)
        with pytest.raises(SystemExit, match="disk full"):
            launch(*given)
    caplog.clear()
    with caplog.at_level("INFO", "absl"):
        launch(*given)
    assert "train:" not in caplog.text
    search = of(tmp_path, "decay_search.json")
    rows = {row["weight_decay"]: row for row in search["tried"]}
    good = [decay for decay, row in rows.items() if row["within"]]
    assert search["found"] == max(good) > 0
    least = rows[0.0]["score"] - 0.05
    assert all(row["within"] == (row["score"] is not None and row["score"] >= least) for row in rows.values())
    assert not all(row["within"] for row in rows.values()), "the tolerance says something"
    record = of(tmp_path, "finetune.json")
    assert record["training"]["optimizer"]["weight_decay"] == search["found"]
    assert record["training"]["optimizer"]["decay_toward"] == "base"
    assert not list((tmp_path / "runs").iterdir())

    found = (tmp_path / "out" / WEIGHTS).read_bytes()
    alone = [f"--weight_decay={search['found']}", "--decay_toward=base", "--nodecay_search"]
    launch(*given, *alone, f"--output={tmp_path}/alone")
    assert (tmp_path / "alone" / WEIGHTS).read_bytes() == found


@pytest.mark.slow
def test_a_pull_that_is_refused_is_not_within(material, tmp_path, few, caplog):
    launch(*flags(material, tmp_path, *GIVEN, "--weight_decay=1000", "--decay_tolerance=100"))
    search = of(tmp_path, "decay_search.json")
    assert {row["weight_decay"]: row["score"] for row in search["tried"] if row["score"] is None} == {
        1000: None,
        320: None,
    }
    assert search["found"] == 0
    assert "no decay is within --decay_tolerance" in caplog.text


@pytest.mark.slow
def test_tasks_are_scored_on_their_validation_items(material, tmp_path, few):
    launch(*flags(material, tmp_path, *GIVEN, "--evaluate=addition", "--limit=5", "--decay_tolerance=100"))
    assert of(tmp_path, "decay_search.json")["scored by"] == "validation items of addition, %"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--eval_data=", "--decay_search: nothing says how good an expert is: give tasks with validation items as"),
        ("--decay_tolerance=-1", "--decay_tolerance=-1.0: it must be a number of 0 or more"),
        ("--base=nowhere", "nowhere: no such directory"),
        ("--train_data=nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_a_search_that_cannot_work_is_refused_before_anything_is_written(material, tmp_path, given, message):
    root = tmp_path / "work"
    root.mkdir()
    assert message in Merge(root).refusal(of=[*flags(material, root), *GIVEN, given])
