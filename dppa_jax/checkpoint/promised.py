"""What config.json promises of the tensors, held against what the files have."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from dppa_jax.architecture.generic import Stated, dense_role, recognise, stated_specs
from dppa_jax.architecture.layout import Place, find_layout
from dppa_jax.architecture.row import WRAPPED, Role, wrapped
from dppa_jax.architecture.specs import (
    QUANTISATION,
    CheckpointError,
    TensorSpec,
    check_config,
    matrix_shape,
    row_pieces,
    tensor_specs,
    tied_heads,
)
from dppa_jax.architecture.table import architecture_of, known, vocabulary_size
from dppa_jax.checkpoint.headers import DTYPE_BY_CODE, NO_WEIGHT, UnfitError, shown
from dppa_jax.checkpoint.protocol import Stored

NO_WEIGHT_CODES = {dtype: code for code, dtype in NO_WEIGHT.items()}
ADAPTER = re.compile(r"^base_model\.model\.|\.(base_layer|modules_to_save)\.|\.lora_")
POOLER = "pooler."  # of an encoder; files of a model without a head leave out what all names begin with
PIECE = 1 << 22  # bytes of each of two tensors that are compared at a time


class Promised:
    """The tensors that a model must have, and where they lie in its files.

    Args:
      config: the content of config.json; its row of the table of architectures promises the tensors.
      stored: those of the files.
      stated: what they are in place of that, or `GENERIC`.

    Attributes:
      specs: by name.
      layout: found leniently; `check` refuses files that do not fit.
      stated: what the tensors are if no row promises them.
    """

    def __init__(self, config: Mapping, stored: Mapping[str, Stored], stated: Stated | str | None = None):
        shapes = {name: tensor.shape for name, tensor in stored.items()}
        row = None if stated else known(config)
        self.config, self._row, self._stored, self.stated = config, row, stored, None
        if row:
            self.specs, said = tensor_specs(config), row.said(config)
            self.layout = find_layout(row, said, self.specs, shapes, tied_heads(config))
            if row.own_heads:
                self._add_own_heads(shapes)
        else:
            other = [name for name, tensor in stored.items() if tensor.dtype not in DTYPE_BY_CODE.values()]
            given = isinstance(stated, Stated)
            self.stated = stated if given else recognise(shapes, vocabulary_size(config), other)
            self.specs, self.layout = stated_specs(self.stated, shapes)

    @property
    def tensors(self) -> dict[str, Stored]:
        """Where each tensor lies: those of the model by their names here, all others by their names in the files."""
        places = self.layout.places
        tensors = {name: self._stored[place.stored].at(place, self._shape(name)) for name, place in places.items()}
        return tensors | {name: self._stored[name] for name in self.layout.rest}

    def check(self, directory: Path) -> None:
        """Refuse files that lack a tensor, have it in another shape or dtype, or have others.

        Raises:
          UnfitError: names the file, the tensor and the fix.
        """
        missing = [name for name in self.specs if name not in self.layout.places]
        extra = [] if self._may_have_more else list(self.layout.rest)
        if self.layout.unfit:
            name, wanted = next(iter(self.layout.unfit.items()))
            tensor = self._stored[name]
            raise UnfitError(
                f"{tensor.file}: {name} has shape {tensor.shape}, config.json says {wanted}; config.json does not "
                f"belong to these weights."
            )
        if extra:
            raise UnfitError(f"{directory}: {_about_extra(self._stored[extra[0]].file.name, extra, missing)}")
        if missing:
            raise UnfitError(f"{directory}: {_about_missing(missing, self.config)}")
        tensors = self.tensors
        for name, spec in self.specs.items():
            if tensors[name].shape != spec.shape:
                raise UnfitError(f"{tensors[name].file}: {_about_shape(spec, tensors[name].shape)}")
            if (code := NO_WEIGHT_CODES.get(tensors[name].dtype)) is not None:
                raise UnfitError(
                    f"{tensors[name].file}: {shown(name)} is stored as {code}; weights must be "
                    f"{', '.join(DTYPE_BY_CODE)}. It is no weight: leave it out of the file."
                )

    @property
    def tied(self) -> dict[str, str]:
        """Heads that config.json calls the embeddings, with the names of these; files may have such a head."""
        if self._row:
            return tied_heads(self.config)
        said = {**wrapped(self.config), **self.config}
        tokens = [spec for spec in self.specs.values() if spec.role is Role.VOCABULARY]
        if not said.get("tie_word_embeddings") or len(tokens) != 2 or tokens[0].shape != tokens[1].shape:
            return {}
        return {tokens[1].name: tokens[0].name}

    @property
    def _may_have_more(self) -> bool:
        """May the files have tensors that are no part of what is merged: those of a model of images and text?"""
        return not self._row or isinstance(self.config.get(WRAPPED), Mapping)

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.specs[name].shape if name in self.specs else self._stored[self.layout.places[name].stored].shape

    def _add_own_heads(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Add what the files have beyond the row: a pooler, and the head of the model's own task."""
        layout, root = self.layout, self._row.root
        for stored in layout.rest:
            name = root + stored if stored.startswith(POOLER) else stored
            role, kind = dense_role(name, shapes[stored]), name.removesuffix(".weight")
            self.specs[name] = TensorSpec(name, shapes[stored], role, kind, head=not name.startswith(root))
            layout.places[name], layout.shapes[stored] = Place(stored), shapes[stored]
        layout.rest = ()


