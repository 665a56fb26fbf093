"""The exact order statistic: sorted(scores)[int(n·rate)], for any numbers, any rate and any sample."""

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import from_linears, merge_to_arrays

from dppa_jax.config.merge import MergeConfig
from dppa_jax.delta.score import bound_above, random_bound
from dppa_jax.delta.threshold import BOUNDS, index, order_statistics

RATES = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0, np.nextafter(1, 0), 1e-9]))
MOST_READS = 64  # of a rank; a search that does no better than halving 2³² keys takes 32


class TestOrderStatistics:
    """The search alone, with counts from numpy."""

    @staticmethod
    def search(keys: np.ndarray, ranks: np.ndarray, sample: np.ndarray):
        reads = 0

        def count(bounds):
            nonlocal reads
            reads += 1
            assert bounds.shape == (len(keys), BOUNDS)
            assert reads <= MOST_READS * ranks.shape[1], "the search does not end"
            return np.stack([[(row >= bound).sum() for bound in b] for row, b in zip(keys, bounds, strict=True)])

        return order_statistics(count, keys.shape[1], ranks, sample)

    @settings(max_examples=100, deadline=None)
    @given(st.data())
    def test_equals_sorting(self, data):
        numel, problems = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 3))
        word = st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 2**31, 2**32 - 2, 2**32 - 1]))
        few = data.draw(st.lists(word, min_size=1, max_size=4))  # so that ties are common
        kinds = [word, st.sampled_from(few), st.integers(0, 3), st.integers(2**31, 2**31 + 20)]
        rows = st.lists(data.draw(st.sampled_from(kinds)), min_size=numel, max_size=numel)
        keys = np.array([data.draw(rows) for _ in range(problems)], np.uint32)
        ranks = np.array([[data.draw(st.integers(0, numel - 1)) for _ in range(3)] for _ in keys])
        sampled = data.draw(st.lists(st.integers(0, numel - 1), min_size=1, max_size=numel))

        found, below, through = self.search(keys, ranks, keys[:, sampled])

        wanted = np.take_along_axis(np.sort(keys, axis=1), ranks, axis=1)
        np.testing.assert_array_equal(found, wanted)
        for counted, side in ((below, np.less), (through, np.less_equal)):
            counts = [[side(row, t).sum() for t in thresholds] for row, thresholds in zip(keys, wanted, strict=True)]
            np.testing.assert_array_equal(counted, counts)

    @pytest.mark.parametrize("sample", ["of other numbers", "of one number", "of the largest", "of everything"])
    def test_a_misleading_sample_costs_reads_and_never_exactness(self, sample):
        generator = np.random.default_rng(0)
        keys = generator.integers(0, 2**32, (2, 5000), dtype=np.uint32)
        samples = {
            "of other numbers": generator.integers(0, 2**20, (2, 100), dtype=np.uint32),
            "of one number": np.full((2, 100), 7, np.uint32),
            "of the largest": np.sort(keys, axis=1)[:, -100:],
            "of everything": keys,
        }
        ranks = np.array([[0, 10, 2500, 4500, 4999]] * 2)
        found = self.search(keys, ranks, samples[sample]).keys
        np.testing.assert_array_equal(found, np.sort(keys, axis=1)[:, ranks[0]])

    def test_a_sample_of_a_coarse_grid_is_found_in_two_reads(self):
        """What deltas of bfloat16 weights look like: few distinct values, each in the sample."""
        keys = np.random.default_rng(0).geometric(0.05, (1, 50_000)).astype(np.uint32) << 16
        reads = []

        def count(bounds):
            reads.append(bounds)
            return np.stack([[(keys[0] >= bound).sum() for bound in bounds[0]]])

        order_statistics(count, keys.shape[1], np.array([[45_000]]), keys[:, ::50])
        assert len(reads) <= 2


@given(st.integers(1, 2**33), RATES)
@example(10, 1.0)
@example(1, 0.0)
def test_index_is_the_authors_int_of_n_times_rate_within_the_list(numel, rate):
    found = int(index(numel, rate))
    assert found == min(int(numel * rate), numel - 1)


@given(st.floats(0, 2.0**127, width=32))
def test_bound_above_separates_a_threshold_from_the_next_float(threshold):
    threshold = np.float32(threshold)
    above = np.nextafter(threshold, np.float32(np.inf))
    assert threshold.view(np.uint32) < bound_above(threshold) <= above.view(np.uint32)


@given(RATES)
def test_random_bound_keeps_u_at_or_above_rate(rate):
    """u = key/2³² ≥ rate exactly, in integers; at rate 1 one key of 2³² is above every bound."""
    bound = int(random_bound(np.array(rate)))
    if rate < 1 - 2.0**-32:
        assert bound / 2**32 >= rate
        assert bound == 0 or (bound - 1) / 2**32 < rate
    else:
        assert bound == 2**32 - 1


