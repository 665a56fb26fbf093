"""DAREx's q of a linear: the reference values of shared/golden/darex, brute force, and what must not change it."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from dppa_jax.delta.q_rules import Q_RULES, Moments, bound_rows, kearns_saul, mean_square, tail_bound
from dppa_jax.delta.scale import q as weights

LINEARS = ("plain", "aligned", "mixed", "large", "tiny", "wide")


@pytest.fixture(scope="module")
def expected(golden) -> dict:
    return json.loads((golden / "darex/q_analytic/expected.json").read_text())


@pytest.fixture(scope="module")
def linears(golden) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    stored = load_file(golden / "darex/q_analytic/linears.safetensors")
    return {name: (stored[f"{name}.delta"].astype(float), stored[f"{name}.inputs"].astype(float)) for name in LINEARS}


def moments(delta: np.ndarray, inputs: np.ndarray) -> Moments:
    products = delta * inputs.mean(axis=0)
    change = float(np.square(inputs @ delta.T).sum())
    separate = float((np.square(inputs).sum(axis=0) * np.square(delta).sum(axis=0)).sum())
    return Moments(products.sum(axis=1), np.square(products).sum(axis=1), change, separate)


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


def test_5_phi_is_that_of_the_reference_and_one_half_in_the_middle(expected):
    for rate, phi in expected["phi"].items():
        assert kearns_saul(float(rate)) == pytest.approx(phi, rel=1e-12)
    assert kearns_saul(0.5) == pytest.approx(kearns_saul(0.5 + 1e-9), rel=1e-9)


@pytest.mark.parametrize("name", LINEARS)
def test_5_sums_and_q_are_those_of_the_reference(name, expected, linears):
    found, wanted = moments(*linears[name]), expected["linears"][name]
    np.testing.assert_allclose(found.sums, wanted["S"], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(found.squares, wanted["Q"], rtol=1e-12)
    for case in wanted["cases"]:
        rows = bound_rows(found.sums, found.squares, case["p"], case["eta"])
        np.testing.assert_allclose(rows, case["bound"]["rows"], rtol=1e-12)
        found_q = Q_RULES["bound"].q(found, case["p"], case["eta"])
        assert found_q == pytest.approx(case["bound"]["linear"], rel=1e-12)
    for case in wanted["mse"]["cases"]:
        assert mean_square(found.change, found.separate, case["p"]) == pytest.approx(case["q"], rel=1e-12)


def test_5_q_of_aligned_and_tiny_are_those_of_the_specification(linears):
    aligned, tiny = (moments(*linears[name]) for name in ("aligned", "tiny"))
    of = {rule: [Q_RULES[rule].q(aligned, p, 0.45) for p in (0.9, 0.99)] for rule in ("bound", "mse")}
    assert of["bound"] == pytest.approx([0.158390540, 0.485944100], abs=1e-9)
    assert of["mse"] == pytest.approx([0.815155907, 0.796671498], abs=1e-9)
    assert [Q_RULES["bound"].q(tiny, p, 0.45) for p in (0.9, 0.99)] == pytest.approx([0.1, 0.010339762], abs=1e-9)
    assert bound_rows(tiny.sums, tiny.squares, 0.9, 0.45)[3] == pytest.approx(0.1)  # a row of zeros


def test_5_the_closed_form_is_the_least_of_200001_values_of_q():
    generator = np.random.default_rng(1)
    for _ in range(200):
        p, eta = generator.uniform(0.05, 0.995), 10 ** generator.uniform(-1, 2)
        s, squares = generator.normal(), generator.lognormal()
        q = np.linspace(1 - p, 1, 200_001)
        bias = abs(1 - (1 - p) / q) * abs(s)
        least = q[np.argmin(eta * bias + eta**2 * kearns_saul(p) * squares / (4 * q**2))]
        assert bound_rows(np.array([s]), np.array([squares]), p, eta)[0] == pytest.approx(least, abs=2e-5)


def test_5_units_and_the_order_of_inputs_do_not_change_q(linears):
    delta, inputs = linears["mixed"]
    order = np.random.default_rng(2).permutation(delta.shape[1])
    for rule, eta in (("bound", 0.45 / 7), ("mse", 0.45)):
        q = Q_RULES[rule].q
        plain = q(moments(delta, inputs), 0.9, 0.45)
        assert q(moments(7 * delta, inputs), 0.9, eta) == pytest.approx(plain, rel=1e-12)
        assert q(moments(delta[:, order], inputs[:, order]), 0.9, 0.45) == pytest.approx(plain, rel=1e-12)
    assert 0.1 < Q_RULES["bound"].q(moments(delta, inputs), 0.9, 0.45) < 1


def test_9_errors_of_random_columns_are_those_of_elements_and_of_rows_those_of_their_sums(golden, linears):
    """The expected Σ|h|² over tokens at p = 0.9, q = 0.3, beside the reference's Monte Carlo."""
    facts = json.loads((golden / "darex/structural/structural.json").read_text())
    delta, inputs = linears["mixed"]
    inputs = inputs / 8  # the reference has the mean over its 64 tokens
    own, p, q, generator = moments(delta, inputs), 0.9, 0.3, np.random.default_rng(3)
    (case,) = (c for c in facts["cases"] if (c["p"], c["q"]) == (p, q))
    for kind, spread in (("column", own.separate), ("row", own.change)):
        error = (1 - (1 - p) / q) ** 2 * own.change + p * (1 - p) / q**2 * spread
        assert error == pytest.approx(case["expected_error"][kind], rel=1e-12)
        shape = (3000, 1, delta.shape[1]) if kind == "column" else (3000, len(delta), 1)
        trials = [np.square(inputs @ (delta * (1 - kept / q)).T).sum() for kept in generator.random(shape) >= p]
        assert np.mean(trials) == pytest.approx(error, rel=0.03)
        assert facts["monte_carlo"][kind] == pytest.approx(error, rel=0.03)
    assert mean_square(own.change, own.separate, p) == pytest.approx(facts["q_mse"]["0.9"]["column"], rel=1e-12)
