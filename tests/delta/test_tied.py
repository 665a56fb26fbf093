"""--ties: elements that tie at a threshold are all dropped, all kept, or exactly as many as the rate asks for."""

import shutil
from errno import ENOSPC
from math import ceil

import numpy as np
import pytest
from absl import logging as absl_logging
from families import edit_tensors, read_json
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import (
    ONE_DEVICE,
    MemorySink,
    MemorySource,
    Merge,
    assert_same_bits,
    coarse_family,
    from_linears,
    merge_to_arrays,
    random_norms,
)

from dppa_jax.architecture.specs import linears_of
from dppa_jax.config.merge import MergeConfig
from dppa_jax.delta.allocate import ALLOCATIONS
from dppa_jax.delta.presets import METHODS
from dppa_jax.delta.score import SCORES, hashed
from dppa_jax.delta.threshold import BOUNDS, Thresholds, cuts, index
from dppa_jax.delta.tied import TIES, chosen, floors, place_words
from dppa_jax.merging.bounds import Pruner
from dppa_jax.merging.kept import tell_of_ties
from dppa_jax.merging.merger import Layout, Merger, kernels_of
from dppa_jax.runtime.journal import Journal
from dppa_jax.runtime.mesh import make_mesh

EXPERTS = ("math", "law")
RANDOM = [score for score in SCORES if SCORES[score].random]
RANKING = [name for name, method in METHODS.items() if method.score and method.score not in RANDOM]
SHAPES = {"hidden_size": 6, "intermediate_size": 11, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 4}
SIZES = [12 * 6, 4 * 6, 4 * 6, 6 * 12, 11 * 6, 11 * 6, 6 * 11]
RATES = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 0.9, 1.0, np.nextafter(1, 0), 1e-9]))


# ---- the places of elements


def test_no_two_elements_of_a_tensor_share_a_place_and_places_are_spread_evenly():
    """Whatever rows a process has: words of rows 0 to 300 are those of 0 to 100 and 100 to 300."""
    words = place_words("math", "q", 0, 300, 401)
    halves = [place_words("math", "q", *rows, 401) for rows in ((0, 100), (100, 300))]
    np.testing.assert_array_equal(words, np.concatenate(halves))
    found = hashed(words, np.arange(401)[None])
    assert len(np.unique(found)) == found.size
    shares = np.bincount(found.reshape(-1) >> 26, minlength=64) / found.size
    assert abs(shares * 64 - 1).max() < 5 * np.sqrt(64 / found.size)
    others = [hashed(place_words(*other, 0, 300, 401), np.arange(401)[None]) for other in (("law", "q"), ("math", "k"))]
    for other in others:
        assert abs(np.corrcoef(found.reshape(-1), other.reshape(-1))[0, 1]) < 5 / np.sqrt(found.size)


# ---- the search for the cut, with counts from numpy


@pytest.mark.parametrize("tied", [2, 3, 100, 10_000, 300_000])
def test_a_cut_drops_exactly_as_many_in_a_few_reads(tied):
    generator = np.random.default_rng(tied)
    numel, below = tied + 900, 500
    keys = np.concatenate([np.full(below, 3), np.full(tied, 5), np.full(numel - below - tied, 9)])
    place = hashed(place_words("math", "q", 0, 1, numel), np.arange(numel)[None])[0]
    pairs = np.sort(keys.astype(np.uint64) << np.uint64(32) | place)
    dropped = np.array([[below, below + tied, below + 1, below + tied - 1, below + int(generator.integers(tied))]])
    reads = []

    def count(bounds):
        assert bounds.shape == (1, BOUNDS, 2)
        reads.append(bounds)
        assert len(reads) < 60, "the search does not end"
        first, second = np.moveaxis(bounds.astype(np.uint64), -1, 0)
        return numel - np.searchsorted(pairs, (first << np.uint64(32)) | second)

    found = Thresholds(*(np.full(dropped.shape, x) for x in (np.uint32(5), below, below + tied)))
    cut = cuts(count, numel, found, dropped)
    gone = [(keys < 5).sum() + ((keys == 5) & (place < c)).sum() for c in cut[0, 2:]]
    np.testing.assert_array_equal(gone, dropped[0, 2:])
    np.testing.assert_array_equal(cut[0, :2], 0)
    assert len(reads) <= 20  # for three ranks, two at a time: some seven reads each