def drop_tied_heads(source: Any, tied: Mapping[str, str], specs: dict[str, TensorSpec]) -> None:
    """Drop heads that are copies of the embeddings from the tensors of a source, which can read them.

    Args:
      source: a model.
      tied: the names of heads that should be copies, with those of the embeddings.
      specs: of the source; such a head is taken out.

    Raises:
      CheckpointError: a head is another matrix, although config.json says that it is the embeddings.
    """
    for head, embeddings in tied.items():
        if head not in source.tensors or embeddings not in source.tensors:
            continue
        if not same_bits((source, head), (source, embeddings)):
            raise CheckpointError(
                f"{source.tensors[head].file}: {head} is not {embeddings}, though config.json says that they are one "
                f"(tie_word_embeddings). If the head was trained, set tie_word_embeddings to false there; if not, save "
                f"the model without {head}."
            )
        del source.tensors[head]
        specs.pop(head, None)
        if layout := getattr(source, "layout", None):
            del layout.shapes[layout.places.pop(head).stored]


def same_bits(one: tuple[Any, str], other: tuple[Any, str]) -> bool:
    """Return whether two tensors, each a source and a name, are the same, bit for bit."""
    pair = one, other
    mine, theirs = (source.tensors[name] for source, name in pair)
    if (tuple(mine.shape), mine.dtype) != (tuple(theirs.shape), theirs.dtype):
        return False
    rows, columns = matrix_shape(mine.shape)
    for start, stop in row_pieces(rows, columns, PIECE // mine.dtype.itemsize):
        pieces = [np.empty((stop - start, columns), mine.dtype) for _ in pair]
        for (source, name), piece in zip(pair, pieces, strict=True):
            source.read_rows(name, start, stop, piece)
        if not np.array_equal(*(piece.view(np.uint8) for piece in pieces)):
            return False
    return True


def without_quantisation(config: Mapping) -> dict:
    """Return a config.json without what it says of quantised weights."""
    return {key: value for key, value in config.items() if key != QUANTISATION}


@contextmanager
def quantisation_left_over(config: Mapping, where: Path) -> Iterator[None]:
    """Look at the weights in this block: a config.json that says they are quantised is right if they do not fit it.

    If they do, all are floating point and of their shapes: the key was left over when they were dequantised.

    Raises:
      CheckpointError: the weights are quantised.
    """
    try:
        yield
    except UnfitError:
        check_config(config, where)
        raise
    if config.get(QUANTISATION):
        logging.warning("%s: the weights are not quantised, so its %s is left out", where, QUANTISATION)


def _about_extra(file: str, extra: Sequence[str], missing: Sequence[str]) -> str:
    """Say which tensors are not the model's, and why that may be."""
    if any(map(ADAPTER.search, extra)):
        fix = "merge adapters into the model before, with peft's merge_and_unload()"
    elif missing:
        fix = "save the model with transformers' save_pretrained, which writes the names of the model"
    else:
        fix = "check num_hidden_layers, attention_bias, mlp_bias and tie_word_embeddings in config.json"
    said = f"{len(extra)} tensors that a model of this config.json does not have, first {shown(extra[0])!r}"
    lacking = f", and lacks {len(missing)} that it has, first {missing[0]!r}" if missing else ""
    return f"{file} has {said}{lacking}; {fix}."


def _about_missing(missing: Sequence[str], config: Mapping) -> str:
    """Say which tensors are missing, and why that may be."""
    heads = [f"{head}.weight" for head in architecture_of(config).heads]
    if set(missing) <= set(heads):
        return (
            f"{missing[0]} is missing. If the head is the embeddings, config.json must say so: "
            f'"tie_word_embeddings": true. If it is not, fetch the file that holds it.'
        )
    return (
        f"{len(missing)} tensors are missing, first {missing[0]!r}; is the download complete, and is config.json "
        f"(num_hidden_layers {config['num_hidden_layers']}) that of these files?"
    )


def _about_shape(spec: TensorSpec, shape: tuple[int, ...]) -> str:
    """Say that a tensor has another shape, and why that may be."""
    if 0 in shape:
        return (
            f"{spec.name} is empty (shape {shape}). DeepSpeed's ZeRO-3 leaves it so where weights were not gathered: "
            f"take them from its checkpoint with zero_to_fp32.py, or save with "
            f"stage3_gather_16bit_weights_on_model_save."
        )
    said = f"{spec.name} has shape {shape}, config.json says {spec.shape}"
    if spec.role is Role.VOCABULARY and shape[1:] == spec.shape[1:]:
        return f"{said}; if {shape[0]} tokens are right, set vocab_size to {shape[0]} in config.json."
    return f"{said}; config.json does not belong to these weights."
