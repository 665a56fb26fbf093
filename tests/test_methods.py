"""The table of presets against the table of properties; that the bits are the same on 8 devices is in test_bits.py."""

from collections.abc import Iterable, Iterator
from functools import cache

import jax
import ml_dtypes
import numpy as np
import pytest
from support import (
    AWKWARD,
    MemorySource,
    Merge,
    assert_same_bits,
    experts_of,
    given_out,
    linear_names,
    make_family,
    merge_to_arrays,
    random_grams,
    random_norms,
    same_bits,
)

from dppa_jax.config.merge import MergeConfig
from dppa_jax.delta.combine import COMBINATIONS
from dppa_jax.delta.presets import METHODS
from dppa_jax.delta.scale import SCALES
from dppa_jax.delta.score import SCORES
from dppa_jax.merging.merger import Layout

EXPERTS = ("math", "law")
PRUNING = [method for method in METHODS if METHODS[method].score]
SUMMING = [method for method in METHODS if METHODS[method].combine == "sum"]
WHOLE = [method for method in METHODS if COMBINATIONS[METHODS[method].combine].whole]
SUMS_AND_TIES = [method for method in METHODS if METHODS[method].combine in ("sum", "ties")]
RANDOM = [method for method in PRUNING if SCORES[METHODS[method].score].random]
ELEMENTWISE = [method for method in RANDOM if SCORES[METHODS[method].score].draws is None]  # each has its own number
FAST = ("task_arithmetic", "dppa", "dare_ties", "slerp")
"""Between them: no score, a ranked and a random one; sums, TIES, and whole tensors."""


def some_slow(methods: Iterable[str], fast: tuple[str, ...] = FAST) -> list:
    return [pytest.param(method, marks=[] if method in fast else pytest.mark.slow) for method in methods]


def family(layers: int = 2, seed: int = 0, **shape) -> tuple[MemorySource, dict[str, MemorySource]]:
    """Linears in bfloat16, norms in float32, embeddings and head in float16; experts in float32."""
    base, experts = make_family(EXPERTS, "float32", seed, num_hidden_layers=layers, **AWKWARD | shape)

    def stored(name: str, array: np.ndarray) -> np.ndarray:
        return array.astype(np.float32 if "norm" in name else ml_dtypes.bfloat16 if "layers" in name else np.float16)

    return MemorySource(base.config, {name: stored(name, array) for name, array in base.tensors.items()}), experts


def configure(method: str, rate: float = 0.8, **more) -> MergeConfig:
    """Without fluctuation and amplification, so that what a method gives at a rate can be said exactly."""
    experts = experts_of(method, EXPERTS)
    if SCALES[METHODS[method].scale].takes_q:
        more.setdefault("q", dict.fromkeys(experts, (1 - rate) or 0.1))
    return MergeConfig(experts, method=method, rate=rate, **{"max_fluctuation": 0.0} | more)


@cache
def merged(method: str, rate: float = 0.8, seed: int = 0) -> Merge:
    base, experts = family()
    return merge_family(configure(method, rate, seed=seed), base, experts, deltas=True)


def merge_family(config: MergeConfig, base: MemorySource, experts: dict[str, MemorySource], **more) -> Merge:
    experts = {name: experts[name] for name in config.experts}
    seen = {"norms": random_norms(base, experts), "input_grams": given_out(random_grams(base, experts))}
    return merge_to_arrays(base, experts, config, layout=Layout(1), **seen, **more)


def linears() -> list[str]:
    return linear_names(family()[0].config)


