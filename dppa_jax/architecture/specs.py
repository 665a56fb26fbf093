"""Tensor names and shapes of a LLaMA checkpoint, from its config.json alone."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)  # the order of the authors' tables

ARCHITECTURES = ("LlamaForCausalLM",)
MODEL_TYPES = ("llama",)  # of a config.json that lists no architectures
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim")
DEQUANTISE = (
    "Quantised weights have no delta to a base: take the model as it was before quantisation, or dequantise it "
    "(transformers: model.dequantize().save_pretrained(DIR))."
)
IGNORED = re.compile(r".*rotary_emb\.inv_freq$")  # a buffer that older exports carry


class CheckpointError(ValueError):
    """A checkpoint, or a set of them, that cannot be merged: names the file, the tensor and the fix."""


@dataclass(frozen=True)
class TensorSpec:
    name: str
    shape: tuple[int, ...]
    layer: int | None = None
    linear: int | None = None  # index into LINEARS; None: not pruned

    @property
    def rows(self) -> int:
        """Rows and columns of the tensor as a matrix; vectors are one row."""
        return self.shape[0] if len(self.shape) == 2 else 1

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def path(self) -> tuple[str, ...]:
        """Where the tensor is in the tree: ('layers', 'self_attn', 'q_proj'), ('embed_tokens',)."""
        parts = self.name.removeprefix("model.").split(".")
        parts = [p for p in parts if not p.isdigit()]
        return tuple(parts[:-1] if parts[-1] == "weight" else [*parts[:-2], f"{parts[-2]}_{parts[-1]}"])


def linear_name(layer: int, linear: int) -> str:
    return f"model.layers.{layer}.{LINEARS[linear]}.weight"


def check_config(config: Mapping, where: Path | str) -> None:
    """Refuse a config.json that is not that of an unquantised LLaMA with all its sizes; `where` is its path."""
    listed = config.get("architectures")
    found = listed[0] if listed else config.get("model_type", "unknown")
    if found not in (ARCHITECTURES if listed else MODEL_TYPES):
        supported = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"{where}: architecture {found!r} is not supported; supported: {supported}.")
    if quantisation := config.get("quantization_config"):
        method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, Mapping) else quantisation
        raise CheckpointError(f"{where}: the weights are quantised (quant_method {method!r}). {DEQUANTISE}")
    for key in SIZES:
        if key not in config:
            raise CheckpointError(f"{where}: has no {key!r}; download config.json again from where the weights came.")
    for key in (*SIZES, *OPTIONAL_SIZES):
        value = config.get(key)
        if (key in SIZES or value is not None) and (type(value) is not int or value < 1):
            raise CheckpointError(f"{where}: {key} is {value!r}, it must be a positive integer.")
    heads, keys = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    if heads % keys or (config["hidden_size"] % heads and not config.get("head_dim")):
        raise CheckpointError(
            f"{where}: num_attention_heads {heads} does not fit num_key_value_heads {keys} and hidden_size "
            f"{config['hidden_size']}; it must be a multiple of the one and divide the other."
        )


def with_dtype(config: Mapping, dtype: str) -> dict:
    """The config of weights of a dtype, under the key it has already: transformers 4 writes torch_dtype, 5 dtype."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    return {**config, **dict.fromkeys(keys, dtype)}


def tensor_specs(config: Mapping) -> dict[str, TensorSpec]:
    """Every tensor of the model, in the order of the file: embeddings, layers, norm, head."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    queries, keys = heads * head, (config.get("num_key_value_heads") or heads) * head
    inner = config["intermediate_size"]
    shapes = ((queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries))
    shapes += ((inner, hidden), (inner, hidden), (hidden, inner))

    specs = [TensorSpec("model.embed_tokens.weight", (vocabulary, hidden))]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for j, (linear, shape) in enumerate(zip(LINEARS, shapes, strict=True)):
            specs.append(TensorSpec(f"{prefix}{linear}.weight", shape, layer, j))
            biased = config.get("attention_bias") if linear.startswith("self_attn") else config.get("mlp_bias")
            if biased:
                specs.append(TensorSpec(f"{prefix}{linear}.bias", shape[:1], layer))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            specs.append(TensorSpec(f"{prefix}{norm}.weight", (hidden,), layer))
    specs.append(TensorSpec("model.norm.weight", (hidden,)))
    if not config.get("tie_word_embeddings", False):
        specs.append(TensorSpec("lm_head.weight", (vocabulary, hidden)))
    return {spec.name: spec for spec in specs}


def by_path(specs: Iterable[TensorSpec]) -> dict[tuple[str, ...], list[TensorSpec]]:
    """The tensors of each place in the tree: one, or that of every layer in order."""
    places: dict[tuple[str, ...], list[TensorSpec]] = {}
    for spec in specs:
        places.setdefault(spec.path, []).append(spec)
    return places


def stacked_shape(group: Sequence[TensorSpec]) -> tuple[int, ...]:
    """Of the array at a place of the tree: layers first, where every layer has such a tensor."""
    first = group[0]
    return first.shape if first.layer is None else (len(group), *first.shape)


def tree_of(specs: Iterable[TensorSpec], make: Callable[[list[TensorSpec]], Any]) -> dict:
    """The tree, of what `make` gives for the tensors of each place."""
    tree: dict = {}
    for (*parents, leaf), group in by_path(specs).items():
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = make(group)
    return tree
