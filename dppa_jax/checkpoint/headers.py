"""Headers of safetensors files: which tensors a file holds, and where.

A safetensors file is eight bytes with the length of the header, a JSON header, and the bytes of the tensors, without
holes and overlaps.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import ml_dtypes
import msgspec
import numpy as np

from dppa_jax.architecture.layout import Place, stored_rows
from dppa_jax.architecture.specs import DEQUANTISE, CheckpointError, matrix_shape
from dppa_jax.architecture.table import IGNORED
from dppa_jax.runtime.reading import naming, open_regular, printable

DTYPE_BY_CODE = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
NO_WEIGHT = {  # buffers, which are copied where a model may have such
    **{"BOOL": np.dtype(bool), "C64": np.dtype(np.complex64), "I16": np.dtype(np.int16), "U16": np.dtype(np.uint16)},
    **{"I64": np.dtype(np.int64), "U64": np.dtype(np.uint64)},
}
QUANTISED = {  # numbers of quantised weights, read with --dequantise; see `quantised`
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    **{"I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "I32": np.dtype(np.int32)},
}
FIX_BY_CODE = {  # of a tensor of another code; one that is not here is a quantised weight
    "F64": "Save the model in one of them (transformers: from_pretrained(DIR, dtype='float32').save_pretrained(NEW)).",
}
MAX_HEADER = 16_000_000  # bytes; a model of 100,000 tensors has less
AGAIN = "download it again"
NAMED = 4_000_000  # bytes of a header of which a damaged entry is looked for by name

Bytes = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class UnfitError(CheckpointError):
    """The tensors of a checkpoint are not those that config.json promises."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file.

    Attributes:
      offset: of its first byte in the file.
      run, step: rows that lie together, if not all do, and rows from the begin of one run to that of the next.
    """

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    run: int = 0
    step: int = 0

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold it."""
        return (self.file,)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of a row; a vector is one row."""
        return matrix_shape(self.shape)[1] * self.dtype.itemsize

    def at(self, place: Place, shape: tuple[int, ...]) -> "StoredTensor":
        """Return the tensor of this shape that lies at a place of this one."""
        if place.whole:
            return self
        first = self.offset + place.first * stored_rows(self.shape)[1] * self.dtype.itemsize
        return StoredTensor(self.file, self.dtype, shape, first, place.run, place.step)

    def extents(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield position and bytes of rows start to stop (exclusive), a piece of the file at a time."""
        for _, row, count in Place("", 0, self.run, self.step).pieces(start, stop):
            yield self.offset + row * self.row_bytes, count * self.row_bytes


class _Entry(msgspec.Struct, gc=False):
    """What a header says of a tensor. The header's __metadata__ has none of these keys."""

    dtype: str = ""
    shape: Annotated[tuple[Bytes, ...], msgspec.Meta(max_length=8)] | None = None
    data_offsets: tuple[Bytes, Bytes] | None = None

    @property
    def complete(self) -> bool:
        return bool(self.dtype) and self.shape is not None and self.data_offsets is not None


def read_header(file: Path, quantised: bool = False) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name; see `header_of`."""
    with naming(file), open(open_regular(file, CheckpointError), "rb") as stream:
        return header_of(stream, os.fstat(stream.fileno()).st_size, file, quantised)


def header_of(stream: Any, size: int, file: Path, quantised: bool = False) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name, from a stream that is at its beginning. Only the header is read.

    Args:
      stream: of bytes, on this machine or on another.
      size: bytes of the whole file.
      file: how messages call it.
      quantised: also take the dtypes of `QUANTISED`.

    Raises:
      UnfitError: a tensor has a dtype that weights cannot have.
      CheckpointError: the file is truncated, damaged or no safetensors file.
    """
    first = stream.read(8)
    length = int.from_bytes(first, "little")
    if first == b"version ":
        raise CheckpointError(f"{file} is a Git LFS pointer in place of the weights; run `git lfs pull` there.")
    if size < 8 or length > min(size - 8, MAX_HEADER):
        raise CheckpointError(f"{file}: truncated or not a safetensors file ({size} bytes); {AGAIN}.")
    entries = _parse(file, stream.read(length))
    tensors, data = {}, 8 + length
    for name, offset in _in_order(file, entries, data, size):
        if tensor := _tensor(file, name, entries[name], offset, quantised):
            tensors[name] = tensor
    return tensors


