"""The authors' prune step: magnitude, their OWL and their DP ("layer_wei"), at 0.8 and 0.9, in float32 and bfloat16.

Rates within 1e-12, counts, indices, thresholds and masks identical, pruned tensors bit for bit.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
from golden import DTYPES, load_json, load_masks, sha256
from safetensors.numpy import load_file
from support import Merge, linear_names, merge_to_arrays, same_bits

from dppa_jax.config.merge import MergeConfig
from dppa_jax.delta.allocate import Statistics
from dppa_jax.delta.threshold import index

ALLOCATE = {"magnitude": "uniform", "magnitude_owl": "owl", "magnitude_owl_layer_wei": "dp_reference"}  # by their names
RATES = (0.8, 0.9)
DTYPE_PAIRS = tuple(product(("bf16", "fp32"), repeat=2))  # of the offset file and of the pruning
FILES = tuple(product(DTYPE_PAIRS, ALLOCATE, RATES))


def label(value) -> str:
    return "{}-offset_{}-prune".format(*value) if isinstance(value, tuple) else str(value)


@dataclass(frozen=True)
class Case:
    source: str
    dtypes: tuple[str, str]
    method: str
    rate: float

    def __str__(self):
        return f"{self.source}-{label(self.dtypes)}-{self.method}-{self.rate}"


CASES = [Case("offset", *file) for file in FILES]
# From the models themselves, without the file between. An offset in bfloat16 that is then pruned in float32 is the one
# pair that needs the file: the engine rounds a delta once, to the dtype that it prunes in.
CASES += [Case("models", *file) for file in FILES if file[0] != ("bf16", "fp32")]
FAST = (  # from the file and from the models, each method and each pair of dtypes at least once
    Case("offset", ("bf16", "fp32"), "magnitude_owl_layer_wei", 0.8),
    Case("offset", ("fp32", "fp32"), "magnitude_owl", 0.9),
    Case("offset", ("bf16", "bf16"), "magnitude", 0.8),
    Case("models", ("fp32", "bf16"), "magnitude_owl", 0.8),
    Case("models", ("bf16", "bf16"), "magnitude_owl_layer_wei", 0.9),
)


@dataclass(frozen=True)
class Run:
    case: Case
    config: dict
    merge: Merge
    facts: dict
    masks: dict[str, np.ndarray]
    offset: dict[str, np.ndarray]

    def of_linears(self, key: str) -> np.ndarray:
        """A column of the golden table, (linears,)."""
        return np.array([linear[key] for linear in self.facts["linears"]])


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, id=str(case), marks=[] if case in FAST else pytest.mark.slow) for case in CASES],
)
def run(request, golden, open_model, offset_as_expert) -> Run:
    case = request.param
    offset_dtype, prune_dtype = case.dtypes
    if case.source == "offset":
        base, expert = offset_as_expert(offset_dtype)
    else:
        base, expert = open_model(offset_dtype, "base"), open_model(offset_dtype, "expert0")
    config = MergeConfig(
        ("expert0",),
        method="magnitude",
        allocate=ALLOCATE[case.method],
        rate=case.rate,
        ties="drop",
        delta_dtype=DTYPES[prune_dtype].name,
    )
    merge = merge_to_arrays(base, {"expert0": expert}, config, deltas=True)
    stem = golden / "prune" / label(case.dtypes) / "expert0" / f"{case.rate}_{case.method}"
    offset = load_file(golden / "offset" / offset_dtype / "expert0.safetensors")
    facts = load_json(stem.with_name(f"{stem.name}.json"))
    masks = load_masks(stem.with_name(f"{stem.name}.mask.safetensors"), offset)
    return Run(case, base.config, merge, facts, masks, offset)


def test_every_golden_prune_is_compared(golden):
    files = {path.relative_to(golden / "prune").as_posix() for path in (golden / "prune").rglob("*.json")}
    assert files == {f"{label(dtypes)}/expert0/{rate}_{method}.json" for dtypes, method, rate in FILES}


def test_rates_within_1e_12(run):
    np.testing.assert_allclose(run.merge.outcome.rates[0, 0], run.of_linears("rate"), rtol=0, atol=1e-12)


def test_outlier_counts_are_identical(run):
    if ALLOCATE[run.case.method] == "uniform":
        assert run.merge.outcome.statistics is None
        return
    [statistics] = run.merge.outcome.statistics

    def counts(percentages, numel):
        return np.rint(np.reshape(percentages, numel.shape) * numel / 100)

    layers = counts(run.facts["layer_outlier_percent"], statistics.layer_numel)
    np.testing.assert_array_equal(statistics.layer_outliers, layers)
    if "linear_outlier_percent" in run.facts:
        linears = counts(run.facts["linear_outlier_percent"], statistics.numel)
        np.testing.assert_array_equal(statistics.linear_outliers, linears)


def test_indices_are_identical(run):
    sizes, rates = run.of_linears("numel").ravel().tolist(), run.merge.outcome.rates[0, 0].ravel()
    found = [int(index(size, rate)) for size, rate in zip(sizes, rates, strict=True)]
    np.testing.assert_array_equal(found, run.of_linears("index").ravel())


def test_thresholds_are_identical(run):
    np.testing.assert_array_equal(run.merge.outcome.thresholds[0, 0], run.of_linears("thresh"))


def test_masks_are_identical(run):
    found = {name: run.merge.deltas["expert0"][name] != 0 for name in linear_names(run.config)}
    assert found.keys() == run.masks.keys()
    for name, mask in run.masks.items():
        np.testing.assert_array_equal(found[name], mask, err_msg=name)
    pruned = run.of_linears("numel") * (1 - run.merge.outcome.densities[0, 0])
    np.testing.assert_array_equal(np.rint(pruned), run.of_linears("pruned"))


def test_pruned_linears_are_identical_bit_for_bit(run):
    for linear in run.facts["linears"]:
        name = f"model.layers.{linear['layer']}.{linear['name']}.weight"
        assert sha256(run.merge.deltas["expert0"][name]) == linear["sha256"], name


def test_embeddings_head_and_norms_are_not_pruned(run):
    for name in run.offset.keys() - run.masks.keys():
        unpruned = run.offset[name].astype(DTYPES[run.case.dtypes[1]])
        assert same_bits(run.merge.deltas["expert0"][name], unpruned), name


def authors_rates(statistics: Statistics, rate: float, max_fluctuation: float) -> np.ndarray:
    """The authors' DP as their code has it, without our clip: README of the golden files, "Formulas"."""
    layer = 100 / statistics.layer_numel * statistics.layer_outliers
    linear = 100 / statistics.numel * statistics.linear_outliers
    a, b = layer - layer.mean(), linear / linear.mean()
    b = b - (statistics.numel * b).sum() / statistics.numel.sum()
    return rate - (max_fluctuation * a / abs(a).max())[statistics.layer] - max_fluctuation * b / abs(b).max()


