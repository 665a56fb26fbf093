"""What AdaMerging keeps between runs: it goes on from a whole state, and begins anew from any other, with a message."""

import json

import numpy as np
import pytest
from hostile import ODD, damaged, other_form
from hypothesis import given, settings

from dppa_jax.config.numbers import read_coefficients
from dppa_jax.search.adamerging import read_continuations
from dppa_jax.search.adamerging_state import State, read_state, write_state
from dppa_jax.search.coefficients import Groups

EXPERTS = ("math", "law")
GROUPS = Groups(("all",), np.zeros(2, np.int32), ("a", "b"))
SHAPE = (1, 2)


@pytest.fixture
def file(tmp_path):
    """The state after one step."""
    arrays = [np.full(SHAPE, value, np.float32) for value in (0.5, 0.25, 0.125)]
    state = State(*arrays, [1.5], [[1.0, 0.5]], [np.full(SHAPE, 0.3, np.float32)])
    write_state(tmp_path / "coefficients.json", "same", state, GROUPS, EXPERTS, True)
    return tmp_path / "coefficients.json"


def test_a_state_of_the_same_inputs_is_gone_on_from(file):
    state, finished = read_state(file, "same", SHAPE, 0.3)
    assert finished
    assert (state.raw.tolist(), state.mean.tolist(), state.square.tolist()) == (
        [[0.5] * 2],
        [[0.25] * 2],
        [[0.125] * 2],
    )
    assert (state.entropies, state.domain_entropies, len(state.history)) == ([1.5], [[1.0, 0.5]], 1)
    assert state.history[0].dtype == np.float32
    assert read_coefficients(file, EXPERTS) == {"math": 0.5, "law": 0.5}
    other, finished = read_state(file, "other", SHAPE, 0.3)
    assert (other.entropies, finished) == ([], False)


@pytest.mark.parametrize("content", [content for content in ODD if content])
def test_a_damaged_state_is_named_and_the_work_begins_anew(file, caplog, content):
    file.write_bytes(content)
    state, finished = read_state(file, "same", SHAPE, 0.3)
    assert (state.raw.tolist(), finished) == (np.full(SHAPE, 0.3, np.float32).tolist(), False)
    assert str(file) in caplog.text
    assert "begins anew" in caplog.text


def test_a_state_of_another_shape_is_named(file, caplog):
    state, _ = read_state(file, "same", (3, 2), 0.3)
    assert state.raw.shape == (3, 2)
    assert "its arrays are not 3 by 2; AdaMerging begins anew" in caplog.text


ARRAY = [[0.5, 0.5]]
KEPT = dict.fromkeys(("raw", "mean", "square"), ARRAY) | {"entropies": [1.5], "domain_entropies": [[1.0, 0.5]]}
KEPT |= {"history": [ARRAY], "stopped_early": False, "peak_bytes": 0, "model_bytes": 0}
WHOLE = {"fingerprint": "same", "finished": True, "state": KEPT, "coefficients": {"math": 0.5}}
CHANGED = other_form(KEPT).map(lambda state: json.dumps({**WHOLE, "state": json.loads(state)}).encode())


@settings(max_examples=150, deadline=None)
@given(content=damaged(json.dumps(WHOLE).encode()) | other_form(WHOLE) | CHANGED)
def test_any_file_gives_a_state_of_the_right_shape(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("state") / "coefficients.json"
    file.write_bytes(content)
    state, finished = read_state(file, "same", SHAPE, 0.3)
    assert finished in (True, False)
    assert all(array.shape == SHAPE for array in (state.raw, state.mean, state.square, *state.history))
    assert read_continuations(file, "same", {"math": [[1]]}) is None


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ({"fingerprint": "same", "answers": {"math": [[1, 2], []]}}, {"math": [[1, 2], []]}),
        ({"fingerprint": "other", "answers": {"math": [[1, 2], []]}}, None),
        ({"fingerprint": "same", "answers": {"math": [[1, 2]]}}, None),
        ({"fingerprint": "same", "answers": {"law": [[1, 2], []]}}, None),
        ({"fingerprint": "same", "answers": {"math": ["x", []]}}, None),
        ([1], None),
    ],
)
def test_continuations_are_taken_up_for_the_same_prompts_only(tmp_path, content, wanted):
    file = tmp_path / "continuations.json"
    assert read_continuations(file, "same", {"math": [[5], [6]]}) is None
    file.write_text(json.dumps(content))
    assert read_continuations(file, "same", {"math": [[5], [6]]}) == wanted
