"""The delta's rounding, and that a merge ranks by the score it is told to."""

import jax
import numpy as np
import pytest
from families import DTYPES
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from support import AWKWARD, linear_names, make_family, merge_to_arrays, random_norms

from dppa_jax.config.merge import MergeConfig
from dppa_jax.delta.score import delta, magnitude
from dppa_jax.delta.threshold import index

LAYERS = 2
WEIGHTS = arrays.arrays(np.float32, (2, 1, 8), elements=st.floats(-2, 2, width=32, allow_subnormal=False))
SMALL = arrays.arrays(np.float32, (2, 1, 8), elements=st.floats(-(2.0**-13), 2.0**-13, width=32, allow_subnormal=False))


compiled_delta = jax.jit(delta, static_argnums=2)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None)
@given(st.one_of(WEIGHTS, SMALL))
@example(np.float32([[[0] * 8], [[3e-5, -3e-5, 2.0**-14, 6.1e-5, 2.0**-24, 2.0**-25, 1.5 * 2.0**-24, 2.5 * 2.0**-24]]]))
def test_delta_is_rounded_once_to_its_dtype(dtype, weights):
    """Also to float16's denormals, below 6.1e-5, which is where deltas of fine-tuning lie."""
    base, expert = weights
    wanted = (expert - base).astype(DTYPES[dtype]).astype(np.float32)
    found = np.asarray(compiled_delta(base, expert, dtype))
    tiny = np.finfo(np.float32).tiny  # float32's own denormals are zero on a CPU
    np.testing.assert_array_equal(np.where(abs(found) < tiny, 0, found), np.where(abs(wanted) < tiny, 0, wanted))


@given(arrays.arrays(np.float32, (1, 16), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_magnitude_keys_are_in_the_order_of_magnitudes(values):
    keys = np.asarray(magnitude(values))[0].astype(np.int64)
    size = abs(values[0])
    np.testing.assert_array_equal(np.sign(keys[:, None] - keys), np.sign(size[:, None].astype(np.float64) - size))


@pytest.fixture(scope="module")
def family():
    return make_family(("math", "law"), num_hidden_layers=LAYERS, **AWKWARD)


@pytest.fixture(scope="module")
def norms() -> dict[str, dict[str, np.ndarray]]:
    """Other norms for every expert, linear and column."""
    return random_norms(make_family((), num_hidden_layers=LAYERS, **AWKWARD)[0], ("math", "law"))


def numpy_score(score: str, size: np.ndarray, norm: np.ndarray) -> np.ndarray:
    columns = size.sum(axis=0, dtype=np.float64)
    sums = {"row": size.sum(axis=1, keepdims=True, dtype=np.float64), "column": columns, "wanda_column": columns * norm}
    return size * norm if score == "wanda" else np.broadcast_to(sums.get(score, size), size.shape)


RANKED = ("magnitude", "wanda", "row", "column", "wanda_column")
FAST = ("wanda", "wanda_column")


@pytest.mark.parametrize(
    "score",
    [pytest.param(s, marks=[] if s in FAST else pytest.mark.slow) for s in RANKED],
)
def test_a_merge_keeps_what_has_the_highest_score(score, family, norms):
    base, experts = family
    config = MergeConfig(("math", "law"), method="magnitude", score=score, rate=0.7, ties="drop")
    merge = merge_to_arrays(base, experts, config, deltas=True, norms=norms)
    for e, (expert, source) in enumerate(experts.items()):
        for place, name in enumerate(linear_names(base.config)):
            dense = source.tensors[name].astype(np.float32) - base.tensors[name].astype(np.float32)
            scores = numpy_score(score, abs(dense), norms[expert][name])
            threshold = np.sort(scores, axis=None)[int(index(scores.size, 0.7))]
            kept = scores > threshold
            np.testing.assert_array_equal(merge.deltas[expert][name], np.where(kept, dense, 0), err_msg=name)
            assert merge.outcome.thresholds[e, 0, place] == pytest.approx(threshold, rel=1e-6)
            assert merge.outcome.densities[e, 0, place] == pytest.approx(kept.mean())


@pytest.mark.parametrize(("score", "axis"), [("row", 1), ("column", 0), ("wanda_column", 0)])
def test_structural_scores_keep_or_drop_whole_rows_and_columns(score, axis, family, norms):
    base, experts = family
    config = MergeConfig(("math",), method="magnitude", score=score, rate=0.6)
    deltas = merge_to_arrays(base, {"math": experts["math"]}, config, deltas=True, norms=norms).deltas["math"]
    for name in linear_names(base.config):
        dense = experts["math"].tensors[name].astype(np.float32) - base.tensors[name].astype(np.float32)
        kept, there = (deltas[name] != 0).sum(axis=axis), (dense != 0).sum(axis=axis)
        assert ((kept == 0) | (kept == there)).all(), name
        assert 0.3 < (kept == 0).mean() < 0.8, name
