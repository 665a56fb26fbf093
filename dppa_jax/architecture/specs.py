"""The tensors of a checkpoint: name, shape, role and layer of each, from config.json alone."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from jaxtyping import Int

from dppa_jax.architecture.row import PRUNED, WRAPPED, Architecture, Group, Linear, Norm, Role, wrapped
from dppa_jax.architecture.table import architecture_of, known

ROOT = re.compile(r"^(model|bert|roberta)\.")  # is no part of a tensor's place in the tree
OUTSIDE = -1  # in place of a layer
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim")
LARGEST = 10_000_000  # of a size in config.json; the largest vocabulary of a model is a tenth of it
MOST_LAYERS = 2_000
QUANTISATION = "quantization_config"  # a key of config.json
DEQUANTISE = (
    "Quantised weights have no delta to a base: take the model as it was before quantisation, or give --dequantise, "
    "which reads FP8, MXFP4 and compressed-tensors as bfloat16."
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


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor as a matrix: a vector or a number is one row, more axes than two are columns."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def row_pieces(rows: int, columns: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut the rows of a matrix into pieces of at most `most` elements, or of one row where a row has more.

    >>> list(row_pieces(5, columns=3, most=6))
    [(0, 2), (2, 4), (4, 5)]
    """
    step = max(1, most // max(1, columns))
    yield from ((start, min(start + step, rows)) for start in range(0, rows, step))


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint.

    Attributes:
      name: as this package calls it in tables, recipes and rules; a file may call it otherwise, see `layout`.
      kind: its name within a layer, without ".weight": "self_attn.q_proj"; outside the layers the whole name. The
        experts of a mixture have one kind: "mlp.experts.gate_proj".
      layer: the decoder layer that it belongs to, counted from 0; None outside the layers.
      linear: its place on the axis of linears (`Linears`); None for a tensor that is not pruned.
      index: its place in the array of the tree that it belongs to: its layer among those that have such a tensor and,
        in a mixture, its expert. Empty outside the layers.
      stored: its name in most files, where that is another.
      head: is it of a head: what turns last hidden states into logits?
      group: the heads or neurons of a linear; None for any other tensor, and where they are not known.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    kind: str
    layer: int | None = None
    linear: int | None = None
    index: tuple[int, ...] = ()
    stored: str = ""
    head: bool = False
    group: Group | None = None

    @property
    def rows(self) -> int:
        """Rows of the tensor as a matrix; a vector is one row."""
        return matrix_shape(self.shape)[0]

    @property
    def columns(self) -> int:
        """Columns of the tensor as a matrix."""
        return matrix_shape(self.shape)[1]

    @property
    def path(self) -> tuple[str, ...]:
        """The place of the tensor in the tree: ('layers', 'self_attn', 'q_proj'), ('embed_tokens',)."""
        parts = ROOT.sub("", self.name).replace("encoder.layer.", "layers.", 1).split(".")
        parts = [p for p in parts if not p.isdigit()]
        return tuple(parts[:-1] if parts[-1] == "weight" else [*parts[:-2], f"{parts[-2]}_{parts[-1]}"])


@dataclass(frozen=True)
class Linears:
    """The tensors of a model that are pruned, on one axis in the order of the file, with layer and kind beside it.

    Every table of a merge (rates, thresholds, densities, weights) has this axis last. These are the linears of the
    layers, and with `--prune` more.
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
        """Every kind within the layers once, in the order in which they first come."""
        return tuple(dict.fromkeys(spec.kind for spec in self.specs if spec.layer is not None))

    @cached_property
    def layer(self) -> Int[np.ndarray, " linears"]:
        """The layer of each linear; OUTSIDE for what is outside the layers."""
        return np.array([OUTSIDE if spec.layer is None else spec.layer for spec in self.specs], np.int64)

    @property
    def layers(self) -> int:
        """How many layers there are, up to the last one that has a linear."""
        return int(self.layer.max(initial=-1)) + 1

    @cached_property
    def numel(self) -> np.ndarray:
        """Parameters of each linear, (linears,) float64."""
        return np.array([spec.rows * spec.columns for spec in self.specs], np.float64)

    def by_layer(self, values: np.ndarray) -> np.ndarray:
        """Spread one value per linear over a table (layers, kinds); NaN where a layer has no linear of a kind.

        Of the experts of a mixture, which have one kind, it has the mean. What is outside the layers is left out.
        """
        places, inside = {kind: place for place, kind in enumerate(self.kinds)}, self.layer != OUTSIDE
        kinds = [places[spec.kind] for spec in self.specs if spec.layer is not None]
        at = self.layer[inside], np.array(kinds, np.int64)
        table, count = np.zeros((2, self.layers, len(self.kinds)))
        np.add.at(table, at, np.asarray(values)[inside])
        np.add.at(count, at, 1)
        return np.divide(table, count, out=np.full_like(table, np.nan), where=count > 0)

    def named(self, values: np.ndarray) -> dict[str, float]:
        """One value per linear by the tensor's name, as JSON can say it."""
        return dict(zip(self.names, values.tolist(), strict=True))


def linears_of(specs: Mapping[str, TensorSpec]) -> Linears:
    """The axis of the linears among these tensors."""
    return Linears(tuple(spec for spec in specs.values() if spec.linear is not None))


def pruned_specs(specs: Mapping[str, TensorSpec], prune: str) -> dict[str, TensorSpec]:
    """The tensors, of which those that `--prune` names, a key of `PRUNED`, have a place on the axis of linears."""
    chosen = [name for name, spec in specs.items() if PRUNED[prune](spec.role, spec.head)]
    place = {name: number for number, name in enumerate(chosen)}
    return {name: replace(spec, linear=place.get(name)) for name, spec in specs.items()}


def layer_count(specs: Mapping[str, TensorSpec]) -> int:
    """Decoder layers of a model with these tensors."""
    return 1 + max((spec.layer for spec in specs.values() if spec.layer is not None), default=-1)


def first_linear(specs: Mapping[str, TensorSpec]) -> TensorSpec:
    """The linear whose dtype is called the model's; norms may have another."""
    return next(spec for spec in specs.values() if spec.role is Role.LINEAR)


def check_config(config: Mapping, where: Path | str) -> None:
    """Refuse a config.json that is not that of an unquantised model, with sizes that a model can have.

    The sizes are looked at where the table has the architecture; of others only the tensors are.

    Args:
      where: the path of config.json, for the message.
    """
    try:
        msgspec.convert(dict(config), ConfigShape)
    except (msgspec.ValidationError, RecursionError) as error:
        raise CheckpointError(f"{where}: {error}. Correct it, or download it again.") from None
    if quantisation := config.get(QUANTISATION):
        method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, Mapping) else quantisation
        raise CheckpointError(f"{where}: the weights are quantised (quant_method {method!r:.99}). {DEQUANTISE}")
    if architecture := known(config):
        _check_sizes(architecture, config, where)


