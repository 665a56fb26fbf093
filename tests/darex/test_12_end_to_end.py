"""The finance expert of the demo family at rate 0.99, whose q is found by text and by labels."""

import numpy as np
import pytest
from command import launch
from families import read_json

from dppa_jax.demo.text import held_out


@pytest.fixture
def text(tmp_path):
    """Questions and answers of the finance tasks that are held out for validation."""
    samples = [sample for task in ("sentiment", "trend") for sample in held_out(task, "validation", 60)]
    (tmp_path / "text.txt").write_text("".join(f"{sample.prompt}{sample.answer}\n" for sample in samples))
    return f"--calibration={tmp_path / 'text.txt'}"


@pytest.mark.slow
def test_12_without_labels_finance_is_far_above_dare_and_above_the_base(family, text, tmp_path):
    """Accuracy at rate 0.99 over both tasks: at least 40 points above DARE."""
    models = [family[0], "--expert=finance=demo:finance", "--evaluate=sentiment,trend", "--rate=0.99"]
    accuracy = {}
    for name, flags in (("dare", ["--method=dare"]), ("auto", ["--method=darex_q", "--q=auto", text])):
        launch(*models, *flags, f"--output={tmp_path / name}", f"--workdir={tmp_path / ('work-' + name)}")
        rows = read_json(tmp_path / f"work-{name}/tables.json")["tables"]["evaluated"]["rows"][:2]
        accuracy |= {of: np.mean([row["cells"][of]["values"][0] for row in rows]) for of in ("base", "merge")}
        accuracy[name] = accuracy.pop("merge")
    assert accuracy["auto"] >= accuracy["dare"] + 0.4
    assert accuracy["auto"] > accuracy["base"] + 0.1


@pytest.mark.slow
def test_labels_find_q_by_either_rule(family, tmp_path):
    models = [family[0], "--expert=finance=demo:finance", "--evaluate=sentiment", "--rate=0.99", "--method=darex_q"]
    for rule in ("parabola", "darex"):
        places = f"--output={tmp_path / rule}", f"--workdir={tmp_path / 'work'}"
        launch(*models, "--q=search", f"--q_rule={rule}", "--search_limit=60", *places)
        stored = read_json(tmp_path / "work/q.json")
        visits = stored["searches"]["finance"]["result"]["visits"]
        assert 0.03 < stored["q"]["finance"] < 0.3
        assert max(visit["score"] for visit in visits) == stored["searches"]["finance"]["result"]["score"]