# ---- whole merges against sorting in numpy


def ranked(size: np.ndarray, expert: str, tensor: str) -> np.ndarray:
    """The place of each element in the order of (size, hash of its place), from 0."""
    place = hashed(place_words(expert, tensor, 0, *size.shape), np.arange(size.shape[1])[None])
    order = np.lexsort((place.reshape(-1), size.reshape(-1)))
    ranks = np.empty(size.size, np.int64)
    ranks[order] = np.arange(size.size)
    return ranks.reshape(size.shape)


def kept(ties: str, size: np.ndarray, rate: float, expert: str, tensor: str) -> np.ndarray:
    if rate in (0, 1):
        return np.full(size.shape, rate == 0)
    threshold = np.sort(size, axis=None)[index(size.size, rate)]
    exact = ranked(size, expert, tensor) >= ceil(size.size * rate)
    if ties == "auto":
        far = (size > threshold).sum() < 0.75 * exact.sum() and threshold > 0
        ties = "exact" if far else "drop"
    floor = ranked(size, expert, tensor) >= floors(size.size, np.array([[rate]]))[0, 0]
    return {"drop": size > threshold, "keep": size >= threshold, "exact": exact, "floor": floor}[ties]


KINDS = {
    "one bit": lambda generator, size: generator.choice([-0.25, 0.25], size),
    "few": lambda generator, size: generator.choice([-0.5, 0.5, 0.25, 1.0, 0.0], size),
    "no ties": lambda generator, size: generator.permutation(size) + 1.0,
    "zeros": lambda generator, size: np.where(generator.random(size) < 0.8, 0.0, generator.permutation(size) + 1.0),
}


@pytest.mark.parametrize("ties", TIES)
@settings(max_examples=6, deadline=None)
@given(kinds=st.tuples(*[st.sampled_from(list(KINDS))] * 7), rate=RATES, seed=st.integers(0, 2**32 - 1))
@example(kinds=("one bit",) * 7, rate=0.5, seed=0)
@example(kinds=("no ties",) * 7, rate=0.5, seed=0)
@example(kinds=("few",) * 7, rate=1.0, seed=0)
def test_masks_and_densities_equal_sorting(ties, kinds, rate, seed):
    generator = np.random.default_rng(seed)
    deltas = [KINDS[kind](generator, size) for kind, size in zip(kinds, SIZES, strict=True)]
    base, expert, names = from_linears(deltas, np.float32, **SHAPES)
    merge = merge_to_arrays(
        base, {"e": expert}, MergeConfig(("e",), method="magnitude", rate=rate, ties=ties), deltas=True
    )
    for j, name in enumerate(names):
        delta = expert.tensors[name]
        wanted = kept(ties, abs(delta), rate, "e", name)
        np.testing.assert_array_equal(merge.deltas["e"][name], np.where(wanted, delta, 0), err_msg=name)
        assert round(merge.outcome.densities[0, 0, j] * delta.size) == wanted.sum(), name
        if ties == "exact":
            assert wanted.sum() == delta.size - ceil(delta.size * rate), name


def coarse() -> tuple[MemorySource, dict[str, MemorySource]]:
    return coarse_family(EXPERTS, num_hidden_layers=2, **SHAPES)


def merged(mesh: str = ONE_DEVICE, block_layers: int = 1, **given) -> Merge:
    base, experts = coarse()
    config = MergeConfig(EXPERTS, ties="exact", **{"rate": 0.7, "method": "magnitude", **given})
    return merge_to_arrays(
        base,
        experts,
        config,
        mesh,
        Layout(block_layers, resident=block_layers > 1),
        True,
        norms=random_norms(base, EXPERTS),
    )