def _check_sizes(architecture: Architecture, config: Mapping, where: Path | str) -> None:
    """Refuse sizes that no model of the row can have."""
    said = architecture.said(config)
    for keys in architecture.required:
        if not any(key in said for key in keys):
            again = "download config.json again from where the weights came."
            raise CheckpointError(f"{where}: has no {' or '.join(map(repr, keys))}; {again}")
        key = next(key for key in keys if key in said)
        _check_size(said[key], key, MOST_LAYERS if key == "num_hidden_layers" else LARGEST, where)
    for key in OPTIONAL_SIZES:
        if said.get(key) is not None:
            _check_size(said[key], key, LARGEST, where)
    heads, keys = said["num_attention_heads"], said.get("num_key_value_heads") or said["num_attention_heads"]
    if heads % keys or (said["hidden_size"] % heads and not said.get("head_dim")):
        raise CheckpointError(
            f"{where}: num_attention_heads {heads} does not fit num_key_value_heads {keys} and hidden_size "
            f"{said['hidden_size']}; it must be a multiple of the one and divide the other."
        )


def _check_size(value: Any, key: str, most: int, where: Path | str) -> None:
    """Refuse what is no size of a model."""
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{where}: {key} is {value!r:.99}, it must be a positive integer.")
    if value > most:
        raise CheckpointError(f"{where}: {key} is {value!s:.30}, a model has at most {most}; correct it.")


def with_dtype(config: Mapping, dtype: str) -> dict | None:
    """Return the config.json of an output whose weights have a dtype; None if the model has none.

    The dtype stands under the key that is there: transformers 4 writes torch_dtype, 5 dtype. An auto_map is left out,
    as it names files of code, which are never copied.
    """
    if not config:
        return None
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    changed = {key: value for key, value in config.items() if key != "auto_map"} | dict.fromkeys(keys, dtype)
    if inner := wrapped(config):
        changed[WRAPPED] = {**inner, **{key: dtype for key in ("dtype", "torch_dtype") if key in inner}}
    return changed


def tensor_specs(config: Mapping) -> dict[str, TensorSpec]:
    """Every tensor of the model, in the order of the file: embeddings, layers, norm, head.

    Raises:
      ValueError: the table of architectures has no row for this config.json.
    """
    return _Specs(architecture_of(config), config).all()


