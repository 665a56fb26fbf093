"""What config.json promises of the tensors, held against what the files have."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from dppa_jax.architecture.specs import (
    QUANTISATION,
    CheckpointError,
    Role,
    TensorSpec,
    check_config,
    tensor_specs,
    tied_heads,
)
from dppa_jax.architecture.table import architecture_of
from dppa_jax.checkpoint.headers import StoredTensor, UnfitError, shown

WRAPPER = re.compile(r"^(module\.)+|\b(_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
INNER = "model."  # what names lack in a file that was saved from the decoder within the model
ADAPTER = re.compile(r"^base_model\.model\.|\.(base_layer|modules_to_save)\.|\.lora_")
PIECE = 1 << 22  # bytes of each of two tensors that are compared at a time


def promised_specs(tensors: Mapping[str, StoredTensor], config: Mapping, directory: Path) -> dict[str, TensorSpec]:
    """Return what config.json promises of each tensor, if the files have these tensors and no others.

    They may have a head that is called the embeddings (`drop_tied_heads`).

    Raises:
      UnfitError: a tensor is missing, too many or of another shape.
    """
    specs = tensor_specs(config)
    missing = [name for name in specs if name not in tensors]
    extra = [name for name in tensors if name not in specs and name not in tied_heads(config)]
    if extra:
        raise UnfitError(f"{directory}: {_about_extra(tensors[extra[0]].file.name, extra, missing)}")
    if missing:
        raise UnfitError(f"{directory}: {_about_missing(missing, config)}")
    for name, spec in specs.items():
        if tensors[name].shape != spec.shape:
            raise UnfitError(f"{tensors[name].file}: {_about_shape(spec, tensors[name].shape)}")
    return specs


def drop_tied_heads(source: Any) -> None:
    """Drop heads that are copies of the embeddings from the tensors of a source, which can read them.

    Raises:
      CheckpointError: a head is another matrix, although config.json says that it is the embeddings.
    """
    for head, embeddings in tied_heads(source.config).items():
        if head not in source.tensors:
            continue
        if not _same_bits(source, head, embeddings):
            raise CheckpointError(
                f"{source.tensors[head].file}: {head} is not {embeddings}, though config.json says that they are one "
                f"(tie_word_embeddings). If the head was trained, set tie_word_embeddings to false there; if not, save "
                f"the model without {head}."
            )
        del source.tensors[head]


def _same_bits(source: Any, *names: str) -> bool:
    """Return whether two matrices of a source are the same, bit for bit."""
    one, other = (source.tensors[name] for name in names)
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    rows, columns = one.shape
    step = max(1, PIECE // (columns * one.dtype.itemsize))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        pieces = [np.empty((stop - start, columns), one.dtype) for _ in names]
        for name, piece in zip(names, pieces, strict=True):
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
    wrapped = WRAPPER.search(extra[0])
    if any(map(ADAPTER.search, extra)):
        fix = "merge adapters into the model before, with peft's merge_and_unload()"
    elif missing and wrapped:
        fix = f"{wrapped[0]!r} is what torch.compile, DeepSpeed or FSDP put there: save the model without that wrapper"
    elif f"{INNER}{extra[0]}" in missing:
        fix = f"the names lack {INNER!r}, so it is the decoder within the model that was saved: save the whole model"
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
