"""Sums step by step, norms that stay, rates of single experts, and the conventions of mergekit, against formulas."""

from collections.abc import Callable
from dataclasses import fields
from itertools import product
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from support import linear_names, make_family, merge_to_arrays

from dppa_jax.config.merge import MergeConfig, axis
from dppa_jax.config.option import options
from dppa_jax.delta.compatible import COMPATIBLE
from dppa_jax.delta.presets import METHODS
from dppa_jax.delta.scale import SCALES
from dppa_jax.delta.tied import TIES, floors

EXPERTS = ("math", "law", "code")
WEIGHTS = {"math": 0.9, "law": 0.35, "code": -0.2}
FAST = (  # the others are slow tests
    ("task_arithmetic", "weights", "float32"),
    ("ties", "weights", "bfloat16"),
    ("breadcrumbs_ties", "none", "bfloat16"),
)
CASES = [
    pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow)
    for case in product(("task_arithmetic", "ties", "breadcrumbs_ties"), ("none", "weights"), ("float32", "bfloat16"))
]
README = Path(__file__).parents[2] / "dppa_jax" / "delta" / "README.md"


@pytest.fixture(scope="module")
def family():
    """bfloat16, whose deltas tie often."""
    return make_family(EXPERTS, "bfloat16", num_hidden_layers=1)