class _Specs:
    """Collects the tensors of a model of the table."""

    def __init__(self, architecture: Architecture, config: Mapping):
        self.architecture, self.said = architecture, architecture.said(config)
        self.sizes, self.tied = architecture.sizes(config), tied_heads(config)
        self.specs: dict[str, TensorSpec] = {}
        self.linears = 0
        self.having: dict[str, int] = {}  # layers so far that have a kind

    def all(self) -> dict[str, TensorSpec]:
        """The tensors by name."""
        row = self.architecture
        for name in row.embeddings:
            self.add(f"{name}.weight", ("vocabulary", "hidden"), Role.VOCABULARY, name)
        for name, sizes, role, _ in row.outside:
            self.add(name, sizes, role, name.removesuffix(".weight"))
        for layer in range(self.said["num_hidden_layers"]):
            self.add_layer(layer)
        for norm in row.final_norms:
            self.add_norm(norm)
        for name in row.heads:
            if f"{name}.weight" not in self.tied:
                self.add(f"{name}.weight", ("vocabulary", "hidden"), Role.VOCABULARY, name, head=True)
        return self.specs

    def add_layer(self, layer: int) -> None:
        """Add the tensors of a layer: linears with their biases, norms, others."""
        row, said = self.architecture, self.said
        mlp = "sparse" if row.sparse and row.sparse(said, layer) else "dense"
        linears = [linear for linear in row.linears if linear.mlp in ("", mlp)]
        each = [linear for linear in linears if "{}" in linear.kind]
        for linear in (one for one in linears if one not in each):
            self.add_linear(linear, layer)
        for expert in range(self.sizes["experts"] if each else 0):
            for linear in each:
                self.add_linear(linear, layer, expert)
        for norm in row.norms:
            self.add_norm(norm, layer)
        for name, sizes, role, given in row.others:
            if not given or said.get(given):
                self.add(f"{row.layer.format(layer)}{name}", sizes, role, name, layer)

    def add_norm(self, norm: Norm, layer: int | None = None) -> None:
        """Add a norm and its bias, of a layer or after them all."""
        prefix = "" if layer is None else self.architecture.layer.format(layer)
        self.add(f"{prefix}{norm.kind}.weight", (norm.size,), Role.NORM, norm.kind, layer)
        if norm.bias:
            self.add(f"{prefix}{norm.kind}.bias", (norm.size,), Role.BIAS, f"{norm.kind}.bias", layer)

    def add_linear(self, linear: Linear, layer: int, expert: int | None = None) -> None:
        """Add a linear of a layer or, of a mixture, of one of its experts, and its bias."""
        prefix, kind = self.architecture.layer.format(layer), linear.kind.replace(".{}", "")
        name = prefix + linear.kind.format(expert)
        stored = f"{prefix}{linear.stored.format(expert)}.weight" if linear.stored else ""
        shape, group = (linear.rows, linear.columns), linear.group(prefix, self.sizes, expert)
        self.add(f"{name}.weight", shape, linear.role, kind, layer, stored, expert, group=group)
        if linear.has_bias(self.said):
            self.add(f"{name}.bias", (linear.rows,), Role.BIAS, f"{kind}.bias", layer)

    def add(
        self,
        name: str,
        shape: Sequence[str],
        role: Role,
        kind: str,
        layer: int | None = None,
        stored: str = "",
        expert: int | None = None,
        head: bool = False,
        group: Group | None = None,
    ) -> None:
        """Add a tensor whose shape is said by the names of sizes."""
        place = self.linears if role is Role.LINEAR else None
        self.linears += role is Role.LINEAR
        index = ()
        if layer is not None:
            self.having[kind] = self.having.get(kind, 0) + (not expert)
            index = (self.having[kind] - 1,) if expert is None else (self.having[kind] - 1, expert)
        own = role, kind, layer, place, index, stored, head, group
        self.specs[name] = TensorSpec(name, tuple(self.sizes[size] for size in shape), *own)


def tied_heads(config: Mapping) -> dict[str, str]:
    """The names of heads that are the embeddings, with the names of these; empty where the head is its own.

    Some files carry such a head, as a copy.
    """
    architecture = known(config)
    if not architecture or not architecture.said(config).get("tie_word_embeddings"):
        return {}
    pairs = zip(architecture.heads, architecture.embeddings, strict=False)  # an encoder has no head here
    return {f"{head}.weight": f"{embeddings}.weight" for head, embeddings in pairs}


def by_path(specs: Iterable[TensorSpec]) -> dict[tuple[str, ...], list[TensorSpec]]:
    """The tensors of each place in the tree: one, or that of every layer in order."""
    places: dict[tuple[str, ...], list[TensorSpec]] = {}
    for spec in specs:
        places.setdefault(spec.path, []).append(spec)
    return places


def stacked_shape(group: Sequence[TensorSpec]) -> tuple[int, ...]:
    """The shape of the array at a place of the tree: layers first, then the experts of a mixture."""
    return tuple(1 + last for last in group[-1].index) + group[0].shape


def tree_of(specs: Iterable[TensorSpec], make: Callable[[list[TensorSpec]], Any]) -> dict:
    """The tree, of what `make` gives for the tensors of each place."""
    tree: dict = {}
    for (*parents, leaf), group in by_path(specs).items():
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = make(group)
    return tree
