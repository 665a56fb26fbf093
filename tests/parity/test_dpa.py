"""The authors' dynamic partition amplification, enhance_offset and offset_add_base_model, at factors for 0.9 and 0.8.

Their enhanced offset and their merged model, all 39 tensors, bit for bit. Embeddings, head and norms, which no step of
theirs prunes, are multiplied too: our dense tensors take the factor of an element that every partition keeps.
The engine's own rounding is theirs: the delta in the pruning's dtype, one product and one sum in float32.
"""

from dataclasses import dataclass

import numpy as np
import pytest
from golden import DTYPES, load_json, load_masks, sha256
from safetensors.numpy import load_file
from support import assert_same_bits, linear_names, merge_to_arrays, same_bits

from dppa_jax.config.merge import MergeConfig

PARTITIONS = (0.9, 0.8)
FACTORS = ((1.8, 0.0), (2.1, 1.3))  # "nine" and "eight"
DTYPE_PAIRS = (("bf16", "bf16"), ("fp32", "bf16"), ("fp32", "fp32"))  # of the offset file and of the pruning


@dataclass(frozen=True)
class Case:
    dtypes: tuple[str, str]
    factors: tuple[float, float]

    @property
    def path(self) -> str:
        nine, eight = self.factors
        return "{}-offset_{}-prune/expert0/eight{}_nine{}".format(*self.dtypes, eight, nine)


CASES = [Case(dtypes, factors) for dtypes in DTYPE_PAIRS for factors in FACTORS]
FAST = (Case(DTYPE_PAIRS[0], FACTORS[1]), Case(DTYPE_PAIRS[2], FACTORS[0]))


@dataclass(frozen=True)
class Run:
    case: Case
    config: dict
    merged: dict[str, np.ndarray]
    offset: dict[str, np.ndarray]
    facts: dict


def dppa(case: Case, dpa_combine: str = "max") -> MergeConfig:
    return MergeConfig(
        ("expert0",),
        method="dppa",
        allocate="dp_reference",
        rate=PARTITIONS[-1],
        partitions=PARTITIONS,
        factors={"expert0": case.factors},
        dpa_combine=dpa_combine,
        delta_dtype=DTYPES[case.dtypes[1]].name,
        output_dtype="float32",
    )


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, id=case.path, marks=[] if case in FAST else pytest.mark.slow) for case in CASES],
)
def run(request, golden, open_model, offset_as_expert) -> Run:
    """The merged model from base and expert; the enhanced offset as a merge over a base of zeros."""
    case = request.param
    base, expert = (open_model(case.dtypes[0], name) for name in ("base", "expert0"))
    merged = merge_to_arrays(base, {"expert0": expert}, dppa(case)).tensors
    zero, offset = offset_as_expert(case.dtypes[0])
    enhanced = merge_to_arrays(zero, {"expert0": offset}, dppa(case)).tensors
    return Run(case, base.config, merged, enhanced, load_json(golden / "dpa" / f"{case.path}.json"))


def test_every_golden_dpa_case_is_compared(golden):
    files = {path.relative_to(golden / "dpa").with_suffix("").as_posix() for path in (golden / "dpa").rglob("*.json")}
    assert files == {case.path for case in CASES}


def test_enhanced_offset_is_identical_bit_for_bit(run, golden):
    assert {name: sha256(array) for name, array in run.offset.items()} == run.facts["sha256_offset"]
    full = golden / "dpa" / f"{run.case.path}.offset.safetensors"
    if full.exists():
        assert_same_bits(run.offset, load_file(full), "enhanced offset")


def test_merged_model_is_identical_bit_for_bit(run, golden):
    assert {name: sha256(array) for name, array in run.merged.items()} == run.facts["sha256_merged"]
    full = golden / "dpa" / f"{run.case.path}.merged.safetensors"
    if full.exists():
        assert_same_bits(run.merged, load_file(full), "merged model")


def test_partitions_hold_as_many_elements_as_theirs(run, golden, offset_as_expert):
    """Told apart by the factors: the enhanced offset divided by the factor is the delta."""
    _, expert = offset_as_expert(run.case.dtypes[0])
    counts = dict.fromkeys((*run.case.factors, "zero"), 0)
    for name in linear_names(run.config):
        delta = expert.read(name).astype(DTYPES[run.case.dtypes[1]]).astype(np.float32)
        counts["zero"] += int((run.offset[name] == 0).sum())
        for factor in filter(None, run.case.factors):
            counts[factor] += int(((run.offset[name] == np.float32(factor) * delta) & (delta != 0)).sum())
    nine, eight = run.case.factors
    assert counts[nine] == run.facts["linear_from_nine"]
    assert counts[eight] == run.facts["linear_from_eight"]
    assert counts["zero"] == run.facts["linear_zero"]


SLOW = [pytest.param(factors, marks=pytest.mark.slow) for factors in ((-2.0, 0.5), (0.0, 1.3))]


@pytest.mark.parametrize("factors", [(0.5, -2.0), (1.2, -1.2), *SLOW])
def test_max_takes_of_all_factors_the_one_of_largest_magnitude(factors, golden, offset_as_expert):
    """Their rule, y where |y| > |x| else x, on their masks, also where the higher rate has the smaller factor."""
    base, expert = offset_as_expert("fp32")
    config = dppa(Case(("fp32", "fp32"), factors))
    found = merge_to_arrays(base, {"expert0": expert}, config).tensors
    for name, (nine, eight) in reference_masks(golden, expert).items():
        delta = expert.read(name)
        x, y = (np.float32(f) * delta * mask for f, mask in ((factors[1], eight), (factors[0], nine)))
        assert same_bits(found[name], np.where(abs(y) > abs(x), y, x) + np.float32(0)), name


@pytest.mark.parametrize("factors", [(0.5, -2.0), *SLOW])
def test_differs_from_the_authors_highest_takes_the_highest_rates_factor(factors, golden, offset_as_expert):
    """The paper's partitions, our default. The same as theirs while factors fall with the rate."""
    base, expert = offset_as_expert("fp32")
    config = dppa(Case(("fp32", "fp32"), factors), "highest")
    found = merge_to_arrays(base, {"expert0": expert}, config).tensors
    for name, (nine, eight) in reference_masks(golden, expert).items():
        factor = np.where(nine, factors[0], np.where(eight, factors[1], 0)).astype(np.float32)
        assert same_bits(found[name], factor * expert.read(name) + np.float32(0)), name


def reference_masks(golden, expert) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What 0.9 and 0.8 keep of every linear, by the authors' DP in float32."""
    folder = golden / "prune" / "fp32-offset_fp32-prune" / "expert0"
    files = [folder / f"{rate}_magnitude_owl_layer_wei.mask.safetensors" for rate in PARTITIONS]
    like = {name: expert.read(name) for name in linear_names(expert.config)}
    nine, eight = (load_masks(file, like) for file in files)
    return {name: (nine[name], eight[name]) for name in like}