Q = {name: {"q": {"math": 0.5, "law": 0.5}} for name in RANKING if name.endswith("_q")}  # which have no default
GIVEN = {name: {"method": name} | Q.get(name, {}) for name in RANKING} | {
    score: {"score": score}
    for score in SCORES
    if not SCORES[score].sums  # which drop a number of units, without a threshold
}
GIVEN = {name: given for name, given in GIVEN.items() if name not in RANDOM}
FAST = ("dppa", "breadcrumbs_ties", "row")  # the others do what these do


@pytest.mark.parametrize(
    "given", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in GIVEN]
)
def test_exact_keeps_as_many_as_are_allocated_by_every_preset_and_score(given):
    """Also of rows and columns, whose elements tie by design: one of them is cut through."""
    outcome = merged(**GIVEN[given]).outcome
    numel = outcome.linears.numel
    np.testing.assert_array_equal(np.rint(outcome.densities * numel), numel - np.ceil(numel * outcome.rates))
    assert outcome.rates.max() > 0.6


def test_exact_partitions_take_the_factor_of_the_highest_rate_that_keeps_them():
    factors, rates = {"math": (2.0, 3.0, 5.0), "law": (3.0, 5.0, 2.0)}, (0.9, 0.8, 0.7)
    merge = merged(method="dppa", factors=factors, max_fluctuation=0.0)
    for expert, source in coarse()[1].items():
        for name in merge.outcome.linears.names:
            delta, wanted = source.tensors[name], 0
            for rate, factor in reversed(list(zip(rates, factors[expert], strict=True))):
                wanted = np.where(kept("exact", abs(delta), rate, expert, name), np.float32(factor) * delta, wanted)
            np.testing.assert_array_equal(merge.deltas[expert][name], wanted, err_msg=name)


@pytest.mark.parametrize("method", ["magnitude", pytest.param("ties", marks=pytest.mark.slow)])
def test_exact_has_the_same_bits_on_any_mesh_and_in_any_block(method):
    wanted, found = merged(method=method), merged("layer=4,row=2", 2, method=method)
    assert_same_bits(found.tensors, wanted.tensors)
    np.testing.assert_array_equal(found.outcome.densities, wanted.outcome.densities)


def test_a_merge_that_goes_on_has_the_tables_of_one_that_did_not_stop(tmp_path):
    (base, experts), wanted = coarse(), merged()
    shapes = {name: array.shape for name, array in wanted.tensors.items()}
    config = MergeConfig(EXPERTS, method="magnitude", rate=0.7, ties="exact")

    def merge(sink: MemorySink, keep: bool) -> Merger:
        journal = Journal(tmp_path / "journal", keep)
        merger = Merger(base, experts, config, make_mesh(ONE_DEVICE), Layout(1), quiet=True, journal=journal)
        merger(sink)
        return merger

    class Full(MemorySink):
        def write_rows(self, name, start, rows):
            if len(self.rows) == 6:
                raise OSError(ENOSPC, "full")
            super().write_rows(name, start, rows)

    class Filled(MemorySink):
        def has_rows(self, name, start, stop):
            return start in first.rows.get(name, {})

    first, second = Full(), Filled()
    with pytest.raises(OSError, match="full"):
        merge(first, keep=False)
    resumed = merge(second, keep=True)
    assert first.rows.keys() - second.rows.keys()
    second.rows = first.rows | second.rows
    assert_same_bits(second.arrays(shapes), wanted.tensors)
    np.testing.assert_array_equal(resumed._pruner.densities, wanted.outcome.densities)
    assert (resumed._pruner.tied > 0).all()


def test_the_authors_rates_and_whole_rows_come_with_the_authors_rule_unless_another_is_given():
    own = [{"method": "dppa", "allocate": "dp_reference"}, {"method": "magnitude", "score": "row"}]
    assert [MergeConfig(EXPERTS, **given).ties_rule for given in own] == ["drop"] * 2
    assert [MergeConfig(EXPERTS, **given, ties="exact").ties_rule for given in own] == ["exact"] * 2
    assert {MergeConfig(EXPERTS, **given).ties_rule for given in ({"method": "dppa"}, {"method": "ties"})} == {"auto"}
    assert {facts.ties for table in (SCORES, ALLOCATIONS) for facts in table.values()} <= {"", *TIES}