def untrimmed_ties() -> dict[str, np.ndarray]:
    base, experts = family()
    found = {}
    for name, array in base.tensors.items():
        start = array.astype(np.float32)
        deltas = np.stack([expert.tensors[name] - start for expert in experts.values()])
        elected = np.where(deltas.sum(axis=0) >= 0, 1, -1)
        agree = deltas * elected > 0
        mean = np.where(agree, deltas, 0).sum(axis=0) / np.maximum(agree.sum(axis=0, dtype=np.float32), 1)
        found[name] = (start + mean).astype(array.dtype)
    return found


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Grows by one for everything that XLA compiles during the test."""
    seen: list[str] = []

    def listen(event: str, duration: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("method", some_slow(METHODS))
class TestEveryMethod:
    def test_every_tensor_keeps_the_bases_dtype(self, method):
        base, _ = family()
        found = {name: array.dtype for name, array in merged(method).tensors.items()}
        assert found == {name: array.dtype for name, array in base.tensors.items()}
        assert set(found.values()) == {np.dtype(d) for d in (np.float32, np.float16, ml_dtypes.bfloat16)}

    def test_output_dtype_is_that_of_all_tensors_and_delta_dtype_that_of_the_deltas(self, method):
        base, experts = family()
        config = configure(method, output_dtype="float16", delta_dtype="bfloat16")
        merge = merge_family(config, base, experts, deltas=True)
        assert {array.dtype for array in merge.tensors.values()} == {np.dtype(np.float16)}
        assert {a.dtype for d in merge.deltas.values() for a in d.values()} == {np.dtype(ml_dtypes.bfloat16)}

    def test_nothing_is_compiled_again_for_another_block_number_or_model(self, method, compilations):
        """One compilation per shape of a matrix serves more layers, other weights, rates, coefficients and seeds."""
        base, experts = family(2)
        merge_family(configure(method), base, experts)
        compilations.clear()
        base, experts = family(5, seed=1)
        other = configure(method, 0.75, coefficients={"math": 0.3}, seed=9, **partitions(method, (0.9, 0.75)))
        merge_family(other, base, experts)
        assert compilations == []

    def test_rate_0_prunes_nothing(self, method):
        """Sums are task arithmetic, with factors 1 and 1/(1−p) = 1 alike; TIES elects and averages untrimmed deltas."""
        if method not in SUMS_AND_TIES:
            assert method not in PRUNING
            return
        wanted = merged("task_arithmetic").tensors if method in SUMMING else untrimmed_ties()
        assert_same_bits(merged(method, 0.0).tensors, wanted, method)
        for expert in EXPERTS:
            assert_same_bits(merged(method, 0.0).deltas[expert], merged("task_arithmetic").deltas[expert], expert)

    def test_rate_1_leaves_the_bases_linears(self, method):
        """And the dense tensors of rate 0. Task arithmetic has no rate."""
        base, _ = family()
        found, dense = merged(method, 1.0), merged(method, 0.0)
        for name in base.tensors:
            wanted = base if name in linears() and method in PRUNING else dense
            assert same_bits(found.tensors[name], wanted.tensors[name]), name

    def test_experts_equal_to_the_base_leave_it_as_it_is(self, method):
        """No delta, no outliers, no fluctuation: nothing is divided by zero.

        The coefficients of whole tensors are rounded to float32, so that their sum is 1 but for its last bit.
        """
        base, _ = family()
        same = MemorySource(base.config, {name: array.astype(np.float32) for name, array in base.tensors.items()})
        merge = merge_family(configure(method, max_fluctuation=0.08), base, dict.fromkeys(EXPERTS, same))
        if method in WHOLE:
            for name, array in base.tensors.items():
                wanted = array.astype(np.float32)
                np.testing.assert_allclose(merge.tensors[name].astype(np.float32), wanted, rtol=2.0**-22, err_msg=name)
        else:
            assert_same_bits(merge.tensors, base.tensors, method)
        if method in PRUNING:
            assert (merge.outcome.rates == np.reshape(configure(method).rates, (1, -1, 1))).all()

    @pytest.mark.parametrize("rate", [0.0, 1.0])
    def test_with_fluctuation_rates_stay_in_0_to_1_and_weights_finite(self, method, rate):
        base, experts = family()
        outcome = merge_family(configure(method, rate, max_fluctuation=0.3), base, experts).outcome
        assert ((outcome.rates >= 0) & (outcome.rates <= 1)).all()
        assert np.isfinite(outcome.weights).all()
        assert np.isfinite(outcome.thresholds).all()

    def test_dense_tensors_are_not_pruned(self, method):
        base, experts = family()
        for name in base.tensors.keys() - set(linears()):
            for expert, delta in merged(method).deltas.items():
                dense = experts[expert].tensors[name] - base.tensors[name].astype(np.float32)
                np.testing.assert_array_equal(delta[name], dense, err_msg=name)


def test_dare_with_dpa_is_dare_where_every_factor_is_that_of_dare():
    factors = dict.fromkeys(EXPERTS, (1 / (1 - 0.8),) * 2)
    plain, amplified = merged("dare"), merge_to_arrays(*family(), configure("dare_dpa", factors=factors), deltas=True)
    for expert in EXPERTS:
        for name, delta in plain.deltas[expert].items():
            np.testing.assert_array_equal(amplified.deltas[expert][name], delta, err_msg=name)


def test_factors_of_dare_with_dpa_scale_dense_tensors_by_what_they_change():
    base, experts = family()
    halved = dict.fromkeys(EXPERTS, (0.5 / (1 - 0.8),) * 2)
    for expert, delta in merge_to_arrays(
        base, experts, configure("dare_dpa", factors=halved), deltas=True
    ).deltas.items():
        for name in base.tensors.keys() - set(linears()):
            dense = experts[expert].tensors[name] - base.tensors[name].astype(np.float32)
            np.testing.assert_array_equal(delta[name], np.float32(0.5) * dense, err_msg=name)


def test_the_counter_of_compilations_counts(compilations):
    base, experts = family(1, hidden_size=17)
    merge_to_arrays(base, experts, configure("task_arithmetic"))
    assert compilations


def partitions(method: str, rates: tuple[float, ...], **factors) -> dict:
    return {"partitions": rates, **factors} if SCALES[METHODS[method].scale].takes_factors else {}


def kept_share(merge: Merge) -> float:
    """A partition is what is between its rate and the next higher one; one of weight 0 is dropped, too."""
    rates = merge.outcome.rates
    higher = np.concatenate([np.ones_like(rates[:, :1]), rates[:, :-1]], axis=1)
    return float(((higher - rates) * (merge.outcome.weights != 0)).sum(axis=1).mean())


@pytest.mark.parametrize("method", some_slow(PRUNING))
def test_masks_nest_and_grow_with_the_density(method):
    """What is kept at 0.9 is kept at 0.7, in every linear and with the rates that the method allocates."""
    base, experts = family()
    kept = None
    for rate in (0.97, 0.9, 0.7, 0.4):
        single = partitions(method, (rate,), factors=dict.fromkeys(EXPERTS, (1.0,)))
        merge = merge_family(configure(method, rate, max_fluctuation=0.08, **single), base, experts, deltas=True)
        masks = {(e, name): merge.deltas[e][name] != 0 for e in EXPERTS for name in linears()}
        densities = np.array([mask.mean() for mask in masks.values()])
        assert densities.mean() == pytest.approx(kept_share(merge), abs=0.01)
        if kept is not None:
            assert sum(mask.sum() for mask in masks.values()) > sum(mask.sum() for mask in kept.values())
            for where, mask in masks.items():
                assert not (kept[where] & ~mask).any(), where
        kept = masks


@pytest.mark.parametrize(
    "method", some_slow(method for method in METHODS if SCALES[METHODS[method].scale].takes_factors)
)
def test_a_partition_is_what_one_rate_keeps_and_the_next_higher_drops(method):
    base, experts = family()
    rates, factors = (0.9, 0.7, 0.4), (1.0, 2.0, -4.0)

    def deltas(rates, factors):
        more = {"partitions": rates, "factors": dict.fromkeys(EXPERTS, factors), "max_fluctuation": 0.08}
        config = configure(method, rates[-1], **more)
        return merge_to_arrays(base, experts, config, deltas=True).deltas

    found = deltas(rates, factors)
    alone = [deltas((rate,), (1.0,)) for rate in rates]
    for expert in EXPERTS:
        for name in linears():
            wanted = np.zeros_like(found[expert][name])
            for factor, of_rate in reversed(list(zip(factors, alone, strict=True))):
                wanted = np.where(of_rate[expert][name] != 0, np.float32(factor) * of_rate[expert][name], wanted)
            np.testing.assert_array_equal(found[expert][name], wanted, err_msg=name)


@pytest.mark.parametrize("rate", [pytest.param(0.5, marks=pytest.mark.slow), 0.9])
@pytest.mark.parametrize("method", some_slow([m for m in ELEMENTWISE if m in SUMMING], ("darex_q",)))
def test_expected_delta_is_the_delta(method, rate):
    """Over 16 seeds, within 5 sigma for every linear, rescaled by 1/(1−p), by its factors, or by 1/q with q = 1−p."""
    base, experts = family()
    seeds = [merged(method, rate, seed).deltas["math"] for seed in range(16)]
    for name in linears():
        delta = (experts["math"].tensors[name] - base.tensors[name].astype(np.float32)).astype(np.float64)
        share = np.mean([(of_seed[name] * np.sign(delta)).sum() for of_seed in seeds]) / abs(delta).sum()
        sigma = np.sqrt(rate / (1 - rate) * np.square(delta).sum() / len(seeds)) / abs(delta).sum()
        assert abs(share - 1) < 5 * sigma < 0.25, name


@pytest.mark.parametrize("method", some_slow(RANDOM))
def test_random_weights_are_0_at_rate_1(method):
    """No bound of 32 bits is above the largest random number, one in 2³²; what it would keep weighs nothing."""
    assert (merged(method, 1.0).outcome.weights == 0).all()


WRONG = {
    "scale q without q": ({"method": "dare", "scale": "q"}, "--q"),
    "partitions without partition factors": ({"method": "dp", "partitions": (0.9, 0.8), "rate": 0.8}, "--partitions"),
    "factors without partitions": ({"method": "magnitude", "factors": {"math": (1.0,)}}, "--factors"),
    "as many factors as partitions": ({"method": "dppa", "rate": 0.8, "factors": {"math": (1.8,)}}, "2 partitions"),
    "partitions that do not end at the rate": ({"method": "dppa", "rate": 0.7, "partitions": (0.9, 0.8)}, "--rate=0.7"),
    "partitions in rising order": ({"method": "dppa", "rate": 0.9, "partitions": (0.8, 0.9)}, "highest first"),
    "the same partition twice": ({"method": "dppa", "rate": 0.9, "partitions": (0.9, 0.9)}, "highest first"),
    "q for one of two experts": ({"method": "darex_q", "q": {"math": 0.2}}, "each of them"),
    "q of a linear above 1": ({"method": "darex_q", "q": {"math": {"a": 1.5}, "law": 0.1}}, "math a=1.5: outside"),
    "rows that are rescaled": (
        {"method": "darex_q", "score": "random_row", "q": {"math": 1, "law": 1}},
        "whole outputs",
    ),
    "random numbers ranked by row": ({"method": "dare", "compare": "row"}, "ranks nothing"),
    "columns ranked by row": ({"method": "magnitude", "score": "column", "compare": "row"}, "as a whole"),
    "ties of neurons": ({"method": "magnitude", "score": "group", "ties": "keep"}, "the first of equal heads"),
    "neurons whose linears have several rates": ({"method": "dp", "score": "group"}, "rates of their own"),
    "ties within rows": ({"method": "wanda", "compare": "row", "ties": "keep"}, "the first ones of equal score"),
    "q of zero": ({"method": "darex_q", "q": {"math": 0.0, "law": 0.1}}, "outside"),
    "a scale without a score": ({"method": "task_arithmetic", "scale": "dare"}, "--score"),
    "an allocation without a score": ({"method": "task_arithmetic", "allocate": "dp"}, "--score"),
    "an unknown preset": ({"method": "dpa"}, "Did you mean 'dppa'"),
    "an unknown score": ({"method": "dppa", "score": "magnitud"}, "Did you mean 'magnitude'"),
    "an unknown allocation": ({"method": "dppa", "allocate": "dp_refrence"}, "Did you mean 'dp_reference'"),
    "an unknown scale": ({"method": "dppa", "scale": "partitions"}, "Did you mean 'partition'"),
    "an unknown combination": ({"method": "dppa", "combine": "tie"}, "Did you mean 'ties'"),
    "an unknown dpa_combine": ({"method": "dppa", "dpa_combine": "maximum"}, "highest, max"),
    "an expert that is not there": ({"method": "dare", "coefficients": {"maths": 0.5}}, "Did you mean 'math'"),
    "a rate above 1": ({"method": "dare", "rate": 1.1}, "outside"),
    "a rate below 0": ({"method": "dare", "rate": -0.1}, "outside"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_combinations_raise_and_say_what_is_right(wrong):
    given, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        MergeConfig(EXPERTS, **given)
