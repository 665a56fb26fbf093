"""Streaming: which rows go to the devices together, read ahead of the work.

A block is a few consecutive decoder layers, or a chunk of rows of the embeddings. Its parts are matrices: one linear of
all the block's layers, their norms, a chunk. One thread reads the next block while this one is worked on.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from dppa_jax.architecture.specs import TensorSpec, by_path
from dppa_jax.checkpoint.protocol import Source
from dppa_jax.checkpoint.safetensors import ALIGNMENT, common_dtype
from dppa_jax.runtime.mesh import padded_rows, put_rows
from dppa_jax.runtime.processes import share

CHUNK = 1 << 24  # elements of embeddings at a time, in a process that has no layers
READERS = 2  # of a block at a time; one thread copies from the page cache at half the speed of two


@dataclass(frozen=True)
class Piece:
    """Rows of one tensor."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Part:
    """Rows of the same width that are on the devices as one matrix. The pieces of a linear are whole tensors."""

    pieces: tuple[Piece, ...]
    columns: int
    linear: int | None = None
    layers: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        return sum(piece.stop - piece.start for piece in self.pieces)

    @property
    def elements(self) -> int:
        return self.rows * self.columns

    @property
    def piece_rows(self) -> int:
        """Of a linear: rows of one layer."""
        return self.pieces[0].stop - self.pieces[0].start

    def per_row(self, per_piece: np.ndarray) -> np.ndarray:
        """One value (or row of values) per piece, repeated for each of its rows."""
        return np.repeat(per_piece, [piece.stop - piece.start for piece in self.pieces], axis=0)


@dataclass(frozen=True)
class Block:
    parts: tuple[Part, ...]
    layers: tuple[int, ...] = ()

    @property
    def elements(self) -> int:
        return sum(part.elements for part in self.parts)


def owners(specs: Mapping[str, TensorSpec], processes: int) -> dict[str, int]:
    """The process that reads, merges and writes each tensor: layers in equal shares, what is before them first."""
    layers = 1 + max(spec.layer for spec in specs.values() if spec.layer is not None)
    of_layer = [process for process in range(processes) for _ in share(layers, processes, process)]
    found, started = {}, False
    for name, spec in specs.items():
        started |= spec.layer is not None
        outside = processes - 1 if started else 0
        found[name] = outside if spec.layer is None else of_layer[spec.layer]
    return found


def shares(specs: Mapping[str, TensorSpec], processes: int) -> list[dict[str, TensorSpec]]:
    """The tensors of each process."""
    owner = owners(specs, processes)
    return [{name: spec for name, spec in specs.items() if owner[name] == process} for process in range(processes)]


