"""--job=convert: convert between Hugging Face directories of safetensors and Orbax checkpoints of the stacked tree.

Tensors keep their bits. Each process reads and writes its own slices.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
from absl import logging
from jax.sharding import Mesh

from dppa_jax.architecture.specs import row_pieces, stacked_shape, tree_of, with_dtype
from dppa_jax.checkpoint import DTYPE_BY_NAME, Checkpoint, CheckpointError, TensorSpec
from dppa_jax.checkpoint.dtypes import common_dtype
from dppa_jax.checkpoint.laid_out import laid_out_writer, rest_of
from dppa_jax.checkpoint.output import output_directory
from dppa_jax.checkpoint.safetensors import ALIGNMENT
from dppa_jax.checkpoint.safetensors_writer import Tensors, publish_all, total_bytes
from dppa_jax.checkpoint.small_files import beside
from dppa_jax.config.run import PREFIX, ConvertConfig
from dppa_jax.jobs.models import check_code
from dppa_jax.jobs.places import check_apart, directories
from dppa_jax.merging.blocks import owners
from dppa_jax.merging.identity import common_identity, input_identity, unchanged
from dppa_jax.merging.rest import Rest, copy_rest
from dppa_jax.runtime import processes
from dppa_jax.runtime.memory import aligned, peak_resident
from dppa_jax.runtime.mesh import across_processes, make_mesh
from dppa_jax.runtime.progress import Stage, stage
from dppa_jax.where import open_checkpoint, stated_architecture

PIECE = 1 << 26  # bytes read and written at a time when the output is safetensors


def run_convert(job: ConvertConfig) -> None:
    """Convert job.base to job.output, which appears whole or not at all."""
    started = time.perf_counter()
    with processes.first_alone("output"):
        output = output_directory(job.output.removeprefix(PREFIX), job.overwrite)
    with processes.first_alone("model"):  # the first process fetches or builds it, the others then find it
        opened = open_checkpoint(job.base, job.seed, stated_architecture(job.architecture), job.dequantise)
    with closing(opened) as source:
        check_apart({"--output": str(output)}, directories({"base": source}))
        beside(source)  # refused, if need be, before the work
        check_code(source)
        tensors = converted_tensors(source, job.output_dtype)
        write = write_orbax if job.output.startswith(PREFIX) else write_safetensors
        with (
            stage("convert", total_bytes(tensors) // processes.count()) as progress,
            unchanged({"base": source}) as check_unchanged,
        ):
            reader = Reader(source, progress, check_unchanged)
            write(reader, output, tensors, job)
    seconds, peak = time.perf_counter() - started, peak_resident()
    logging.info(
        "wrote %s in %.1f s: read %d bytes here, with %.2f GB of memory", job.output, seconds, reader.done, peak / 1e9
    )


def converted_tensors(source: Checkpoint, output_dtype: str = "") -> Tensors:
    """Return shape and dtype of every tensor of the output, by name."""
    tensors = {}
    for name, spec in source.specs.items():
        tensors[name] = spec.shape, DTYPE_BY_NAME[output_dtype] if output_dtype else source.tensors[name].dtype
    return tensors


def write_safetensors(reader: "Reader", output: Path, tensors: Tensors, job: ConvertConfig) -> None:
    """Write a Hugging Face directory; tensors are read and written in pieces of at most PIECE bytes.

    A run that was killed resumes after the last piece.
    """
    source = reader.source
    owner = owners(source.specs, processes.count())
    decided = [input_identity(source), str(output), job.output_dtype, job.max_shard_size, processes.count(), PIECE]
    identity = common_identity(decided) if job.resume else ""
    rest = Rest(source, rest_of(source))
    options = output, tensors, job.max_shard_size, job.overwrite, identity
    with laid_out_writer(source, *options, owners=owner, copied=rest.tensors) as writer:
        for name, (_, dtype) in tensors.items():
            if owner[name] != processes.index():
                continue
            spec = source.specs[name]
            for start, stop in row_pieces(spec.rows, spec.columns, PIECE // dtype.itemsize):
                if not writer.has_rows(name, start, stop):
                    writer.write_rows(name, start, reader.rows([spec], dtype, start, stop)[0])
        copy_rest(rest, {}, writer)
        writer.complete(_config(source, job.output_dtype), texts=beside(source))
        reader.check_unchanged()
        publish_all([writer])


def write_orbax(reader: "Reader", output: Path, tensors: Tensors, job: ConvertConfig) -> None:
    """Write an Orbax checkpoint; memory holds this process's slices of one array at a time."""
    from dppa_jax.checkpoint.orbax_writer import OrbaxWriter  # takes a second to import

    source = reader.source
    if rest := rest_of(source):
        raise CheckpointError(
            f"{source.directory}: has {len(rest)} tensors beside the text model, first {rest[0]}, for which the tree "
            f"of an Orbax checkpoint has no place; give a directory as --output, which gets safetensors."
        )
    with OrbaxWriter(output, total_bytes(tensors), job.overwrite) as writer:
        tree = _deferred(reader, tensors, across_processes(make_mesh(job.mesh)))
        writer.commit(tree, _config(source, job.output_dtype), beside(source), reader.check_unchanged)


