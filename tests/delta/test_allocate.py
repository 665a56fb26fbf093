"""Allocations against the formulas of the design, written out again with loops, and the properties they promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import linear_names, make_family, merge_to_arrays

from dppa_jax.config.merge import MergeConfig
from dppa_jax.delta.allocate import ALLOCATIONS, Statistics

SIZES = (64.0, 32.0, 32.0, 64.0, 176.0, 176.0, 176.0)
AMOUNTS = st.integers(0, 8000).map(lambda eighths: eighths / 8)


@st.composite
def statistics(draw) -> Statistics:
    layers = draw(st.integers(1, 5))
    linear = np.array([draw(AMOUNTS) for _ in range(layers * len(SIZES))])
    return of_layers(layers, linear, np.array([draw(AMOUNTS) for _ in range(layers)]))


def of_layers(layers: int, linear_outliers: np.ndarray, layer_outliers: np.ndarray) -> Statistics:
    """Layers of seven linears of these sizes."""
    return Statistics(np.repeat(np.arange(layers), len(SIZES)), numel_of(layers), linear_outliers, layer_outliers)


def numel_of(layers: int) -> np.ndarray:
    return np.tile(SIZES, layers)


def by_layer(values: np.ndarray) -> list[list[float]]:
    return values.reshape(-1, len(SIZES)).tolist()


def fluctuation(significance: list[float], mean: float, maximum: float) -> list[float]:
    centred = [s - mean for s in significance]
    largest = max(abs(c) for c in centred)
    return [maximum * c / largest if largest > 1e-12 * max(map(abs, significance)) else 0.0 for c in centred]


def rates(rate, numel, layer, linear, maximum) -> list[list[float]]:
    """clip(p − f_l − g_lj, 0, 1): f about the layers' plain mean; g of s over its mean, about the n-weighted mean."""
    f = fluctuation(layer, sum(layer) / len(layer), maximum)
    pairs = [(s, n) for row, sizes in zip(linear, numel, strict=True) for s, n in zip(row, sizes, strict=True)]
    mean = sum(s for s, _ in pairs) / len(pairs)
    relative = [s / mean if mean else 0.0 for s, _ in pairs]
    total = sum(n for _, n in pairs)
    weighted = sum(s * n for s, (_, n) in zip(relative, pairs, strict=True)) / total
    g = fluctuation(relative, weighted, maximum)
    width = len(numel[0])
    return [[min(max(rate - f[i] - g[i * width + j], 0.0), 1.0) for j in range(width)] for i in range(len(layer))]


@settings(deadline=None)
@given(statistics(), st.floats(0, 1), st.floats(0, 0.5))
def test_dp_is_the_papers_formula(s, rate, maximum):
    """Layers by S_l, a sum; linears by s_lj, the same per parameter."""
    per_parameter = by_layer(s.linear_outliers / s.numel)
    wanted = rates(rate, by_layer(s.numel), s.layer_outliers.tolist(), per_parameter, maximum)
    np.testing.assert_allclose(by_layer(ALLOCATIONS["dp"].rates(rate, s, maximum)), wanted, rtol=0, atol=1e-9)


@settings(deadline=None)
@given(statistics(), st.floats(0, 1), st.floats(0, 0.5))
def test_dp_reference_is_the_same_formula_on_percentages(s, rate, maximum):
    layer = [100 * c / sum(n) for c, n in zip(s.layer_outliers, by_layer(s.numel), strict=True)]
    linear = by_layer(100 * s.linear_outliers / s.numel)
    wanted = rates(rate, by_layer(s.numel), layer, linear, maximum)
    np.testing.assert_allclose(by_layer(ALLOCATIONS["dp_reference"].rates(rate, s, maximum)), wanted, rtol=0, atol=1e-9)


@settings(deadline=None)
@given(statistics(), st.floats(0, 1), st.floats(0, 0.5))
def test_owl_is_the_layers_part_of_it(s, rate, maximum):
    share = [100 * c / sum(n) for c, n in zip(s.layer_outliers, by_layer(s.numel), strict=True)]
    f = fluctuation(share, sum(share) / len(share), maximum)
    wanted = [[min(max(rate - of_layer, 0), 1)] * len(SIZES) for of_layer in f]
    np.testing.assert_allclose(by_layer(ALLOCATIONS["owl"].rates(rate, s, maximum)), wanted, rtol=0, atol=1e-9)


@given(statistics(), st.floats(0, 1), st.floats(0, 0.5))
def test_uniform_is_the_rate(s, rate, maximum):
    assert (ALLOCATIONS["uniform"].rates(rate, s, maximum) == rate).all()


