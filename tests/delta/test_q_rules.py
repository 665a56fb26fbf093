"""What random columns and rows change of outputs, beside the reference."""

import json

import numpy as np
import pytest
from darex_golden import moments_of, read_linears

from dppa_jax.delta.q_rules import mean_square


def test_9_errors_of_random_columns_are_those_of_elements_and_of_rows_those_of_their_sums(golden):
    """The expected Σ|h|² over tokens at p = 0.9, q = 0.3, beside the reference's Monte Carlo."""
    facts = json.loads((golden / "darex/structural/structural.json").read_text())
    delta, inputs = read_linears(golden)["mixed"]
    inputs = inputs / 8  # the reference has the mean over its 64 tokens
    own, p, q, generator = moments_of(delta, inputs), 0.9, 0.3, np.random.default_rng(3)
    (case,) = (c for c in facts["cases"] if (c["p"], c["q"]) == (p, q))
    for kind, spread in (("column", own.separate), ("row", own.change)):
        error = (1 - (1 - p) / q) ** 2 * own.change + p * (1 - p) / q**2 * spread
        assert error == pytest.approx(case["expected_error"][kind], rel=1e-12)
        shape = (3000, 1, delta.shape[1]) if kind == "column" else (3000, len(delta), 1)
        trials = [np.square(inputs @ (delta * (1 - kept / q)).T).sum() for kept in generator.random(shape) >= p]
        assert np.mean(trials) == pytest.approx(error, rel=0.03)
        assert facts["monte_carlo"][kind] == pytest.approx(error, rel=0.03)
    assert mean_square(own.change, own.separate, p) == pytest.approx(facts["q_mse"]["0.9"]["column"], rel=1e-12)