@pytest.mark.parametrize("max_fluctuation", [0.08, 0.2, 0.6])
def test_differs_from_the_authors_rates_are_clipped_to_0_and_1(max_fluctuation, open_model):
    """At 0.9 with fluctuations above 0.05 their rates can pass 1, and 0 with larger ones; ours stop there.

    Their index int(n·rate) then points beyond the sorted list, an IndexError, or counts from its end: nearly everything
    is dropped where all was to be kept. Every golden rate is inside [0, 1], where both agree.
    """
    config = MergeConfig(("e",), method="dp", allocate="dp_reference", rate=0.9, max_fluctuation=max_fluctuation)
    outcome = merge_to_arrays(open_model("fp32", "base"), {"e": open_model("fp32", "expert0")}, config).outcome
    theirs = authors_rates(outcome.statistics[0], 0.9, max_fluctuation)
    np.testing.assert_allclose(outcome.rates[0, 0], np.clip(theirs, 0, 1), rtol=0, atol=1e-12)
    assert (theirs > 1).any() == (max_fluctuation > 0.08)
    assert (theirs < 0).any() == (max_fluctuation == 0.6)


def test_differs_from_the_authors_rate_0_keeps_everything(open_model):
    """At rate 0 their threshold is the smallest magnitude, which they drop with all its ties; we keep every element."""
    config = MergeConfig(("e",), method="magnitude", rate=0.0)
    merge = merge_to_arrays(open_model("fp32", "base"), {"e": open_model("fp32", "expert0")}, config, deltas=True)
    dense = MergeConfig(("e",), method="task_arithmetic")
    wanted = merge_to_arrays(open_model("fp32", "base"), {"e": open_model("fp32", "expert0")}, dense, deltas=True)
    assert (merge.outcome.densities == 1).all()
    for name, delta in wanted.deltas["e"].items():
        assert same_bits(merge.deltas["e"][name], delta), name