@pytest.mark.parametrize("name", ALLOCATIONS)
@given(s=statistics(), low=st.floats(0, 1), high=st.floats(0, 1), maximum=st.floats(0, 2))
def test_rates_are_in_0_to_1_and_grow_with_the_rate(name, s, low, high, maximum):
    """Of every linear: so its masks nest, and a partition is an interval of the score."""
    low, high = sorted((low, high))
    less, more = (ALLOCATIONS[name].rates(p, s, maximum) for p in (low, high))
    for table in (less, more):
        assert table.shape == s.numel.shape
        assert ((table >= 0) & (table <= 1)).all()
    assert (less <= more).all()


@pytest.mark.parametrize("name", ALLOCATIONS)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 1 / 3])
@pytest.mark.parametrize("layers", [1, 3, 7])
def test_no_fluctuation_leaves_the_rate_alone(name, share, layers):
    """No outliers, or the same share of them everywhere: rate p, not NaN and not ± max_fluctuation by rounding."""
    numel = numel_of(layers)
    same = of_layers(layers, numel * share, np.full(layers, sum(SIZES)) * share)
    np.testing.assert_allclose(ALLOCATIONS[name].rates(0.9, same, 0.08), 0.9, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["owl", "dp", "dp_reference"])
def test_more_significance_lower_rate(name):
    s = of_layers(3, numel_of(3) * 0.01, np.array([1.0, 2.0, 6.0]))
    found = np.array(by_layer(ALLOCATIONS[name].rates(0.8, s, 0.08)))
    assert (found[0] > found[1]).all()
    assert (found[1] > found[2]).all()
    np.testing.assert_allclose(found[2], 0.72, atol=1e-12)  # the largest fluctuation is max_fluctuation itself


@pytest.mark.parametrize("name", ["dp", "dp_reference"])
def test_more_significance_of_a_linear_lower_rate_of_that_linear(name):
    linear = numel_of(2) * 0.01
    linear[len(SIZES) + 4] *= 3
    found = ALLOCATIONS[name].rates(0.8, of_layers(2, linear, np.ones(2)), 0.08)
    assert found.argmin() == len(SIZES) + 4
    assert found.min() == pytest.approx(0.72)
    assert np.delete(found, found.argmin()).min() > 0.8


def survey_by_hand(base, expert, allocate: str, multiple: float) -> Statistics:
    """The outliers of every linear and layer of a float32 family, in float64."""
    layers = base.config["num_hidden_layers"]
    deltas = [abs(expert.tensors[n] - base.tensors[n]).astype(np.float64) for n in linear_names(base.config)]
    rows = [deltas[i : i + 7] for i in range(0, 7 * layers, 7)]
    numel = np.array([d.size for d in deltas], np.float64)

    def outliers(d, threshold):
        return d[d > threshold].sum() if allocate == "dp" else (d > threshold).sum()

    linear = [outliers(d, multiple * d.mean()) for d in deltas]
    layer_multiple = 3.0 if allocate == "dp_reference" else multiple
    means = [sum(d.sum() for d in row) / sum(d.size for d in row) for row in rows]
    layer = [sum(outliers(d, layer_multiple * m) for d in row) for row, m in zip(rows, means, strict=True)]
    return Statistics(np.repeat(np.arange(layers), 7), numel, np.array(linear), np.array(layer))


@pytest.mark.parametrize("multiple", [pytest.param(5.0, marks=pytest.mark.slow), 2.5])
@pytest.mark.parametrize("allocate", ["owl", "dp", "dp_reference"])
def test_survey_finds_the_outliers_and_the_merge_uses_them(allocate, multiple):
    """Rates of a whole merge against the same from statistics taken with numpy; "dp" sums, the others count."""
    base, experts = make_family(("math", "law"), "float32", num_hidden_layers=3)
    config = MergeConfig(
        ("math", "law"), method="dp", allocate=allocate, rate=0.7, significance_multiple=multiple, max_fluctuation=0.1
    )
    outcome = merge_to_arrays(base, experts, config).outcome
    for e, (expert, found) in enumerate(zip(experts.values(), outcome.statistics, strict=True)):
        wanted = survey_by_hand(base, expert, allocate, multiple)
        np.testing.assert_array_equal(found.numel, wanted.numel)
        np.testing.assert_allclose(found.linear_outliers, wanted.linear_outliers, rtol=1e-6)
        np.testing.assert_allclose(found.layer_outliers, wanted.layer_outliers, rtol=1e-6)
        numel, linear, layer = wanted.numel, wanted.linear_outliers / wanted.numel, wanted.layer_outliers
        if allocate != "dp":
            layer = layer / wanted.layer_numel
        table = rates(0.7, by_layer(numel), layer.tolist(), by_layer(linear), 0.1)
        if allocate == "owl":
            f = fluctuation(layer.tolist(), layer.mean(), 0.1)
            table = [[0.7 - of_layer] * 7 for of_layer in f]
        np.testing.assert_allclose(by_layer(outcome.rates[e, 0]), table, rtol=0, atol=1e-6)
        assert np.ptp(outcome.rates[e, 0]) > 0.1
