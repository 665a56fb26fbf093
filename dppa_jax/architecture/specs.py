"""The tensors of a checkpoint: name, shape, role and layer of each, from config.json alone."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from jaxtyping import Int

from dppa_jax.architecture.table import architecture_of

OPTIONAL_SIZES = ("num_key_value_heads", "head_dim")
LARGEST = 10_000_000  # of a size in config.json; the largest vocabulary of a model is a tenth of it
MOST_LAYERS = 2_000
QUANTISATION = "quantization_config"  # a key of config.json
DEQUANTISE = (
    "Quantised weights have no delta to a base: take the model as it was before quantisation, or dequantise it "
    "(transformers: model.dequantize().save_pretrained(DIR))."
)


class CheckpointError(ValueError):
    """A checkpoint, or a set of them, that cannot be merged: names the file, the tensor and the fix."""


Whole = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Tokens = Whole | list[Whole] | None


class RopeShape(msgspec.Struct):
    """The types of what is read of rotary embeddings; see `ConfigShape`."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: float | None = None
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: float | None = None


class ConfigShape(msgspec.Struct):
    """The types of what is read from a config.json; other keys may hold anything.

    Every key may be absent, and most may be null. Sizes are not among them, as their messages say more.
    """

    architectures: list[str] | None = None
    model_type: str | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    hidden_act: str | None = None
    rms_norm_eps: float = 0.0
    max_position_embeddings: Whole = 0
    rope_theta: float | None = None
    rope_scaling: RopeShape | None = None
    rope_parameters: RopeShape | None = None
    bos_token_id: Tokens = None
    eos_token_id: Tokens = None
    pad_token_id: Tokens = None


class Role(StrEnum):
    """What a tensor is to a merge. Only linears are pruned; every other tensor carries its dense delta."""

    LINEAR = "linear"
    BIAS = "bias"
    NORM = "norm"
    VOCABULARY = "vocabulary"  # its rows are tokens: an expert may have more of them than the base


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint.

    Attributes:
      kind: its name within a layer, without ".weight": "self_attn.q_proj"; outside the layers the whole name.
      layer: the decoder layer that it belongs to, counted from 0; None outside the layers.
      linear: its place on the axis of linears (`Linears`); None for a tensor that is not pruned.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    kind: str
    layer: int | None = None
    linear: int | None = None

    @property
    def rows(self) -> int:
        """Rows of the tensor as a matrix; a vector is one row."""
        return self.shape[0] if len(self.shape) == 2 else 1

    @property
    def columns(self) -> int:
        """Columns of the tensor as a matrix."""
        return self.shape[-1]

    @property
    def path(self) -> tuple[str, ...]:
        """The place of the tensor in the tree: ('layers', 'self_attn', 'q_proj'), ('embed_tokens',)."""
        parts = self.name.removeprefix("model.").split(".")
        parts = [p for p in parts if not p.isdigit()]
        return tuple(parts[:-1] if parts[-1] == "weight" else [*parts[:-2], f"{parts[-2]}_{parts[-1]}"])


@dataclass(frozen=True)
class Linears:
    """The matrices of a model that are pruned, on one axis in the order of the file, with layer and kind beside it.

    Every table of a merge (rates, thresholds, densities, weights) has this axis last.
    """

    specs: tuple[TensorSpec, ...]

    def __len__(self) -> int:
        return len(self.specs)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The tensors' names."""
        return tuple(spec.name for spec in self.specs)

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Every kind once, in the order in which they first come."""
        return tuple(dict.fromkeys(spec.kind for spec in self.specs))

    @cached_property
    def layer(self) -> Int[np.ndarray, " linears"]:
        """The layer of each linear."""
        return np.array([spec.layer for spec in self.specs], np.int64)

    @property
    def layers(self) -> int:
        """How many layers there are, up to the last one that has a linear."""
        return int(self.layer.max(initial=-1)) + 1

    @cached_property
    def numel(self) -> np.ndarray:
        """Parameters of each linear, (linears,) float64."""
        return np.array([spec.rows * spec.columns for spec in self.specs], np.float64)

    def by_layer(self, values: np.ndarray) -> np.ndarray:
        """Spread one value per linear over a table (layers, kinds); NaN where a layer has no linear of a kind."""
        table = np.full((self.layers, len(self.kinds)), np.nan)
        table[self.layer, [self.kinds.index(spec.kind) for spec in self.specs]] = values
        return table

    def named(self, values: np.ndarray) -> dict[str, float]:
        """One value per linear by the tensor's name, as JSON can say it."""
        return dict(zip(self.names, values.tolist(), strict=True))


def linears_of(specs: Mapping[str, TensorSpec]) -> Linears:
    """The axis of the linears among these tensors."""
    return Linears(tuple(spec for spec in specs.values() if spec.linear is not None))


def layer_count(specs: Mapping[str, TensorSpec]) -> int:
    """Decoder layers of a model with these tensors."""
    return 1 + max(spec.layer for spec in specs.values() if spec.layer is not None)


