"""Weights of partitions from their rates."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dppa_jax.delta import scale

FACTORS = st.lists(st.floats(-3, 3), min_size=1, max_size=5).map(tuple)


@given(FACTORS, st.integers(0, 4))
def test_partition_highest_is_the_factor_of_the_highest_rate_that_keeps(factors, layers):
    """Weight p is what an element gets whose first (highest-rate) partition is p."""
    rates = np.linspace(0.9, 0.1, len(factors))[:, None] * np.ones(layers + 1)
    np.testing.assert_array_equal(scale.partition(rates, factors), np.tile(np.array(factors)[:, None], layers + 1))


@given(FACTORS)
def test_partition_max_is_the_factor_of_largest_magnitude_of_all_that_keep(factors):
    """An element of partition p is kept by it and by all of lower rate. The authors start from the lowest rate, so a
    higher rate's factor has to be larger, not equal, to win."""
    rates = np.linspace(0.9, 0.1, len(factors))
    for p, found in enumerate(scale.partition(rates, factors, "max")):
        wanted = factors[-1]
        for factor in reversed(factors[p:-1]):
            wanted = factor if abs(factor) > abs(wanted) else wanted
        assert found == wanted
        assert abs(found) == max(map(abs, factors[p:]))


@given(st.floats(0, 0.999999))
def test_dare_keeps_the_expectation(rate):
    assert scale.dare(np.array([rate]))[0] * (1 - rate) == pytest.approx(1, rel=1e-15)


def test_dare_at_rate_1_is_0_and_per_linear():
    np.testing.assert_allclose(scale.dare(np.array([[1.0, 0.5], [0.9, 0.0]])), [[0, 2], [10, 1]], rtol=1e-15)


@pytest.mark.parametrize("q", [0.2, np.array([0.2, 0.5])])
def test_q_divides(q):
    rates = np.full((1, 2), 0.9)
    np.testing.assert_array_equal(scale.q(rates, q), np.broadcast_to(1 / np.asarray(q), (1, 2)))


def test_none_is_1():
    np.testing.assert_array_equal(scale.none(np.array([[0.9, 1.0], [0.0, 0.5]])), np.ones((2, 2)))