SHAPES = {"hidden_size": 6, "intermediate_size": 11, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 4}
SIZES = [12 * 6, 4 * 6, 4 * 6, 6 * 12, 11 * 6, 11 * 6, 6 * 11]  # of the seven linears
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
KINDS = ("normal", "grid", "ties", "zeros", "all zero", "all equal", "one outlier", "wide", "denormal")


def adversarial(kind: str, size: int, dtype, generator: np.random.Generator) -> np.ndarray:
    info = ml_dtypes.finfo(dtype)
    normal = generator.normal(0, 0.01, size)
    values = {
        "normal": normal,
        "grid": np.rint(normal * 300) / 256,
        "ties": generator.choice([-0.5, 0.5, -0.25, 0.25, 1.0], size),
        "zeros": np.where(generator.random(size) < 0.8, generator.choice([0.0, -0.0], size), normal),
        "all zero": np.zeros(size),
        "all equal": np.full(size, -0.375),
        "one outlier": np.where(np.arange(size) == size // 2, 1e4, 1e-3 * normal),
        "wide": normal * 10.0 ** generator.uniform(-4, 4, size),
        "denormal": generator.integers(-9, 10, size) * float(info.smallest_subnormal),
    }
    return values[kind].astype(dtype)


def magnitude_on_device(delta: np.ndarray) -> np.ndarray:
    """|δ| in float32; XLA on a CPU takes float32's denormals for zero."""
    magnitude = abs(delta.astype(np.float32))
    if jax.default_backend() == "cpu":
        magnitude[magnitude < np.finfo(np.float32).tiny] = 0
    return magnitude


def check_thresholds(deltas: list[np.ndarray], rate: float, dtype, **shapes) -> None:
    base, expert, names = from_linears(deltas, dtype, **shapes)
    config = MergeConfig(("e",), method="magnitude", rate=rate, ties="drop")
    merge = merge_to_arrays(base, {"e": expert}, config, deltas=True)
    for j, name in enumerate(names):
        delta = expert.tensors[name]
        magnitude = magnitude_on_device(delta)
        threshold = np.sort(magnitude, axis=None)[index(delta.size, rate)] if rate else -1.0
        kept = magnitude > threshold
        assert merge.outcome.thresholds[0, 0, j] == threshold, name
        assert round(merge.outcome.densities[0, 0, j] * delta.size) == kept.sum(), name
        np.testing.assert_array_equal(merge.deltas["e"][name], np.where(kept & (magnitude > 0), delta, 0), err_msg=name)


class TestOnTheDevice:
    """A whole merge of one expert: sample, counts, search, mask."""

    @pytest.mark.parametrize(
        "dtype", [pytest.param(dtype, marks=[] if dtype == "float32" else pytest.mark.slow) for dtype in DTYPES]
    )
    @settings(max_examples=25, deadline=None)
    @given(kinds=st.tuples(*[st.sampled_from(KINDS)] * 7), rate=RATES, seed=st.integers(0, 2**32 - 1))
    @example(kinds=KINDS[:7], rate=0.0, seed=0)
    @example(kinds=KINDS[:7], rate=1.0, seed=0)
    @example(kinds=KINDS[2:], rate=0.0, seed=0)
    @example(kinds=KINDS[2:], rate=1.0, seed=0)
    @example(kinds=("denormal",) * 7, rate=0.5, seed=0)
    def test_thresholds_counts_and_masks_equal_numpy(self, dtype, kinds, rate, seed):
        generator = np.random.default_rng(seed)
        deltas = [adversarial(k, n, DTYPES[dtype], generator) for k, n in zip(kinds, SIZES, strict=True)]
        check_thresholds(deltas, rate, DTYPES[dtype], **SHAPES)

    @pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
    def test_linears_of_one_element(self, rate):
        ones = {"hidden_size": 1, "intermediate_size": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
        values = [np.array([v]) for v in (0.5, -0.5, 0.0, -0.0, 1e30, -1e-30, 1e-45)]
        check_thresholds(values, rate, np.float32, **ones)

    @pytest.mark.parametrize(
        ("dtype", "rate"),
        [
            pytest.param(dtype, rate, marks=[] if (dtype, rate) == ("bfloat16", 0.9) else pytest.mark.slow)
            for dtype in DTYPES
            for rate in (0.3, 0.9, 0.999)
        ],
    )
    def test_linears_larger_than_the_sample(self, dtype, rate):
        """Sampled at a quarter of their columns."""
        shapes = {"hidden_size": 512, "intermediate_size": 515, "num_attention_heads": 1, "num_key_value_heads": 1}
        sizes = [512 * 512] * 4 + [512 * 515] * 3
        generator = np.random.default_rng(1)
        deltas = [adversarial(k, n, DTYPES[dtype], generator) for k, n in zip(KINDS[:7], sizes, strict=True)]
        deltas[3] = np.tile(np.where(np.arange(512) % 4, generator.normal(size=512), 0), 512).astype(DTYPES[dtype])
        check_thresholds(deltas, rate, DTYPES[dtype], **shapes)
