"""Combinations that compare deltas against their formulas in numpy, tensor by tensor."""

import numpy as np
import pytest
from support import AWKWARD, MemorySource, make_family, merge_to_arrays

from dppa_jax.config.merge import MergeConfig
from dppa_jax.delta.combine import COMBINATIONS
from dppa_jax.merging.merger import Layout

THREE = ("math", "law", "finance")
CUT = AWKWARD | {"vocab_size": 501}  # embeddings of more elements than the largest linear, which are cut
WEIGHTS = {"math": 0.7, "law": 1.0, "finance": 0.2}


def nearswap(base, deltas, weights):
    return np.clip(deltas[0], -weights[0], weights[0])


def ram(base, deltas, weights, r=0.0, alpha=0.2, epsilon=0.004):
    touched = np.abs(deltas) > epsilon
    count = touched.sum(axis=0)
    total = np.zeros_like(base)
    for delta, mine, weight in zip(deltas, touched, weights, strict=True):
        shared, alone = (mine & (count > 1)).sum(), (mine & (count == 1)).sum()
        gain = 1 + r * np.clip(shared / max(alone, epsilon), 0, alpha)
        total += weight * delta * np.where(mine, np.where(count == 1, gain, 1 / np.maximum(count, 1)), 0)
    return total


def sce(base, deltas, weights, topk=0.3):
    variance = deltas.var(axis=0)
    kept = int((variance > 0).sum() * topk)
    if topk < 1:
        deltas = np.where(variance >= np.sort(variance, axis=None)[-kept], deltas, 0)
    means = np.square(deltas).reshape(len(deltas), -1).mean(axis=1)
    shares = means / means.sum() if means.sum() >= 1e-6 else np.full(len(deltas), 1 / len(deltas))
    agree = np.sign(deltas) == np.where(deltas.sum(axis=0) >= 0, 1, -1)
    each = shares.reshape(-1, *[1] * base.ndim) * agree
    return np.einsum("k,k...,k...->...", weights, each, deltas) / np.maximum(each.sum(axis=0), 1e-6)


def arcee_fusion(base, deltas, weights):
    def softmax(x):
        e = np.exp(x - x.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True)

    p, q = softmax(base + deltas[0]), softmax(base)
    importance = np.abs(deltas[0]) * (p * np.log(p / q)).sum(axis=-1, keepdims=True)
    ordered = np.sort(importance, axis=None)
    first, median, third = (ordered[int(share * (ordered.size - 1))] for share in (0.25, 0.5, 0.75))
    return weights[0] * np.where(importance >= median + 1.5 * (third - first), deltas[0], 0)


CASES = {  # number of experts, the method's own numbers, the formula
    "nearswap": (1, {}, nearswap),
    "arcee_fusion": (1, {}, arcee_fusion),
    "ram": (3, {"ram_epsilon": 0.004}, ram),
    "ramplus_tl": (3, {"ram_epsilon": 0.004, "ram_r": 0.5}, lambda *given: ram(*given, r=0.5)),
    "sce": (3, {"sce_topk": 0.3}, sce),
    "sce of all": (3, {}, lambda *given: sce(*given, topk=1.0)),
}
NEAR = {"arcee_fusion": 1e-3}  # share of elements about which float32 and float64 may decide otherwise


@pytest.fixture(scope="module")
def family():
    return make_family(THREE, "float32", num_hidden_layers=1, **CUT)


@pytest.mark.parametrize("case", CASES)
def test_a_merge_is_its_formula_of_every_tensor(case, family):
    base, experts = family
    count, options, formula = CASES[case]
    method, chosen = case.split(" ")[0], {name: experts[name] for name in THREE[:count]}
    coefficients = {name: 0.003 if method == "nearswap" else WEIGHTS[name] for name in chosen}
    config = MergeConfig(tuple(chosen), method=method, coefficients=coefficients, method_options=options)
    found = merge_to_arrays(base, chosen, config, layout=Layout(1)).tensors
    for name, start in base.tensors.items():
        deltas = np.stack([expert.tensors[name] - start for expert in chosen.values()]).astype(np.float64)
        wanted = start + formula(start.astype(np.float64), deltas, np.array(list(coefficients.values())))
        size = np.abs(start) + np.abs(deltas).sum(axis=0)
        far = np.abs(found[name] - wanted) > 4 * np.spacing(size.astype(np.float32))
        assert far.mean() <= NEAR.get(method, 0), name
        changed = (found[name] != start).mean()
        assert changed > (0.01 if start.ndim > 1 else 0), name


def test_sce_without_a_difference_between_experts_keeps_nothing(family):
    """Elements that do not vary are not selected; of equal experts none does."""
    base, experts = family
    same = dict.fromkeys(("math", "law"), experts["math"])
    found = merge_to_arrays(base, same, MergeConfig(("math", "law"), method="sce", method_options={"sce_topk": 0.5}))
    for name, start in base.tensors.items():
        np.testing.assert_array_equal(found.tensors[name], start, err_msg=name)


def test_weights_of_sce_are_equal_where_deltas_are_tiny(family):
    """As in mergekit: below a mean δ² of 1e-6 of all experts together."""
    base, experts = family

    def tiny(expert: MemorySource) -> dict[str, np.ndarray]:
        return {n: start + np.float32(1e-3) * (expert.tensors[n] - start) for n, start in base.tensors.items()}

    near = {name: MemorySource(base.config, tiny(expert)) for name, expert in experts.items()}
    found = merge_to_arrays(base, near, MergeConfig(THREE, method="sce"), layout=Layout(1)).tensors
    for name, start in base.tensors.items():
        deltas = np.stack([expert.tensors[name] - start for expert in near.values()]).astype(np.float64)
        agree = np.sign(deltas) == np.where(deltas.sum(axis=0) >= 0, 1, -1)
        wanted = start + (deltas * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)
        np.testing.assert_allclose(found[name], wanted, atol=1e-7, err_msg=name)


def test_every_combination_that_asks_is_compared():
    assert {case.split(" ")[0] for case in CASES} == {name for name, of in COMBINATIONS.items() if of.numbers}
