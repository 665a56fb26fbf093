"""Adapters of low rank (LoRA): which arrays are trained, how they begin, and how a forward pass takes them.

The factors of a linear q_proj are q_proj_lora_a (layers, rank, in) and q_proj_lora_b (layers, out, rank), at its place
in the tree. The decoder computes x · Wᵀ + x · Aᵀ · (scale · B)ᵀ, so that no gradient has the size of W.

Source: Hu et al. 2021, arXiv:2106.09685; with rslora Kalajdzievski 2023, arXiv:2312.03732.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import jax
import numpy as np

from dppa_jax.architecture.row import WRAPPED
from dppa_jax.architecture.specs import TensorSpec
from dppa_jax.architecture.table import architecture_of
from dppa_jax.checkpoint.adapter import PREFIX
from dppa_jax.config.finetune import Lora
from dppa_jax.config.option import choose
from dppa_jax.model import DecoderConfig, abstract_tree
from dppa_jax.model.config import ModelConfig

A, B = "_lora_a", "_lora_b"
LETTERS = {A: "A", B: "B"}


def trained_tree(config: ModelConfig, lora: Lora) -> dict:
    """Return what is trained, as shapes: all weights or, with a rank, the factors.

    Raises:
      ValueError: the model has no linear of a name in `lora.targets`.
    """
    tree = abstract_tree(config)
    if not lora.rank:
        return tree
    linears = _linears(tree)
    chosen = {choose("--lora_targets", name, linears) for name in lora.targets} or set(linears)
    factors: dict[str, dict] = {}
    for name, block in linears.items():
        if name in chosen:
            layers, rows, columns = tree["layers"][block][name].shape
            shapes = {A: (layers, lora.rank, columns), B: (layers, rows, lora.rank)}
            made = {name + end: jax.ShapeDtypeStruct(shape, np.float32) for end, shape in shapes.items()}
            factors.setdefault(block, {}).update(made)
    return {"layers": factors}


def first_factors(config: DecoderConfig, lora: Lora, seed: int) -> dict:
    """Return the factors of the first step, as peft begins: A uniform within ±1/√in, B zero, so nothing changes."""
    generator = np.random.default_rng(seed)

    def drawn(path, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1].key.endswith(B):
            return np.zeros(leaf.shape, np.float32)
        bound = leaf.shape[-1] ** -0.5
        return generator.uniform(-bound, bound, leaf.shape).astype(np.float32)

    return jax.tree.map_with_path(drawn, trained_tree(config, lora))


def whole_tree(base: dict | None, trained: dict, lora: Lora) -> dict:
    """Return the tree that a forward pass takes: what is trained or, with a rank, the base with scaled factors."""
    if not lora.rank:
        return trained
    layers = dict(base["layers"])
    for block, factors in trained["layers"].items():
        scaled = {name: value * lora.scale if name.endswith(B) else value for name, value in factors.items()}
        layers[block] = layers[block] | scaled
    return {**base, "layers": layers}


def adapter_tensors(factors: Mapping, specs: Mapping[str, TensorSpec]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of an adapter by their names in peft's files, of factors that are whole on this machine."""
    for spec in specs.values():
        place = factors["layers"].get(spec.path[1], {}) if spec.layer is not None and spec.linear is not None else {}
        for end, letter in LETTERS.items():
            if (stacked := place.get(spec.path[-1] + end)) is not None:
                module = spec.name.removesuffix(".weight")
                yield f"{PREFIX}{module}.lora_{letter}.weight", np.asarray(stacked)[spec.index]


def with_targets(lora: Lora, config: Mapping) -> Lora:
    """Return what is trained of a model, with the names of all linears that have factors.

    Args:
      config: the content of config.json.

    Raises:
      ValueError: peft cannot load factors of such a linear, as its module in transformers is another.
    """
    if not lora.rank:
        return lora
    row = architecture_of(config)
    if row.own_heads:
        raise ValueError("--lora_rank: adapters of encoders are not trained here; leave it out: all weights are.")
    if WRAPPED in config:
        raise ValueError("--lora_rank: a model of images and text has other modules; give the text model alone.")
    fused = {kind.rpartition(".")[2]: one.name for one in row.fused if one.always for kind in one.kinds}
    linears = _linears(abstract_tree(DecoderConfig.from_hf(config)))
    for name in lora.targets:
        if name in fused:
            raise ValueError(
                f"--lora_targets={name}: it is a part of {fused[name]} in this family, for which peft has one pair of "
                f"factors; choose among {', '.join(one for one in linears if one not in fused)}."
            )
        choose("--lora_targets", name, linears)
    return replace(lora, targets=lora.targets or tuple(name for name in linears if name not in fused))


def adapter_config(base: str, lora: Lora) -> dict:
    """Return the content of adapter_config.json."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "use_rslora": lora.rslora,
        "target_modules": list(lora.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _linears(tree: Mapping) -> dict[str, str]:
    """Return the linears of a layer by name, with the block that each is in; a mixture's experts are not among them."""
    blocks = ("self_attn", "mlp")
    return {name: block for block in blocks for name in tree["layers"][block] if name.endswith("_proj")}
