"""Write Orbax checkpoints of the stacked tree: sharded, one array at a time, and renamed when complete."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import type_handlers

from dppa_jax.checkpoint.orbax import check_name
from dppa_jax.checkpoint.output import TakenError, Unfinished, check_space, output_directory, publish, sync
from dppa_jax.checkpoint.small_files import write_small_files
from dppa_jax.checkpoint.unfinished import aside_of
from dppa_jax.runtime import processes

CHUNK = 8 << 20  # bytes: small, as a chunk is read for each row in it; but large enough for few accesses to a matrix
UNLIMITED_GB = 1_000_000  # any limit: without one, Orbax holds all that it writes in memory, in one transaction


@dataclass(frozen=True)
class Deferred:
    """An array that is made only when it is written, and freed afterwards."""

    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: NamedSharding
    read: Callable[[tuple[slice, ...]], np.ndarray]  # returns the elements of a slice, that of one device

    def make(self) -> jax.Array:
        """Read the slices of this process's devices."""
        return jax.make_array_from_callback(self.shape, self.sharding, self.read)


class DeferredHandler(type_handlers.ArrayHandler):
    """Tells Orbax how to write deferred arrays: one after another, so that memory holds one. They restore as usual."""

    async def serialize(
        self,
        values: Sequence[Deferred],
        infos: Sequence[type_handlers.ParamInfo],
        args: Sequence[type_handlers.SaveArgs] | None = None,
    ) -> Sequence:
        """Write the arrays; each is on the disk before the next one is made."""
        for value, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
            for written in await super().serialize([value.make()], [info], [arg]):
                written.result()
        return []


def array_sharding(mesh: Mesh, shape: tuple[int, ...], stacked: bool) -> NamedSharding:
    """Shard layers over the mesh's first axis and rows over its second, as far as sizes divide; never columns.

    Args:
      mesh: its axes are those of layers and of rows.
      shape: of the array.
      stacked: whether its first axis is the layers.
    """
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
    methods; process 0 renames the directory.

    Args:
      directory: the output.
      nbytes: of the whole checkpoint, which must fit on the disk.
      overwrite: replace a model that is there.

    Raises:
      CheckpointError: the output is refused, see `output_directory`, or another run is writing it.
      OSError: there is no room on the disk.
    """

    def __init__(self, directory: Path | str, nbytes: int, overwrite: bool = False):
        check_name(Path(directory))
        self._overwrite = overwrite
        self.directory = output_directory(directory, overwrite) if self._first else Path(directory).resolve()
        self.path = aside_of(self.directory)
        self._unfinished: Unfinished | None = None
        check_space({self.directory: nbytes})
        with processes.first_alone("checkpoint claimed"):
            if self._first:
                self._unfinished = Unfinished(self.directory)

    def __enter__(self) -> "OrbaxWriter":
        return self

    def __exit__(self, _, error: BaseException | None, __) -> None:
        if self._unfinished:
            self._unfinished.close() if isinstance(error, TakenError) else self._unfinished.remove()

    def commit(self, tree: Mapping, config: Mapping, beside: Mapping[str, bytes], check: Callable[[], None]) -> None:
        """Write the checkpoint and give the directory its final name.

        Args:
          tree: of `Deferred` arrays.
          config: the content of config.json.
          beside: small files beside the arrays, by name: tokenizer, generation config.
          check: is called before the directory gets its name; what it raises ends the run.
        """
        unnamed = self.path / "checkpoint"  # Orbax makes its directory itself
        _save(unnamed, tree)
        with processes.first_alone("checkpoint named"):
            if self._first:
                for path in list(unnamed.iterdir()):
                    path.rename(self.path / path.name)
                unnamed.rmdir()
                for path in self.path.rglob("*"):
                    sync(path)
                write_small_files(self.path, {**beside, "config.json": json.dumps(dict(config), indent=2) + "\n"})
                check()
                publish([self._unfinished], self._overwrite)

    @property
    def _first(self) -> bool:
        return processes.index() == 0


def _save(directory: Path, tree: Mapping) -> None:
    """Write a tree of deferred arrays as Orbax writes any tree. All processes must call this."""
    handler = DeferredHandler()
    registry = type_handlers.create_type_handler_registry((Deferred, handler), (jax.Array, handler))
    writer = ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry, use_compression=False, save_concurrent_gb=UNLIMITED_GB
    )
    with ocp.Checkpointer(writer) as checkpointer:
        checkpointer.save(directory, args=ocp.args.PyTreeSave(tree, save_args=jax.tree.map(_chunked, tree)))


def _chunked(array: Deferred) -> ocp.SaveArgs:
    """Ask for chunks of at most one layer, so that reading some rows reads little else."""
    return ocp.SaveArgs(chunk_byte_size=CHUNK, shard_axes=(0,) if len(array.shape) == 3 else ())


def _divides(sharding: NamedSharding, shape: tuple[int, ...]) -> bool:
    """Return whether a shape can be sharded so, all shards being of equal size."""
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return False
    return True
