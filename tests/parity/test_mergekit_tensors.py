"""mergekit 0.1.5 itself on merges of whole tensors and of compared deltas, on a random family in float32.

mergekit computes in float32 (`dtype`), and rounds once to `out_dtype`. Its norms, products and tangents are float32 as
well, ours float64, and PyTorch fuses the additions of `linear`: so float32 outputs differ by a few units in the last
place of the largest of the models' elements, and by up to 32 where a norm multiplies all (multislerp, karcher).
bfloat16 outputs differ by a unit of their own, in a few elements whose rounding falls to the other side. Nothing
differs in passthrough, arcee_fusion, ram and ramplus_tl.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from mergekit_python import mergekit_merges
from safetensors.numpy import save_file
from support import MemorySource, make_family, merge_to_arrays

from dppa_jax.config.merge import MergeConfig
from dppa_jax.delta.combine import COMBINATIONS
from dppa_jax.delta.presets import METHODS
from dppa_jax.merging.merger import Layout

pytestmark = pytest.mark.slow

EXPERTS = ("math", "law", "finance")
WEIGHTS = {"base": 0.5, "math": 0.7, "law": 1.0, "finance": 0.2}
SHAPE = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
UNITS = 40  # of float32, by which float32 outputs may differ
SAME = ("passthrough", "arcee_fusion", "ram", "ramplus_tl")


class Pair(NamedTuple):
    """A merge of ours and of mergekit.

    Attributes:
      experts: how many.
      ours: fields of `MergeConfig` beside method and coefficients.
      theirs: `merge_method`, and whether the base is a model among others.
      parameters: of the recipe.
      coefficient: of every expert; None for WEIGHTS.
    """

    experts: int
    ours: Mapping
    theirs: tuple[str, bool]
    parameters: Mapping
    coefficient: float | None = None


PAIRS = {
    "linear": Pair(3, {}, ("linear", True), {}),
    "linear, as it is": Pair(3, {"method_options": {"normalize": 0.0}}, ("linear", True), {"normalize": False}),
    "passthrough": Pair(1, {}, ("passthrough", False), {}, 0.7),
    "slerp": Pair(1, {}, ("slerp", False), {"t": 0.3}, 0.3),
    "nuslerp": Pair(1, {}, ("nuslerp", True), {}),
    "nuslerp, by row": Pair(1, {"compare": "row"}, ("nuslerp", True), {"nuslerp_flatten": False}),
    "nuslerp_deltas": Pair(2, {}, ("nuslerp", False), {}),
    "multislerp": Pair(3, {}, ("multislerp", True), {}),
    "multislerp_deltas": Pair(3, {}, ("multislerp", False), {}),
    "karcher": Pair(3, {}, ("karcher", True), {}, 1.0),
    "model_stock": Pair(3, {}, ("model_stock", False), {}, 1.0),
    "model_stock, by row": Pair(3, {"compare": "row"}, ("model_stock", False), {"filter_wise": True}, 1.0),
    "nearswap": Pair(1, {}, ("nearswap", False), {"t": 0.003}, 0.003),
    "arcee_fusion": Pair(1, {}, ("arcee_fusion", False), {}, 1.0),
    "ram": Pair(3, {"method_options": {"ram_epsilon": 0.004}}, ("ram", False), {"epsilon": 0.004}, 1.0),
    "ramplus_tl": Pair(
        3,
        {"method_options": {"ram_epsilon": 0.004, "ram_r": 0.5}},
        ("ramplus_tl", False),
        {"epsilon": 0.004, "r": 0.5},
        1.0,
    ),
    "sce": Pair(3, {}, ("sce", False), {}, 1.0),
    "sce, a third": Pair(3, {"method_options": {"sce_topk": 0.3}}, ("sce", False), {"select_topk": 0.3}, 1.0),
}


def coefficients_of(name: str) -> dict[str, float]:
    pair, method = PAIRS[name], name.split(",")[0]
    named = EXPERTS[: pair.experts]
    if COMBINATIONS[METHODS[method].combine].weighs_base:
        named = ("base", *named)
    return {model: WEIGHTS[model] if pair.coefficient is None else pair.coefficient for model in named}


def recipe(name: str, root: Path, out_dtype: str) -> dict:
    pair = PAIRS[name]
    method, with_base = pair.theirs
    models = (*(("base",) if with_base else ()), *EXPERTS[: pair.experts])
    weights = coefficients_of(name)
    own = {"passthrough": "scale"}.get(method, "weight")
    takes = method in ("linear", "nuslerp", "multislerp", "passthrough")
    entries = [{"model": str(root / m), "parameters": {own: weights[m]} if takes else {}} for m in models]
    base = {} if with_base or method == "passthrough" else {"base_model": str(root / "base")}
    dtypes = {"dtype": "float32", "out_dtype": out_dtype}
    return {"merge_method": method, "models": entries, "parameters": dict(pair.parameters), **base, **dtypes}


@pytest.fixture(scope="module")
def models() -> dict[str, MemorySource]:
    base, experts = make_family(EXPERTS, "float32", num_hidden_layers=1, vocab_size=300, **SHAPE)

    def further(expert: MemorySource) -> dict[str, np.ndarray]:
        return {n: start + 8 * (expert.tensors[n] - start) for n, start in base.tensors.items()}

    return {"base": base, **{name: MemorySource(base.config, further(expert)) for name, expert in experts.items()}}


@pytest.fixture(scope="module")
def theirs(models, tmp_path_factory) -> dict[str, dict[str, np.ndarray]]:
    root = tmp_path_factory.mktemp("mergekit")
    for name, model in models.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(model.config))
        save_file(model.tensors, root / name / "model.safetensors", {"format": "pt"})
    return mergekit_merges({f"{name} {dtype}": recipe(name, root, dtype) for name in PAIRS for dtype in DTYPES}, root)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PAIRS)
def test_a_merge_is_that_of_mergekit(name, dtype, models, theirs):
    pair = PAIRS[name]
    experts = {expert: models[expert] for expert in EXPERTS[: pair.experts]}
    method = name.split(",")[0]
    config = MergeConfig(
        tuple(experts), method=method, coefficients=coefficients_of(name), output_dtype=dtype, **pair.ours
    )
    found = merge_to_arrays(models["base"], experts, config, layout=Layout(1)).tensors
    for tensor, wanted in theirs[f"{name} {dtype}"].items():
        assert wanted.dtype == DTYPES[dtype]
        arrays = [model.tensors[tensor].astype(np.float32) for model in (models["base"], *experts.values())]
        unit = np.spacing(np.max(np.abs([*arrays, wanted.astype(np.float32)]), axis=0))
        allowed = UNITS * unit + (np.abs(np.spacing(wanted)).astype(np.float32) if dtype == "bfloat16" else 0)
        apart = np.abs(found[tensor].astype(np.float32) - wanted.astype(np.float32))
        assert (apart <= (0 if method in SAME else allowed)).all(), tensor
        assert (wanted != models["base"].tensors[tensor]).any(), tensor


def test_every_method_is_compared():
    methods = {name for name, of in COMBINATIONS.items() if not (of.prunes or of.solves)}  # it has none that solves
    assert {name.split(",")[0] for name in PAIRS} == methods
