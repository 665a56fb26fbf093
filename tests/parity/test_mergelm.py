"""MergeLM (the code of DARE) on three experts: TIES, task arithmetic, and its magnitude mask.

Where the order of the arithmetic is ours, bit for bit; where it is not, within 1 ulp of |base| + Σ|δ|, the largest
number that either sum can pass through. An ulp of the result would say nothing where base and deltas cancel.
"""

import numpy as np
import pytest
from golden import EXPERTS
from safetensors.numpy import load_file
from support import MemorySource, assert_same_bits, linear_names, merge_to_arrays, same_bits

from dppa_jax.config.merge import MergeConfig
from dppa_jax.delta import combine

MASKED = ("model.layers.0.self_attn.q_proj.weight", "model.layers.2.mlp.down_proj.weight")


@pytest.fixture(scope="module")
def models(open_model):
    """(base, experts) in float32; expert2 has one more row of vocabulary, which MergeLM was given without."""
    return open_model("fp32", "base"), {name: open_model("fp32", name) for name in EXPERTS}


@pytest.fixture(scope="module")
def deltas(models) -> dict[str, dict[str, np.ndarray]]:
    base, experts = models
    rows = {name: spec.shape[0] for name, spec in base.specs.items()}
    return {e: {n: expert.read(n)[: rows[n]] - base.read(n) for n in rows} for e, expert in experts.items()}


def over_zero(base, deltas) -> tuple[MemorySource, dict[str, MemorySource]]:
    """Experts whose deltas are exactly these: over a base of zeros."""
    zeros = {name: np.zeros(spec.shape, np.float32) for name, spec in base.specs.items()}
    return MemorySource(base.config, zeros), {e: MemorySource(base.config, d) for e, d in deltas.items()}


def largest(base, deltas, name: str) -> np.ndarray:
    return abs(base.read(name)) + sum(abs(d[name]) for d in deltas.values())


def test_every_golden_file_is_compared(golden):
    assert {path.stem for path in (golden / "mergelm").iterdir()} == {
        "task_arithmetic_scale0.3",
        "ties_merging_scale1.0_mask0.8",
        "mask_input_with_mask_rate_magnitude_rescale_expert0",
    }


def test_task_arithmetic_sum_of_deltas_bit_for_bit(models, deltas, golden):
    """Theirs is base + 0.3·Σδ: the sum is the engine's, over a base of zeros; the rest is done here."""
    base, _ = models
    summed = merge_to_arrays(*over_zero(base, deltas), MergeConfig(EXPERTS, method="task_arithmetic")).tensors
    merged = {name: base.read(name) + np.float32(0.3) * array for name, array in summed.items()}
    assert_same_bits(merged, load_file(golden / "mergelm" / "task_arithmetic_scale0.3.safetensors"))


def test_task_arithmetic_with_coefficients_within_1_ulp(models, deltas, golden):
    """Ours is base + Σ(0.3·δ), which rounds three products and not one."""
    base, experts = models
    config = MergeConfig(EXPERTS, method="task_arithmetic", coefficients=dict.fromkeys(EXPERTS, 0.3))
    found = merge_to_arrays(base, experts, config).tensors
    for name, wanted in load_file(golden / "mergelm" / "task_arithmetic_scale0.3.safetensors").items():
        assert (abs(found[name] - wanted) <= np.spacing(largest(base, deltas, name))).all(), name


def mergelm_trim(deltas: dict[str, np.ndarray], keep: float) -> dict[str, np.ndarray]:
    """Their trimming of one expert: |δ| at or above the k-th smallest of the whole model, k = int((1 − keep)·d)."""
    everything = np.sort(abs(np.concatenate([array.ravel() for array in deltas.values()])))
    threshold = everything[int((1 - keep) * everything.size) - 1]
    return {name: np.where(abs(array) >= threshold, array, np.float32(0)) for name, array in deltas.items()}


