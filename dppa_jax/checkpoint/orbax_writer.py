"""Writing Orbax checkpoints of the stacked tree: sharded, an array at a time, named when they are complete."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import type_handlers

from dppa_jax.checkpoint.safetensors_writer import aside_of, check_space, claim, output_directory, swap, sync
from dppa_jax.runtime import processes

CHUNK = 8 << 20  # bytes that are read for a row, and a few such to a matrix, so that none is a file access for little
UNLIMITED_GB = 1_000_000  # any limit keeps Orbax from one transaction, in which it holds all that it writes


@dataclass(frozen=True)
class Deferred:
    """An array that is made when it is written, and let go after it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: NamedSharding
    read: Callable[[tuple[slice, ...]], np.ndarray]  # the elements of a slice, that of one device

    def make(self) -> jax.Array:
        return jax.make_array_from_callback(self.shape, self.sharding, self.read)


class DeferredHandler(type_handlers.ArrayHandler):
    """Writes deferred arrays one after another, so that memory holds one at a time; they restore as any array does."""

    async def serialize(
        self,
        values: Sequence[Deferred],
        infos: Sequence[type_handlers.ParamInfo],
        args: Sequence[type_handlers.SaveArgs] | None = None,
    ) -> Sequence:
        for value, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
            for written in await super().serialize([value.make()], [info], [arg]):
                written.result()
        return []


def array_sharding(mesh: Mesh, shape: tuple[int, ...], stacked: bool) -> NamedSharding:
    """Layers over the first axis of the mesh, rows over the second, as far as sizes divide; columns are whole."""
    layer, row = mesh.axis_names
    if not stacked:
        tried = [((layer, row),), (row,), (layer,), ()] if len(shape) == 2 else [()]
    else:
        tried = [(layer, row), (None, (layer, row)), (layer,), (None, row), ()] if len(shape) == 3 else [(layer,), ()]
    shardings = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in tried)
    return next(sharding for sharding in shardings if _divides(sharding, shape))


class OrbaxWriter:
    """Writes a checkpoint beside its final name and renames it when everything is in place.

    Leaving the `with` block before `commit` removes what was written. Of several processes all must call the same
    methods; the first one gives the directory its name.
    """

    def __init__(self, directory: Path | str, nbytes: int, overwrite: bool = False):
        self.directory, self._overwrite = output_directory(directory, overwrite), overwrite
        self.aside = aside_of(self.directory)
        check_space({self.directory: nbytes})
        self._lock: int | None = None
        with processes.first_alone("checkpoint claimed"):
            if self._first:
                self.directory.parent.mkdir(parents=True, exist_ok=True)
                self._lock = claim(self.aside)
                for left in self.aside.iterdir():  # by a run that was killed
                    shutil.rmtree(left) if left.is_dir() else left.unlink()

    def __enter__(self) -> "OrbaxWriter":
        return self

    def __exit__(self, *_) -> None:
        if self._lock is not None:
            shutil.rmtree(self.aside, ignore_errors=True)
            os.close(self._lock)
            self._lock = None

    def commit(self, tree: Mapping, config: Mapping, copies: Sequence[Path]) -> None:
        """Write the arrays, config.json and copies of files beside them, and give the directory its name."""
        unnamed = self.aside / "checkpoint"
        _save(unnamed, tree)
        with processes.first_alone("checkpoint named"):
            if self._first:
                for path in copies:
                    shutil.copyfile(path, unnamed / path.name)
                (unnamed / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
                for path in (path for path in unnamed.rglob("*") if path.is_file()):
                    sync(path)  # after a power failure, too, the final name means complete
                output_directory(self.directory, self._overwrite)  # nothing came there in the meantime
                swap(unnamed, self.directory)

    @property
    def _first(self) -> bool:
        return processes.index() == 0


def _save(directory: Path, tree: Mapping) -> None:
    """A tree of deferred arrays as Orbax writes any tree. All processes must call it."""
    handler = DeferredHandler()
    registry = type_handlers.create_type_handler_registry((Deferred, handler), (jax.Array, handler))
    writer = ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry, use_compression=False, save_concurrent_gb=UNLIMITED_GB
    )
    with ocp.Checkpointer(writer) as checkpointer:
        checkpointer.save(directory, args=ocp.args.PyTreeSave(tree, save_args=jax.tree.map(_chunked, tree)))


def _chunked(array: Deferred) -> ocp.SaveArgs:
    """In chunks of no more than one layer, so that reading some rows reads little else."""
    return ocp.SaveArgs(chunk_byte_size=CHUNK, shard_axes=(0,) if len(array.shape) == 3 else ())


def _divides(sharding: NamedSharding, shape: tuple[int, ...]) -> bool:
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return False
    return True