class Reader:
    """Reads tensors into arrays of a given dtype, and reports progress."""

    def __init__(self, source: Checkpoint, progress: Stage, check_unchanged: Callable[[], None]):
        self.source, self.check_unchanged, self._progress, self.done = source, check_unchanged, progress, 0

    def rows(self, specs: Sequence[TensorSpec], dtype: np.dtype, start: int, stop: int) -> np.ndarray:
        """Return rows start..stop of tensors of one shape, (tensors, rows, columns); JAX can use the array as it is."""
        shape = len(specs), stop - start, specs[0].columns
        block = aligned(math.prod(shape) * dtype.itemsize, ALIGNMENT).view(dtype).reshape(shape)
        for spec, rows in zip(specs, block, strict=True):
            stored = self.source.tensors[spec.name].dtype
            out = rows if stored == dtype else np.empty(rows.shape, stored)
            self.source.read_rows(spec.name, start, stop, out)
            if stored != dtype:
                rows[...] = out
            self.done += out.nbytes
            self._progress.advance(self.done)
        return block

    def slice(self, specs: Sequence[TensorSpec], dtype: np.dtype, index: tuple[slice, ...]) -> np.ndarray:
        """Return one device's slice of an array of the tree: rows of a tensor, or of some layers' tensors."""
        first, stacked = specs[0], len(specs[0].index)
        start, stop, _ = index[-2].indices(first.rows) if len(first.shape) == 2 else (0, 1, 1)
        numbers = np.arange(len(specs)).reshape(stacked_shape(specs)[:stacked])[index[:stacked]]
        rows = self.rows([specs[number] for number in numbers.reshape(-1)], dtype, start, stop)
        shape = (stop - start, first.columns) if len(first.shape) == 2 else (first.columns,)
        return rows.reshape(*numbers.shape, *shape)


def _deferred(reader: Reader, tensors: Tensors, mesh: Mesh) -> dict:
    """Return the tree; its arrays are read when they are written."""
    from dppa_jax.checkpoint.orbax_writer import Deferred, array_sharding

    def deferred(specs: list[TensorSpec]) -> Deferred:
        dtypes = {tensors[spec.name][1] for spec in specs}
        if len(dtypes) > 1:
            path = ".".join(specs[0].path)
            logging.warning("%s: layers have several dtypes; the array has float32, which holds all", path)
        dtype, shape = common_dtype(dtypes), stacked_shape(specs)
        sharding = array_sharding(mesh, shape, specs[0].layer is not None)
        return Deferred(shape, dtype, sharding, partial(reader.slice, specs, dtype))

    return tree_of(reader.source.specs.values(), deferred)


def _config(source: Checkpoint, output_dtype: str) -> dict:
    return with_dtype(source.config, output_dtype or source.dtype.name)