def test_ties_of_deltas_that_they_trimmed_bit_for_bit(models, deltas, golden):
    """Elect sign and disjoint mean are the engine's; at rate 0 it trims nothing more."""
    base, _ = models
    trimmed = {expert: mergelm_trim(d, 0.2) for expert, d in deltas.items()}
    combined = merge_to_arrays(*over_zero(base, trimmed), MergeConfig(EXPERTS, method="ties", rate=0.0)).tensors
    merged = {name: base.read(name) + array for name, array in combined.items()}
    assert_same_bits(merged, load_file(golden / "mergelm" / "ties_merging_scale1.0_mask0.8.safetensors"))


def test_differs_from_mergelm_ties_trims_each_linear_and_not_the_model_as_one_vector(models, deltas):
    """They rank all parameters of an expert together, embeddings and norms too, so quiet layers lose nearly everything.

    Ours, and the paper's wording, leaves each linear its 20 % and embeddings, head and norms whole.
    """
    base, experts = models
    config = MergeConfig(("expert0",), method="ties", rate=0.8)
    ours = merge_to_arrays(base, {"expert0": experts["expert0"]}, config, deltas=True).deltas["expert0"]
    theirs = mergelm_trim(deltas["expert0"], 0.2)
    linears = linear_names(base.config)
    kept = {name: ((ours[name] != 0).mean(), (theirs[name] != 0).mean()) for name in ours}
    np.testing.assert_allclose([kept[name][0] for name in linears], 0.2, atol=1e-3)
    assert min(kept[name][1] for name in linears) < 0.1
    assert max(kept[name][1] for name in linears) > 0.4
    assert sum((theirs[name] != 0).sum() for name in theirs) == sum(a.size for a in theirs.values()) // 5 + 2
    for name in ours.keys() - set(linears):
        assert same_bits(ours[name], deltas["expert0"][name]), name


def test_differs_from_mergelm_ties_a_sum_of_exactly_zero_elects_plus():
    """They elect the sign that most sums of the whole model have; that is a pass of its own. The golden files have no
    element where it matters."""
    experts = [np.float32([1, -2, -3, 0]), np.float32([-1, -1, 2, 0])]
    signs = np.sign(sum(experts))
    majority = float(np.sign(signs.sum()))
    assert majority == -1
    elected = np.where(signs == 0, majority, signs)
    agreeing = [np.where(delta * elected > 0, delta, 0) for delta in experts]
    theirs = sum(agreeing) / np.maximum(sum(a != 0 for a in agreeing), 1)
    np.testing.assert_array_equal(theirs, [-1, -1.5, -3, 0])
    np.testing.assert_array_equal(combine.ties(experts), [1, -1.5, -3, 0])
    np.testing.assert_array_equal(combine.ties(experts, zero_sign=majority), theirs)


@pytest.mark.parametrize("rate", [0.8, 0.9])
@pytest.mark.parametrize("name", MASKED)
def test_differs_from_mergelm_magnitude_mask_drops_one_element_more(name, rate, models, golden):
    """They drop the int(n·rate) smallest, we (with DPPA's code) also the next, which is our threshold.

    Rescaled they divide by 1 − rate, we multiply by its reciprocal: within 1 ulp.
    """
    base, experts = models
    config = MergeConfig(("expert0",), method="magnitude", scale="dare", rate=rate)
    merge = merge_to_arrays(base, {"expert0": experts["expert0"]}, config, deltas=True)
    ours = merge.deltas["expert0"][name]
    file = golden / "mergelm" / "mask_input_with_mask_rate_magnitude_rescale_expert0.safetensors"
    theirs = load_file(file)[f"{name}|{rate}"]
    assert (theirs != 0).sum() == theirs.size - int(theirs.size * rate)
    [extra] = theirs[(theirs != 0) & (ours == 0)]
    assert abs(extra) == abs(theirs[theirs != 0]).min()
    kept = ours != 0
    assert (abs(ours - theirs)[kept] <= np.spacing(abs(theirs[kept]))).all()