def shown(name: str) -> str:
    """Return a tensor's name as a message can have it."""
    return printable(name if len(name) < 300 else f"{name[:300]}…", keep="")


def _parse(file: Path, header: bytes) -> dict[str, _Entry]:
    """Parse a header straight into entries, so that a hostile one takes little more memory than its own size."""
    try:
        entries = msgspec.json.decode(header, type=dict[str, _Entry | None])
    except msgspec.ValidationError as error:
        raise _damaged(file, header, error) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the header of {file} is not JSON ({error}); {AGAIN}.") from None
    entries.pop("__metadata__", None)
    for name, entry in entries.items():
        if entry is None or not entry.complete:
            raise CheckpointError(f"{file}: the header's entry of {shown(name)} is damaged; {AGAIN}.")
    return entries


def _damaged(file: Path, header: bytes, error: msgspec.ValidationError) -> CheckpointError:
    """Return the error for a header that is JSON of another shape, with the name of the first such entry."""
    try:
        raw = msgspec.json.decode(header, type=dict[str, msgspec.Raw]) if len(header) <= NAMED else {}
    except (ValueError, RecursionError):
        raw = {}
    for name, entry in raw.items():
        try:
            msgspec.json.decode(entry, type=_Entry | None)
        except (ValueError, RecursionError):
            said = bytes(entry)[:99].decode(errors="replace")
            return CheckpointError(
                f"{file}: the header's entry of {shown(name)} is damaged: {printable(said)}; {AGAIN}."
            )
    return CheckpointError(f"the header of {file}: {error}; {AGAIN}.")


def _in_order(file: Path, entries: dict[str, _Entry], data: int, size: int) -> Iterator[tuple[str, int]]:
    """Yield name and place of each tensor as they lie in the file; they must fill it from byte `data` to `size`."""
    position = 0
    for name, (begin, end) in sorted(((n, e.data_offsets) for n, e in entries.items()), key=lambda item: item[1]):
        if data + end > size:
            raise CheckpointError(f"{file}: truncated: {shown(name)} ends at byte {data + end} of {size}; {AGAIN}.")
        if begin != position:
            raise CheckpointError(
                f"{file}: {shown(name)} begins at byte {begin} of the data, but should begin at byte {position}: "
                f"tensors overlap or leave holes; {AGAIN}."
            )
        position = end
        yield name, data + begin
    if data + position != size:
        raise CheckpointError(f"{file}: {size - data - position} bytes after the last tensor; {AGAIN}.")


def quantised_error(file: Path, name: str, dtype: np.dtype) -> UnfitError:
    """Return the error for a tensor whose dtype is one of `QUANTISED`."""
    return _no_weight(file, name, next(code for code, known in QUANTISED.items() if known == dtype))


def _no_weight(file: Path, name: str, code: str) -> UnfitError:
    return UnfitError(
        f"{file}: {shown(name)} is stored as {printable(code[:20])}; weights must be {', '.join(DTYPE_BY_CODE)}. "
        f"{FIX_BY_CODE.get(code, DEQUANTISE)}"
    )


def _tensor(file: Path, name: str, entry: _Entry, offset: int, quantised: bool) -> StoredTensor | None:
    """Return the tensor of an entry, or None for a buffer of another dtype that no merge needs."""
    code, shape, (begin, end) = entry.dtype, entry.shape, entry.data_offsets
    dtype = DTYPE_BY_CODE.get(code) or NO_WEIGHT.get(code) or (QUANTISED.get(code) if quantised else None)
    if dtype is None:
        if IGNORED.match(name):
            return None
        raise _no_weight(file, name, code)
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        raise CheckpointError(
            f"{file}: {shown(name)} has {end - begin} bytes in the header, its shape {shape} in {code} needs {nbytes}; "
            f"{AGAIN}."
        )
    return StoredTensor(file, dtype, shape, offset)