def rounding(dtype: str) -> Callable:
    """Round as a program does that computes in a dtype: each operation in float32, its result to the dtype."""
    to = np.dtype({"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype))
    return lambda x: np.asarray(x, np.float32).astype(to).astype(np.float32)


def task_vectors(
    base: np.ndarray, deltas: list, weights: list, divide: str, elects: bool, factor: float, r
) -> np.ndarray:
    """base + λ·Σ w·δ / divisor from the formulas of golden/README.md, rounded at each step."""
    weights = [r(weight) for weight in weights]
    terms = [r(weight * delta) for weight, delta in zip(weights, deltas, strict=True)]
    sign = np.where(r(sum(terms)) >= 0, 1, -1) if elects else None
    agree = [np.sign(term) == sign if elects else np.ones(term.shape, bool) for term in terms]
    total = r(sum(np.where(a, term, np.float32(0)) for a, term in zip(agree, terms, strict=True)))
    if divide == "weights":
        divisor = r(sum(np.where(a, weight, np.float32(0)) for a, weight in zip(agree, weights, strict=True)))
        total = r(total / np.where(divisor == 0, np.float32(1), divisor))
    return r(base + r(total * np.float32(factor)))


@pytest.mark.parametrize(("method", "divide", "arithmetic"), CASES)
def test_every_step_is_rounded_to_the_dtype(family, method, divide, arithmetic):
    """What is kept is told by the deltas that the merge saves; the sum is made of them here, and by the count."""
    base, experts = family
    config = MergeConfig(
        EXPERTS,
        method=method,
        compatible="mergekit",
        coefficients=WEIGHTS,
        lambda_=0.7,
        divide=divide,
        arithmetic=arithmetic,
        output_dtype=arithmetic,
        **({"rate": 0.7} if METHODS[method].score else {}),
    )
    merge, r = merge_to_arrays(base, experts, config, deltas=True), rounding(arithmetic)
    for name in base.specs:
        start = base.tensors[name].astype(np.float32)
        kept = [merge.deltas[expert][name] for expert in EXPERTS]
        for delta, expert in zip(kept, EXPERTS, strict=True):
            whole = r(experts[expert].tensors[name].astype(np.float32) - start)
            assert ((delta == whole) | (delta == 0)).all()
            if METHODS[method].score:
                zeros = (whole == 0).sum()
                assert int(0.3 * whole.size) - zeros <= (delta != 0).sum() <= int(0.3 * whole.size)
        elects = METHODS[method].combine == "ties"
        wanted = task_vectors(start, kept, list(WEIGHTS.values()), divide, elects, 0.7, r)
        np.testing.assert_array_equal(merge.tensors[name].astype(np.float32), wanted, err_msg=name)


def test_coefficients_cancel_in_a_sum_that_is_divided_by_them(family):
    base, experts = family
    merges = [
        merge_to_arrays(
            base,
            experts,
            MergeConfig(EXPERTS, method="ties", rate=0.8, divide="weights", coefficients=dict.fromkeys(EXPERTS, c)),
        ).tensors
        for c in (0.25, 1.0)
    ]
    plain = merge_to_arrays(base, experts, MergeConfig(EXPERTS, method="ties", rate=0.8)).tensors
    for name in base.specs:
        np.testing.assert_array_equal(merges[0][name], merges[1][name])
        np.testing.assert_array_equal(merges[0][name], plain[name])


@pytest.mark.parametrize(
    ("method", "scale"), [("dare", "l1"), ("magnitude", "l1"), ("della", "l1"), ("breadcrumbs", "breadcrumbs_l1")]
)
def test_l1_leaves_the_sum_of_sizes_of_every_linear(family, method, scale):
    base, experts = family
    merge = merge_to_arrays(base, experts, MergeConfig(EXPERTS, method=method, rate=0.6, scale=scale), deltas=True)
    for i, name in enumerate(linear_names(base.config)):
        for e, expert in enumerate(EXPERTS):
            whole = experts[expert].tensors[name].astype(np.float32) - base.tensors[name].astype(np.float32)
            kept = merge.deltas[expert][name]
            mask = kept != 0
            ratio = np.abs(whole).sum(dtype=np.float64) / np.abs(whole[mask]).sum(dtype=np.float64)
            assert mask.mean() < 0.5
            np.testing.assert_allclose(kept[mask], whole[mask] * ratio, rtol=1e-6)
            assert merge.outcome.weights[e, -1, i] == pytest.approx(ratio, rel=1e-6)


def test_each_expert_has_rates_of_its_own_and_each_tensor_too(family):
    base, experts = family
    by_tensor = {name: 0.2 if "self_attn" in name else 0.6 for name in base.specs}
    config = MergeConfig(
        EXPERTS,
        method="magnitude",
        rate=0.9,
        ties="exact",
        expert_rates={"law": 0.5, "code": by_tensor},
        tensor_rates=(("up_proj", 0.7),),
    )
    merge = merge_to_arrays(base, experts, config, deltas=True)
    for name in linear_names(base.config):
        rates = {"math": 0.9, "law": 0.5, "code": by_tensor[name]}
        for expert, rate in rates.items():
            rate = 0.7 if "up_proj" in name else rate
            size = merge.deltas[expert][name].size
            zeros = (experts[expert].tensors[name] == base.tensors[name]).sum()
            kept = (merge.deltas[expert][name] != 0).sum()
            assert size - np.ceil(rate * size) - zeros <= kept <= size - np.ceil(rate * size), (name, expert)


def test_floor_counts_what_is_kept_as_mergekit_does():
    """int(d·n) of the decimals, one at least; of Breadcrumbs the int(γ·n) largest go, int(d·n) stay (golden/README)."""
    generator = np.random.default_rng(0)
    for numel in generator.integers(1, 5000, 200).tolist():
        for density in (0.2, 0.1, 0.55, 0.3333333333333333, 0.0004):
            rate = 1 - density if density == 0.3333333333333333 else round(1 - density, 12)
            [[gone]] = floors(numel, np.array([[rate]])).tolist()
            assert numel - gone == max(1, int(density * numel)), (numel, density)
            if density < 0.99:
                [[upper, lower]] = floors(numel, np.array([[1 - 0.01, rate - 0.01]])).tolist()
                top, kept = int(0.01 * numel), int(density * numel)
                assert (lower, upper) == (max(0, numel - kept - top), max(0, numel - kept - top) + kept)


@pytest.mark.parametrize("program", COMPATIBLE)
def test_every_convention_is_the_value_of_an_option_and_is_said_in_the_readme(program):
    conventions, said = COMPATIBLE[program], README.read_text()
    assert f"--compatible={program}" in said
    assert conventions.divide.keys() <= METHODS.keys()
    assert set(conventions.divide.values()) <= set(axis("divide"))
    assert {*conventions.scales, *conventions.scales.values()} <= SCALES.keys()
    assert conventions.ties in TIES
    for one in fields(conventions):
        option = {"scales": "scale"}.get(one.name, one.name)
        assert one.name == "source" or (option in options(MergeConfig) and f"(`--{option}`)" in said), one.name


def test_an_option_that_is_given_counts_more_than_the_convention():
    config = MergeConfig(EXPERTS, method="dare_ties", compatible="mergekit", scale="dare", divide="count")
    assert (config.scale, config.divide, config.arithmetic) == ("dare", "count", "inputs")


WRONG = {
    "a method that mergekit has not": ({"method": "dppa", "compatible": "mergekit"}, "not one of task_arithmetic"),
    "an unknown program": ({"method": "ties", "compatible": "mergkit"}, "Did you mean 'mergekit'"),
    "a rate above 1": ({"method": "ties", "expert_rates": {"law": 1.2}}, "expert_rate law: rate 1.2"),
    "an unknown expert": ({"method": "ties", "expert_rates": {"lax": 0.2}}, "Did you mean 'law'"),
    "nothing to prune": ({"method": "task_arithmetic", "expert_rates": {"law": 0.2}}, "prunes nothing"),
    "partitions": ({"method": "dppa", "expert_rates": {"law": 0.2}}, "in common"),
    "lambda that is no number": ({"method": "ties", "lambda_": float("nan")}, "--lambda: nan"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_combinations_are_refused(wrong):
    given, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        MergeConfig(EXPERTS, **given)
