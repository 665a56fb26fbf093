"""Reading Orbax checkpoints of the stacked tree, lazily and by row.

Orbax keeps each array in chunks that TensorStore, which it depends on, reads: only those that hold the rows asked for.
config.json and the tokenizer files lie beside the arrays.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from dppa_jax.architecture.specs import (
    CheckpointError,
    TensorSpec,
    by_path,
    first_linear,
    stacked_shape,
    tensor_specs,
)
from dppa_jax.checkpoint.safetensors import DTYPES, content_digest, fingerprint, read_config, read_json
from dppa_jax.config.run import PREFIX

TREE = "_METADATA"  # Orbax's file of the names of all arrays
MANIFEST = "manifest.ocdbt"  # there when all arrays share files, Orbax's default
CACHE_BYTES = 1 << 26  # of all checkpoints together; a chunk of which one row was asked for is kept for the next row


@dataclass(frozen=True)
class StackedTensor:
    """A tensor, or the slice of a stacked array that is one layer's."""

    file: Path  # the checkpoint, for messages
    path: tuple[str, ...]
    layer: int | None
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class OrbaxDirectory:
    """An open checkpoint, with what a SafetensorsDirectory offers. Arrays are opened at once and read by row."""

    def __init__(self, directory: Path | str):
        self.directory = Path(directory)
        self.config = read_config(self.directory)
        self._arrays = _open_arrays(self.directory)
        self._check()
        self.specs = tensor_specs(self.config)
        self.tensors = {name: self._tensor(spec) for name, spec in self.specs.items()}

    @property
    def dtype(self) -> np.dtype:
        """That of the linears; norms may differ."""
        return self.tensors[first_linear(self.specs).name].dtype

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        """Rows start..stop of a tensor (the whole of a vector) into `out`, a contiguous array of the tensor's dtype."""
        import tensorstore

        tensor = self.tensors[name]
        rows = self._arrays[tensor.path]
        if tensor.layer is not None:
            rows = rows[tensor.layer]
        if len(tensor.shape) == 2:
            rows = rows[start:stop]
        try:
            tensorstore.array(out.reshape(rows.shape)).write(rows).result()
        except ValueError as error:
            raise _damaged(self.directory, name, error) from error

    def read(self, name: str) -> np.ndarray:
        out = np.empty(self.tensors[name].shape, self.tensors[name].dtype)
        self.read_rows(name, 0, out.shape[0], out)
        return out

    def fingerprint(self) -> str:
        """Of config, sizes and 64 pages spread over every file of the arrays."""
        return fingerprint(self.config, _files(self.directory))

    def content_digest(self) -> str:
        """Of config, generation config and every byte of the arrays' files: about a second for each GB."""
        return content_digest(self.directory, self.config, _files(self.directory))

    def close(self) -> None:
        """Let go of the arrays."""
        self._arrays.clear()

    def _check(self) -> None:
        """Each array that config.json promises must be there, of its shape, and no other."""
        wanted = stacked_shapes(self.config)
        copied = {("lm_head",)} if self.config.get("tie_word_embeddings") else set()  # of the embeddings
        found = set(self._arrays) - copied
        if missing := [path for path in wanted if path not in found]:
            raise CheckpointError(
                f"{self.directory}: {len(missing)} arrays are missing, first {'.'.join(missing[0])!r}; is it the tree "
                f"of a model with layers stacked (README), and is config.json that of these arrays?"
            )
        if extra := sorted(found - set(wanted)):
            raise CheckpointError(
                f"{self.directory} has {len(extra)} arrays that a model of this config.json does not have, first "
                f"{'.'.join(extra[0])!r}; save the weights alone, and check attention_bias, mlp_bias and "
                f"tie_word_embeddings."
            )
        for path, shape in wanted.items():
            if self._arrays[path].shape != shape:
                raise CheckpointError(
                    f"{self.directory}: {'.'.join(path)} has shape {self._arrays[path].shape}, config.json says "
                    f"{shape}; config.json does not belong to these arrays."
                )
        if slow := [path for path in wanted if len(wanted[path]) == 3 and self._layers_of_chunk(path) > 1]:
            logging.warning(
                "%s: a chunk of %s has %d layers, all of which are read where one is wanted; --job=convert --base=%s%s "
                "--output=%sDIR makes a checkpoint of smaller chunks",
                *(self.directory, ".".join(slow[0]), self._layers_of_chunk(slow[0]), PREFIX, self.directory, PREFIX),
            )

    def _layers_of_chunk(self, path: tuple[str, ...]) -> int:
        return self._arrays[path].chunk_layout.read_chunk.shape[0]

    def _tensor(self, spec: TensorSpec) -> StackedTensor:
        dtype = np.dtype(self._arrays[spec.path].dtype.numpy_dtype)
        return StackedTensor(self.directory, spec.path, spec.layer, dtype, spec.shape)


def is_orbax(directory: Path | str) -> bool:
    """Is it an Orbax checkpoint of a tree?"""
    return (Path(directory) / TREE).is_file()


def stacked_shapes(config: Mapping) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The arrays of the tree: layers stacked, (layers, out, in)."""
    return {path: stacked_shape(group) for path, group in by_path(tensor_specs(config).values()).items()}


def _open_arrays(directory: Path) -> dict[tuple[str, ...], Any]:
    """Every array of the tree by its path, as TensorStore opens it."""
    import tensorstore  # 0.2 s that a run without such a checkpoint saves

    tree = read_json(directory / TREE)
    arrays = {}
    try:
        for entry in tree["tree_metadata"].values():
            path = tuple(str(part["key"]) for part in entry["key_metadata"])
            spec = _store(directory, ".".join(path), bool(tree.get("use_zarr3")))
            arrays[path] = tensorstore.open(spec, context=_context(), open=True, read=True).result()
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{directory / TREE}: not as Orbax writes it ({error!r}); copy it again.") from error
    except ValueError as error:
        raise _damaged(directory, ".".join(path), error) from error
    for path, array in arrays.items():
        if array.dtype.numpy_dtype not in DTYPES.values():
            raise CheckpointError(
                f"{directory}: {'.'.join(path)} is stored as {array.dtype.name}; weights must be "
                f"{', '.join(dtype.name for dtype in DTYPES.values())}."
            )
    return arrays


def _store(directory: Path, name: str, zarr3: bool) -> dict:
    """Where TensorStore finds an array. A chunk that is not there is an error, and not zeros."""
    root = {"driver": "file", "path": f"{directory.resolve()}/"}
    if (directory / MANIFEST).is_file():
        place = {"driver": "ocdbt", "base": root, "path": f"{name}/"}
    else:
        place = {"driver": "file", "path": f"{root['path']}{name}/"}
    driver = "zarr3" if zarr3 else "zarr"
    return {"driver": driver, "kvstore": place, "fill_missing_data_reads": False, "recheck_cached_data": "open"}


@cache
def _context() -> Any:
    """What all checkpoints share: TensorStore's threads and its cache."""
    import tensorstore

    return tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})


def _files(directory: Path) -> dict[str, Path]:
    """The arrays' files by what they are called in the checkpoint."""
    found = [path for folder in directory.iterdir() if folder.is_dir() for path in folder.rglob("*") if path.is_file()]
    found += [path for name in (TREE, MANIFEST) if (path := directory / name).is_file()]
    return {str(path.relative_to(directory)): path for path in sorted(found)}


def _damaged(directory: Path, name: str, error: ValueError) -> CheckpointError:
    said = str(error).split(" [")[0]
    return CheckpointError(f"{directory}: {name} cannot be read: {said}. Copy the checkpoint again.")
