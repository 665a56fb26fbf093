"""Moments of pruned outputs, and the bound on them, where all masks can be tried."""

import json

import numpy as np
import pytest

from dppa_jax.delta.q_rules import tail_bound
from dppa_jax.delta.scale import q as weights


def test_1_moments_of_all_masks_are_those_of_the_formulas():
    """All 1,024 masks of ten inputs, with the weights of --scale=q: means and variances to 1e-12."""
    c = np.random.default_rng(0).normal(0.3, 1, 10)
    masks = (np.arange(1024)[:, None] >> np.arange(10)) & 1
    for p, q in ((0.9, 0.1), (0.9, 0.25), (0.3, 0.9)):
        weight = weights(np.array([[p]]), q)[0, 0]
        h = (c * (1 - masks * weight)).sum(axis=1)
        chance = ((1 - p) ** masks * p ** (1 - masks)).prod(axis=1)
        mean = (chance * h).sum()
        assert mean == pytest.approx((1 - (1 - p) / q) * c.sum(), abs=1e-12)
        variance = (chance * np.square(h - mean)).sum()
        assert variance == pytest.approx(p * (1 - p) * np.square(c).sum() / q**2, rel=1e-12)


def test_1_the_bound_holds_wherever_all_masks_were_tried(golden):
    cases = json.loads((golden / "darex/bound/brute_force.json").read_text())
    for case in cases:
        c = np.array(case["c"])
        for tail in case["tail"]:
            bound = tail_bound(c.sum(), np.square(c).sum(), case["p"], case["q"], tail["gamma"])
            assert bound == pytest.approx(tail["bound"], rel=1e-12)
            assert tail["exact_probability_above"] <= tail["gamma"]