def test_what_a_report_counts_are_those_with_the_largest_places():
    delta = np.float32([[1, 1, 2, 1], [1, 1, 1, 3]])
    for count in range(1, 7):
        found = chosen(delta == 1, count, "math", "q")
        np.testing.assert_array_equal(found, (delta == 1) & (ranked(delta, "math", "q") >= 6 - count))


# ---- what is said


@pytest.mark.parametrize(
    ("rates", "thresholds", "densities", "tied", "wanted"),
    [
        ((0.5,), (0.25,), (0.0,), (1.0,), "'math': 0.0 % kept in place of 50 %, as 100 % of its deltas tie at"),
        ((0.9,), (0.25,), (0.35,), (0.3,), "'math': 35.0 % kept in place of 10 %, as 30 % of its deltas tie at"),
        ((0.9, 0.8), (0.5, 0.25), (0.04, 0.19), (0.07, 0.02), "4.0 % kept in place of 10 % at rate 0.9, as 7 %"),
        ((0.5,), (0.25,), (0.45,), (0.1,), ""),
        ((0.5,), (0.25,), (0.5,), (1.0,), "'math': 50 % kept, and 100 % of its deltas tie at the threshold"),
        ((0.5,), (0.0,), (0.1,), (0.9,), ""),
        ((1.0,), (0.25,), (0.0,), (1.0,), ""),
    ],
    ids=["too little", "too much", "of one partition", "near enough", "told apart", "what is zero", "nothing asked"],
)
def test_a_share_that_is_far_from_what_was_asked_is_said(rates, thresholds, densities, tied, wanted, caplog):
    linears = linears_of(coarse()[0].specs)
    method = {"method": "dppa", "partitions": rates} if len(rates) > 1 else {"method": "magnitude"}
    config = MergeConfig(("math",), rate=rates[-1], **method)
    pruner = Pruner(kernels_of(make_mesh(ONE_DEVICE), config)[0], config, linears)
    for name, value in {"rates": rates, "thresholds": thresholds, "densities": densities, "tied": tied}.items():
        getattr(pruner, name)[0] = np.array(value)[:, None]
    caplog.set_level("INFO", absl_logging.get_absl_logger().name)
    absl_logging.get_absl_logger().addHandler(caplog.handler)
    tell_of_ties(pruner)
    absl_logging.get_absl_logger().removeHandler(caplog.handler)
    assert wanted in caplog.text
    assert bool(caplog.text) == bool(wanted)


def test_the_command_line_says_it_and_the_recipe_has_the_rule(merge, caplog):
    """One-bit deltas: with the authors' rule all of them tie, and nothing is kept."""

    def on_a_grid(arrays):
        for array in arrays.values():
            array[...] = np.clip(np.rint(array.astype(np.float32) * 64), -63, 63) / 64

    def one_bit(arrays):
        on_a_grid(arrays)
        for array in arrays.values():
            array[...] = array + np.asarray(1 / 128, array.dtype)

    edit_tensors(merge.base / "model.safetensors", on_a_grid)
    for expert in (merge.math, merge.law):
        shutil.copy(merge.base / "model.safetensors", expert)
        edit_tensors(expert / "model.safetensors", one_bit)
    absl_logging.get_absl_logger().addHandler(caplog.handler)
    output = merge("--method=magnitude", "--rate=0.5", "--ties=drop")
    absl_logging.get_absl_logger().removeHandler(caplog.handler)
    for expert in EXPERTS:
        assert f"expert '{expert}': 0.0 % kept in place of 50 %, as 100 % of its deltas tie" in caplog.text
    assert read_json(output / "recipe.json")["config"]["ties"] == "drop"
