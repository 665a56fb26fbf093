"""Combining experts' deltas, against loops over single elements."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import make_family, merge_to_arrays

from dppa_jax.config.merge import MergeConfig
from dppa_jax.delta import combine

TINY = 1e-30  # its square is zero in float32
NUMBERS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, -3.0, TINY, -TINY, 1e30, -1e30]),
    st.floats(-10, 10, width=32, allow_subnormal=False),
)
ELEMENTS = st.integers(1, 5).flatmap(
    lambda experts: st.lists(st.lists(NUMBERS, min_size=experts, max_size=experts), min_size=8, max_size=8)
)


def naive_ties(deltas: list[np.float32], zero_sign: float = 1.0) -> np.float32:
    total = np.float32(0)
    for delta in deltas:
        total = total + delta
    positive = total > 0 if total != 0 else zero_sign > 0
    agreeing = [delta for delta in deltas if (delta > 0 if positive else delta < 0)]
    mean = np.float32(0)
    for delta in agreeing:
        mean = mean + delta
    return mean / np.float32(max(len(agreeing), 1))


@settings(deadline=None)
@given(ELEMENTS, st.sampled_from([1.0, -1.0]))
@example([[TINY, TINY], [TINY, -2 * TINY], [1.0, TINY], [-TINY, 0.0]] * 2, 1.0)
@example([[1.0, -1.0], [-1.0, 1.0], [0.0, 0.0], [2.0, -2.0]] * 2, -1.0)
def test_ties_equals_a_loop(elements, zero_sign):
    arrays = list(np.array(elements, np.float32).T)
    found = np.asarray(combine.ties(arrays, zero_sign))
    np.testing.assert_array_equal(found, [naive_ties(list(map(np.float32, e)), zero_sign) for e in elements])


@settings(deadline=None)
@given(ELEMENTS)
def test_sum_adds_in_the_order_of_the_experts(elements):
    arrays = list(np.array(elements, np.float32).T)
    wanted = arrays[0]
    for array in arrays[1:]:
        wanted = wanted + array
    np.testing.assert_array_equal(np.asarray(combine.sum_(arrays)), wanted)


@pytest.mark.parametrize("experts", [pytest.param(("a",), marks=pytest.mark.slow), ("a", "b", "c")])
def test_ties_of_a_whole_merge_equals_a_loop(experts):
    """Coefficients count: λδ is what elects and what is averaged. Dense tensors take part untrimmed."""
    base, sources = make_family(experts, "float32", num_hidden_layers=1)
    coefficients = dict(zip(experts, (1.0, 0.25, 2.0), strict=False))
    config = MergeConfig(experts, method="ties", rate=0.6, coefficients=coefficients)
    merge = merge_to_arrays(base, sources, config, deltas=True)
    for name, array in base.tensors.items():
        scaled = [np.float32(coefficients[e]) * merge.deltas[e][name].ravel() for e in experts]
        wanted = np.array([naive_ties(list(of_element)) for of_element in zip(*scaled, strict=True)], np.float32)
        np.testing.assert_array_equal(merge.tensors[name].ravel(), array.ravel() + wanted, err_msg=name)


def test_sum_of_a_whole_merge_is_rounded_product_by_product():
    """No fused multiply-add: the bits are those of numpy's float32, on every backend."""
    base, sources = make_family(("a", "b"), "float32", num_hidden_layers=1)
    config = MergeConfig(("a", "b"), method="task_arithmetic", coefficients={"a": 0.3, "b": 0.7})
    merge = merge_to_arrays(base, sources, config)
    for name, array in base.tensors.items():
        a, b = (np.float32(c) * (sources[e].tensors[name] - array) for e, c in (("a", 0.3), ("b", 0.7)))
        np.testing.assert_array_equal(merge.tensors[name], array + (a + b), err_msg=name)
