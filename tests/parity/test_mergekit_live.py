"""`--compatible=mergekit` beside mergekit 0.1.5 itself, on random families, with weights and densities by tensor.

Methods without random numbers have its bits in float32 and in bfloat16. Which of the elements that tie at a threshold
are kept depends on the sort of the machine there, so these are left out, and their number is compared.
"""

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from families import write_model
from mergekit_python import mergekit_merges
from support import make_family, merge_to_arrays

from dppa_jax.config.merge import MergeConfig

pytestmark = pytest.mark.slow
EXPERTS, LAYERS = ("math", "law", "code"), 3
WEIGHTS = {"math": (0.9, 0.1), "law": (0.3, 0.3), "code": (-0.2, 0.7)}  # gradients: first and last layer
DENSITIES = {"math": 0.2, "law": 0.55, "code": 1.0}
ATTENTION = 0.35  # the density of self_attn, for all but "code"
EXACT = {  # method and dtype of the recipe, its global parameters, and ours
    "sum": ("task_arithmetic", "float32", {}, {}),
    "sum bf16": ("task_arithmetic", "bfloat16", {"normalize": True, "lambda": 0.7}, {"lambda_": 0.7}),
    "ties": ("ties", "float32", {}, {}),
    "ties bf16": ("ties", "bfloat16", {"lambda": 1.3}, {"lambda_": 1.3}),
    "ties fp16": ("ties", "float16", {"normalize": False}, {}),
    "breadcrumbs": ("breadcrumbs", "float32", {"gamma": 0.02}, {"method_options": {"breadcrumbs_gamma": 0.02}}),
    "breadcrumbs ties bf16": ("breadcrumbs_ties", "bfloat16", {}, {}),
}
RANDOM = {
    "dare_linear": ("dare", {}),
    "dare_ties": ("dare_ties", {}),
    "della": ("della", {"method_options": {"della_window": 0.3}}),
    "della_linear": ("della_linear", {"method_options": {"della_window": 0.3}}),
}


def layer_of(name: str) -> int:
    return int(name.split(".")[2]) if ".layers." in name else 0


def weight(expert: str, name: str) -> float:
    first, last = WEIGHTS[expert]
    return first + (last - first) * layer_of(name) / (LAYERS - 1)


def density(expert: str, name: str) -> float:
    return ATTENTION if "self_attn" in name and expert != "code" else DENSITIES[expert]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(base, experts, the directory that they are written to): float32, so that a recipe's dtype casts them."""
    root = tmp_path_factory.mktemp("family")
    base, experts = make_family(EXPERTS, "float32", num_hidden_layers=LAYERS)
    for name, model in {"base": base, **experts}.items():
        write_model(root / name, base.config, model.tensors, tokenizer=False)
    return base, experts, root


def recipe(root: Path, method: str, dtype: str, parameters: Mapping, experts=EXPERTS, **own) -> dict:
    entries = []
    for name in experts:
        rule = [{"filter": "self_attn", "value": ATTENTION}] if name != "code" else []
        density = [*rule, {"value": DENSITIES[name]}]
        given = {"weight": list(WEIGHTS[name])} | ({} if method == "task_arithmetic" else {"density": density}) | own
        entries.append({"model": str(root / name), "parameters": given})
    head = {"merge_method": method, "base_model": str(root / "base"), "dtype": dtype}
    return {**head, "models": entries, "parameters": dict(parameters)}


@pytest.fixture(scope="module")
def theirs(models, tmp_path_factory) -> dict[str, dict[str, np.ndarray]]:
    root = models[2]
    recipes = {name: recipe(root, *given[:3]) for name, given in EXACT.items()}
    recipes |= {
        name: recipe(root, name, "float32", {}, ["math"], weight=1.0, density=0.4) for name in RANDOM
    }  # one expert and one density: what is kept of its delta is seen in the merge
    return mergekit_merges(recipes, tmp_path_factory.mktemp("mergekit"))


def in_dtype(array: np.ndarray, dtype: str) -> np.ndarray:
    return array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def tied(base: np.ndarray, expert: np.ndarray, density: float, gamma: float) -> np.ndarray:
    """Is |δ| that of elements of which some are kept and some are not, by their place alone?"""
    size = np.abs((expert.astype(np.float32) - base.astype(np.float32)).astype(base.dtype).astype(np.float32))
    order, n = np.sort(size.ravel())[::-1], size.size
    cuts = [cut for cut in (int(gamma * n), int(gamma * n) + int(density * n)) if 0 < cut < n]
    return np.isin(size, [order[cut] for cut in cuts if order[cut - 1] == order[cut]])


@pytest.mark.parametrize("case", EXACT)
def test_the_same_bits_where_nothing_is_random(case, models, theirs):
    method, dtype, parameters, options = EXACT[case]
    base, experts, _ = models
    prunes = method != "task_arithmetic"
    more = {"expert_rates": {e: {n: 1 - density(e, n) for n in base.specs} for e in EXPERTS}} if prunes else {}
    if "normalize" in parameters:
        more["divide"] = "weights" if parameters["normalize"] else "none"
    coefficients = {e: {n: weight(e, n) for n in base.specs} for e in EXPERTS}
    config = MergeConfig(
        EXPERTS,
        method=method,
        compatible="mergekit",
        coefficients=coefficients,
        arithmetic=dtype,
        output_dtype=dtype,
        **more,
        **options,
    )
    found = merge_to_arrays(base, experts, config).tensors
    gamma = parameters.get("gamma", 0.01) if "breadcrumbs" in method else 0.0
    for name in base.specs:
        start = in_dtype(base.tensors[name], dtype)
        free = np.zeros(start.shape, bool)
        for expert in EXPERTS if prunes else ():
            free |= tied(start, in_dtype(experts[expert].tensors[name], dtype), density(expert, name), gamma)
        assert free.size < 1000 or free.mean() < 0.15, name
        np.testing.assert_array_equal(found[name][~free], theirs[case][name][~free], err_msg=name)


@pytest.mark.parametrize("method", RANDOM)
def test_random_masks_keep_as_much_and_the_same_norm(method, models, theirs):
    base, experts, _ = models
    ours, options = RANDOM[method]
    config = MergeConfig(("math",), method=ours, rate=0.6, compatible="mergekit", **options)
    found = merge_to_arrays(base, {"math": experts["math"]}, config).tensors
    larger_kept = []
    for name in base.specs:
        start, delta = base.tensors[name], experts["math"].tensors[name] - base.tensors[name]
        changes = [merged.astype(np.float64) - start for merged in (found[name], theirs[method][name])]
        masks = [np.abs(change) > 0 for change in changes]
        assert abs(masks[0].mean() - masks[1].mean()) < 5 * np.sqrt(2 * 0.24 / delta.size), name
        for change, mask in zip(changes, masks, strict=True):
            assert np.abs(change).sum() == pytest.approx(np.abs(delta).sum(), rel=1e-4), name
            scale = change[mask] / delta[mask]
            assert np.median(scale) == pytest.approx(np.abs(delta).sum() / np.abs(delta[mask]).sum(), rel=1e-4), name
        if "della" in method and delta.ndim == 2:
            large = np.abs(delta) > np.median(np.abs(delta), axis=1, keepdims=True)
            larger_kept.append([delta.size, *(mask[large].mean() - mask[~large].mean() for mask in masks)])
    if larger_kept:  # the larger half of each row is kept more often, by half of the window, equally so in both
        sizes, *shares = np.transpose(larger_kept)
        for share in shares:
            assert np.average(share, weights=sizes) == pytest.approx(0.15, abs=5 * np.sqrt(0.96 / sizes.sum()) + 0.005)
