"""Streaming: blocks of base and experts onto the devices, read ahead of the work."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import Mesh

from dppa_jax.checkpoint.dtypes import common_dtype
from dppa_jax.checkpoint.protocol import Source
from dppa_jax.checkpoint.safetensors import ALIGNMENT
from dppa_jax.merging.blocks import Block
from dppa_jax.merging.rows import DeviceMatrix, Matrix
from dppa_jax.merging.zeros import check_zeros
from dppa_jax.runtime.memory import aligned
from dppa_jax.runtime.mesh import padded_rows, put_rows

READERS = 2  # of a block at a time; one thread copies from the page cache at half the speed of two


class Stream:
    """Iterates over blocks as lists of `DeviceMatrix`, any number of times.

    One thread reads the next block while this one is worked on. Each iteration reads the files again, into two sets of
    buffers that take turns, unless `resident`: then the first iteration keeps what it reads on the devices. A CPU
    device works in the buffers themselves, so a consumer must have fetched a block's results before it asks for the
    next block.

    With `refuse_zeros`, rows that are zeros in one model only are refused when they are read.
    """

    def __init__(
        self,
        base: Source,
        experts: Sequence[Source],
        blocks: Sequence[Block],
        mesh: Mesh,
        resident: bool,
        refuse_zeros: bool = False,
    ):
        self.sources = (base, *experts)
        self.blocks, self.mesh, self.resident, self.refuse_zeros = blocks, mesh, resident, refuse_zeros
        self.bytes_read = 0
        self._kept: dict[Block, list[DeviceMatrix]] = {}
        self._buffers: list[np.ndarray] = []

    def __call__(self, blocks: Sequence[Block] | None = None) -> Iterator[tuple[Block, list[DeviceMatrix]]]:
        """Iterate over these blocks, by default all."""
        return self.grouped(self.blocks if blocks is None else blocks, len(self.sources))

    def grouped(self, blocks: Sequence[Block], most: int) -> Iterator[tuple[Block, list[DeviceMatrix]]]:
        """Iterate over these blocks, each as often as it takes to see all experts, the base with `most` at a time."""
        experts = len(self.sources) - 1
        groups = [range(first, min(first + most, experts)) for first in range(0, experts, most)] or [range(0)]
        units = [(block, group) for block in blocks for group in groups]
        with ThreadPoolExecutor(READERS, "read matrix") as readers, ThreadPoolExecutor(1, "read block") as reader:
            pending = [reader.submit(self._read, *unit, i, readers) for i, unit in enumerate(units[:1])]
            for i, (block, group) in enumerate(units):
                if i + 1 < len(units):
                    pending.append(reader.submit(self._read, *units[i + 1], i + 1, readers))
                yield block, self._put(block, group.start, pending.pop(0).result())

    def pass_bytes(self, blocks: Sequence[Block] | None = None, most: int = 0) -> int:
        """The bytes that one pass over these blocks, by default all, reads, with `most` experts at a time."""
        again = -(-(len(self.sources) - 1) // most) - 1 if most else 0
        return sum(self.block_bytes(block, again) for block in (self.blocks if blocks is None else blocks))

    def block_bytes(self, block: Block, again: int = 0) -> int:
        """The bytes of a block of all models, and of the base as often again."""
        sources = (*[self.sources[0]] * again, *self.sources)
        return sum(matrix.elements * _dtype(source, matrix).itemsize for matrix in block.matrices for source in sources)

    def _put(self, block: Block, first: int, arrays: list[list[np.ndarray]] | None) -> list[DeviceMatrix]:
        if arrays is None:
            return self._kept[block]
        loaded = []
        for matrix, models in zip(block.matrices, arrays, strict=True):
            base, *experts = (put_rows(self.mesh, array) for array in models)
            loaded.append(DeviceMatrix(matrix, base, tuple(experts), first))
        jax.block_until_ready([(x.base, x.experts) for x in loaded])  # the copy to an accelerator has left the buffer
        if self.resident:
            self._kept[block] = loaded
        return loaded

    def _read(
        self, block: Block, experts: range, turn: int, readers: ThreadPoolExecutor
    ) -> list[list[np.ndarray]] | None:
        """Every matrix of base and experts, base first, as views of one buffer; None if the devices have the block."""
        if block in self._kept:
            return None
        sources = (self.sources[0], *(self.sources[1 + e] for e in experts))
        layout, size = [], 0
        for matrix in block.matrices:
            places = []
            for source in sources:
                dtype = _dtype(source, matrix)
                places.append((size, dtype))
                nbytes = padded_rows(self.mesh, matrix.rows) * matrix.columns * dtype.itemsize
                size += -(-nbytes // ALIGNMENT) * ALIGNMENT
                self.bytes_read += matrix.elements * dtype.itemsize
            layout.append(places)
        buffer = aligned(size, ALIGNMENT) if self.resident else self._buffer(size, turn % 2)
        pending = [
            [
                readers.submit(self._read_matrix, source, matrix, dtype, buffer, offset)
                for source, (offset, dtype) in zip(sources, places, strict=True)
            ]
            for matrix, places in zip(block.matrices, layout, strict=True)
        ]
        arrays = [[array.result() for array in models] for models in pending]
        if self.refuse_zeros:
            for matrix, models in zip(block.matrices, arrays, strict=True):
                check_zeros(sources, matrix, models)
        return arrays

    def _read_matrix(
        self, source: Source, matrix: Matrix, dtype: np.dtype, buffer: np.ndarray, offset: int
    ) -> np.ndarray:
        padded = padded_rows(self.mesh, matrix.rows)
        array = buffer[offset : offset + padded * matrix.columns * dtype.itemsize].view(dtype)
        array = array.reshape(padded, matrix.columns)
        for rows, at in matrix.places():
            if source.tensors[rows.name].dtype == dtype:
                source.read_rows(rows.name, rows.start, rows.stop, array[at])
            else:
                other = np.empty((rows.rows, matrix.columns), source.tensors[rows.name].dtype)
                source.read_rows(rows.name, rows.start, rows.stop, other)
                array[at] = other
        array[matrix.rows :] = 0
        return array

    def _buffer(self, size: int, turn: int) -> np.ndarray:
        while len(self._buffers) <= turn:
            self._buffers.append(aligned(0, ALIGNMENT))
        if self._buffers[turn].nbytes < size:
            self._buffers[turn] = aligned(size, ALIGNMENT)
        return self._buffers[turn]


def _dtype(source: Source, matrix: Matrix) -> np.dtype:
    """The dtype of a matrix in a checkpoint; float32 holds the exact values of one that mixes dtypes over layers."""
    return common_dtype(source.tensors[rows.name].dtype for rows in matrix.ranges)