def first_linear(specs: Mapping[str, TensorSpec]) -> TensorSpec:
    """The linear whose dtype is called the model's; norms may have another."""
    return next(spec for spec in specs.values() if spec.role is Role.LINEAR)


def check_config(config: Mapping, where: Path | str) -> None:
    """Refuse a config.json that is not that of an unquantised model of the table, with sizes that a model can have.

    Args:
      where: the path of config.json, for the message.
    """
    try:
        architecture = architecture_of(config)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None
    try:
        msgspec.convert(dict(config), ConfigShape)
    except (msgspec.ValidationError, RecursionError) as error:
        raise CheckpointError(f"{where}: {error}. Correct it, or download it again.") from None
    if quantisation := config.get(QUANTISATION):
        method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, Mapping) else quantisation
        raise CheckpointError(f"{where}: the weights are quantised (quant_method {method!r:.99}). {DEQUANTISE}")
    required = architecture.required
    for key in required:
        if key not in config:
            raise CheckpointError(f"{where}: has no {key!r}; download config.json again from where the weights came.")
    for key in (*required, *OPTIONAL_SIZES):
        most = MOST_LAYERS if key == "num_hidden_layers" else LARGEST
        if key in required or config.get(key) is not None:
            _check_size(config[key], key, most, where)
    said = architecture.said(config)
    heads, keys = said["num_attention_heads"], said.get("num_key_value_heads") or said["num_attention_heads"]
    if heads % keys or (said["hidden_size"] % heads and not said.get("head_dim")):
        raise CheckpointError(
            f"{where}: num_attention_heads {heads} does not fit num_key_value_heads {keys} and hidden_size "
            f"{config['hidden_size']}; it must be a multiple of the one and divide the other."
        )


def _check_size(value: Any, key: str, most: int, where: Path | str) -> None:
    """Refuse what is no size of a model."""
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{where}: {key} is {value!r:.99}, it must be a positive integer.")
    if value > most:
        raise CheckpointError(f"{where}: {key} is {value!s:.30}, a model has at most {most}; correct it.")


def with_dtype(config: Mapping, dtype: str) -> dict:
    """Return the config.json of an output whose weights have a dtype.

    The dtype stands under the key that is there: transformers 4 writes torch_dtype, 5 dtype. An auto_map is left out,
    as it names files of code, which are never copied.
    """
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    return {key: value for key, value in config.items() if key != "auto_map"} | dict.fromkeys(keys, dtype)


def tensor_specs(config: Mapping) -> dict[str, TensorSpec]:
    """Every tensor of the model, in the order of the file: embeddings, layers, norm, head."""
    architecture = architecture_of(config)
    sizes, said = architecture.sizes(config), architecture.said(config)
    specs: dict[str, TensorSpec] = {}
    linears = 0

    def add(name: str, shape: Sequence[str], role: Role, kind: str, layer: int | None = None) -> None:
        nonlocal linears
        place = linears if role is Role.LINEAR else None
        linears += role is Role.LINEAR
        specs[name] = TensorSpec(name, tuple(sizes[size] for size in shape), role, kind, layer, place)

    def add_outside(names: Iterable[str], role: Role, shape: Sequence[str]) -> None:
        for name in names:
            add(f"{name}.weight", shape, role, name)

    add_outside(architecture.embeddings, Role.VOCABULARY, ("vocabulary", "hidden"))
    for layer in range(config["num_hidden_layers"]):
        prefix = architecture.layer.format(layer)
        for linear in architecture.linears:
            add(f"{prefix}{linear.kind}.weight", (linear.rows, linear.columns), Role.LINEAR, linear.kind, layer)
            if linear.has_bias(said):
                add(f"{prefix}{linear.kind}.bias", (linear.rows,), Role.BIAS, f"{linear.kind}.bias", layer)
        for norm in architecture.norms:
            add(f"{prefix}{norm.kind}.weight", (norm.size,), Role.NORM, norm.kind, layer)
    add_outside(architecture.final_norms, Role.NORM, ("hidden",))
    if not tied_heads(config):
        add_outside(architecture.heads, Role.VOCABULARY, ("vocabulary", "hidden"))
    return specs


def tied_heads(config: Mapping) -> dict[str, str]:
    """The names of heads that are the embeddings, with the names of these; empty where the head is its own.

    Some files carry such a head, as a copy.
    """
    architecture = architecture_of(config)
    if not architecture.said(config).get("tie_word_embeddings"):
        return {}
    pairs = zip(architecture.heads, architecture.embeddings, strict=True)
    return {f"{head}.weight": f"{embeddings}.weight" for head, embeddings in pairs}


def by_path(specs: Iterable[TensorSpec]) -> dict[tuple[str, ...], list[TensorSpec]]:
    """The tensors of each place in the tree: one, or that of every layer in order."""
    places: dict[tuple[str, ...], list[TensorSpec]] = {}
    for spec in specs:
        places.setdefault(spec.path, []).append(spec)
    return places


def stacked_shape(group: Sequence[TensorSpec]) -> tuple[int, ...]:
    """The shape of the array at a place of the tree: layers first, where every layer has such a tensor."""
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