def make_blocks(specs: Mapping[str, TensorSpec], block_layers: int) -> list[Block]:
    """Layers in blocks of `block_layers`, then embeddings and head in chunks no larger than a matrix, then the norm."""
    layers = sorted({spec.layer for spec in specs.values() if spec.layer is not None})
    blocks = []
    for first in range(0, len(layers), block_layers):
        chosen = tuple(layers[first : first + block_layers])
        groups = by_path(spec for spec in specs.values() if spec.layer in chosen)
        parts = [
            Part(tuple(Piece(s.name, 0, s.rows) for s in group), group[0].columns, group[0].linear, chosen)
            for group in groups.values()
        ]
        blocks.append(Block(tuple(parts), chosen))
    largest = max((part.elements for block in blocks for part in block.parts), default=CHUNK)
    for spec in specs.values():
        if spec.layer is None:
            step = max(1, largest // spec.columns)
            for start in range(0, spec.rows, step):
                piece = Piece(spec.name, start, min(start + step, spec.rows))
                blocks.append(Block((Part((piece,), spec.columns),)))
    return blocks


@dataclass(frozen=True)
class Loaded:
    """A part on the devices: base and experts, (padded rows, columns) each."""

    part: Part
    base: jax.Array
    experts: tuple[jax.Array, ...]


class Stream:
    """Iterates over blocks as lists of `Loaded`, any number of times.

    Each iteration reads the files again, into two sets of buffers that take turns, unless `resident`: then the first
    iteration keeps what it reads on the devices. A CPU device works in the buffers themselves, so a consumer must have
    fetched a block's results before it asks for the next block.
    """

    def __init__(self, base: Source, experts: Sequence[Source], blocks: Sequence[Block], mesh: Mesh, resident: bool):
        self.sources = (base, *experts)
        self.blocks, self.mesh, self.resident = blocks, mesh, resident
        self.bytes_read = 0
        self._kept: dict[Block, list[Loaded]] = {}
        self._buffers: list[np.ndarray] = []

    def __call__(self, blocks: Sequence[Block] | None = None) -> Iterator[tuple[Block, list[Loaded]]]:
        blocks = self.blocks if blocks is None else blocks
        with ThreadPoolExecutor(READERS, "read part") as readers, ThreadPoolExecutor(1, "read block") as reader:
            pending = [reader.submit(self._read, b, i, readers) for i, b in enumerate(blocks[:1])]
            for i, block in enumerate(blocks):
                if i + 1 < len(blocks):
                    pending.append(reader.submit(self._read, blocks[i + 1], i + 1, readers))
                yield block, self._put(block, pending.pop(0).result())

    def _put(self, block: Block, arrays: list[list[np.ndarray]] | None) -> list[Loaded]:
        if arrays is None:
            return self._kept[block]
        loaded = []
        for part, models in zip(block.parts, arrays, strict=True):
            base, *experts = (put_rows(self.mesh, array) for array in models)
            loaded.append(Loaded(part, base, tuple(experts)))
        jax.block_until_ready([(x.base, x.experts) for x in loaded])  # the copy to an accelerator has left the buffer
        if self.resident:
            self._kept[block] = loaded
        return loaded

    def _read(self, block: Block, turn: int, readers: ThreadPoolExecutor) -> list[list[np.ndarray]] | None:
        """Every part's matrices, base first, as views of one buffer; None when the block is kept on the devices."""
        if block in self._kept:
            return None
        layout, size = [], 0
        for part in block.parts:
            places = []
            for source in self.sources:
                dtype = _dtype(source, part)
                places.append((size, dtype))
                size += -(-padded_rows(self.mesh, part.rows) * part.columns * dtype.itemsize // ALIGNMENT) * ALIGNMENT
            layout.append(places)
        buffer = aligned(size) if self.resident else self._buffer(size, turn % 2)
        self.bytes_read += sum(
            part.rows * part.columns * dtype.itemsize
            for part, places in zip(block.parts, layout, strict=True)
            for _, dtype in places
        )
        arrays = [
            [
                readers.submit(self._read_part, source, part, dtype, buffer, offset)
                for source, (offset, dtype) in zip(self.sources, places, strict=True)
            ]
            for part, places in zip(block.parts, layout, strict=True)
        ]
        return [[matrix.result() for matrix in models] for models in arrays]

    def _read_part(self, source: Source, part: Part, dtype: np.dtype, buffer: np.ndarray, offset: int) -> np.ndarray:
        padded = padded_rows(self.mesh, part.rows)
        matrix = buffer[offset : offset + padded * part.columns * dtype.itemsize].view(dtype)
        matrix = matrix.reshape(padded, part.columns)
        row = 0
        for piece in part.pieces:
            stop = row + piece.stop - piece.start
            if source.tensors[piece.name].dtype == dtype:
                source.read_rows(piece.name, piece.start, piece.stop, matrix[row:stop])
            else:
                other = np.empty((stop - row, part.columns), source.tensors[piece.name].dtype)
                source.read_rows(piece.name, piece.start, piece.stop, other)
                matrix[row:stop] = other
            row = stop
        matrix[row:] = 0
        return matrix

    def _buffer(self, size: int, turn: int) -> np.ndarray:
        while len(self._buffers) <= turn:
            self._buffers.append(aligned(0))
        if self._buffers[turn].nbytes < size:
            self._buffers[turn] = aligned(size)
        return self._buffers[turn]


def _dtype(source: Source, part: Part) -> np.dtype:
    """Of a part in a checkpoint; float32 holds the exact values of one that mixes dtypes over layers."""
    return common_dtype(source.tensors[piece.name].dtype for piece in part.pieces)


def aligned(size: int) -> np.ndarray:
    """Bytes that start at a multiple of ALIGNMENT."""
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size]
