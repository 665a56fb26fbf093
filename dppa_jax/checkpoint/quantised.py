"""Quantised weights as the bfloat16 numbers that they stand for, made while rows are read (`--dequantise`).

config.json says in `quantization_config` how they are stored; a row of `METHODS` knows what that means. A tensor that
nothing here can read is refused by its name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float

from dppa_jax.architecture.layout import Place, stored_rows
from dppa_jax.architecture.specs import QUANTISATION, CheckpointError, matrix_shape, row_pieces
from dppa_jax.checkpoint.headers import QUANTISED, StoredTensor, UnfitError, quantised_error, shown
from dppa_jax.runtime.reading import printable

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
PIECE = 1 << 22  # numbers that are made at a time
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)  # E2M1, by its bits
BIAS = 127  # of the exponents of MXFP4's scales
LEFT_OUT = (".input_scale", ".output_scale", ".k_scale", ".v_scale")  # of activations, which are not quantised here

Parts = Mapping[str, StoredTensor]
Read = Callable[[str, int, int], np.ndarray]  # rows start to stop (exclusive) of a part, as `Place` counts rows


@dataclass(frozen=True)
class Dequantised:
    """A tensor that quantised ones stand for, in place of a `StoredTensor`.

    Attributes:
      parts: the tensors of the files, by what they are.
      shape: of what they stand for.
      make: from (how to read a part, the first row, the last, exclusive) to these rows, float32.
      unit: rows that are made together, so that one read begins at a multiple of it.
    """

    parts: Parts
    shape: tuple[int, ...]
    make: Callable[[Read, int, int], Float[np.ndarray, "rows columns"]]
    unit: int = 1
    place: Place = field(default=Place(""))

    dtype = BFLOAT16

    @property
    def file(self) -> Path:
        """The file of its numbers; their scales may be in another."""
        return next(iter(self.parts.values())).file

    @property
    def offset(self) -> int:
        """Where its numbers begin in their file."""
        return next(iter(self.parts.values())).offset

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold it."""
        return tuple(dict.fromkeys(part.file for part in self.parts.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of the files."""
        return sum(part.nbytes for part in self.parts.values())

    def at(self, place: Place, shape: tuple[int, ...]) -> "Dequantised":
        """Return the tensor of this shape that lies at a place of this one."""
        return self if place.whole else replace(self, shape=shape, place=place)

    def extents(self, start: int, stop: int) -> tuple:
        """Return no pieces of files: rows of several tensors are read for one."""
        return ()

    def read_rows(self, files: Any, name: str, start: int, stop: int, out: np.ndarray) -> None:
        """Make rows start to stop (exclusive), of the tensor as a matrix, in `out`; see `Source`."""

        def read(part: str, first: int, last: int) -> np.ndarray:
            tensor = self.parts[part]
            columns = stored_rows(tensor.shape)[1]
            rows = np.empty((last - first, columns), tensor.dtype)
            flat = replace(tensor, shape=stored_rows(tensor.shape))
            files.read_rows(name, flat, first, last, rows)
            return rows

        if self.place.whole:
            ratio = stored_rows(self.shape)[0] // matrix_shape(self.shape)[0]
            pieces = [(0, start * ratio, (stop - start) * ratio)]
        else:
            pieces = [(row - start, at, count) for row, at, count in self.place.pieces(start, stop)]
        out = out.reshape(sum(count for *_, count in pieces), -1)
        for to, at, count in pieces:
            for first, last in row_pieces(count, out.shape[1], max(PIECE, self.unit * out.shape[1])):
                out[to + first : to + last] = self.make(read, at + first, at + last).astype(BFLOAT16)


def is_quantised(stored: Parts) -> bool:
    """Return whether some tensor has numbers that only quantised weights have."""
    return any(tensor.dtype in QUANTISED.values() for tensor in stored.values())


def dequantised(stored: Mapping[str, StoredTensor], said: Any, where: Path) -> dict[str, Any]:
    """Return the tensors of the files with `Dequantised` ones in place of those that are quantised.

    Args:
      said: the quantization_config of config.json; None where it has none.
      where: the path of config.json, for messages.

    Raises:
      CheckpointError: the method is unknown, or a tensor is none that it has.
    """
    method = said.get("quant_method") if isinstance(said, Mapping) else said
    if said and method not in METHODS:
        raise CheckpointError(
            f"{where}: --dequantise reads {', '.join(METHODS)}; the weights are quantised otherwise (quant_method "
            f"{printable(str(method))[:99]!r})."
        )
    found = METHODS[method](dict(stored), said, where) if said else dict(stored)
    for name, tensor in found.items():
        if isinstance(tensor, StoredTensor) and tensor.dtype in QUANTISED.values():
            raise quantised_error(tensor.file, name, tensor.dtype)
    return found


def blockwise(parts: Parts, height: int, width: int, bits: int = 0) -> Dequantised:
    """Return weights that have a scale for each block of (height, width) elements: w · scale.

    Args:
      parts: "weight" and "scale".
      bits: of numbers that are packed into int32; 0 for weights that are a number each.
    """
    weight, scale = parts["weight"], parts["scale"]
    rows, columns = weight.shape[0], weight.shape[1] * (32 // bits if bits else 1)
    shape = stored_rows(scale.shape)
    if shape != (-(-rows // height), -(-columns // width)):
        raise UnfitError(
            f"{scale.file}: a scale of shape {scale.shape} does not fit a weight of {rows} × {columns} with blocks of "
            f"{height} × {width}; config.json does not belong to these weights."
        )

    def make(read: Read, start: int, stop: int) -> np.ndarray:
        stored = read("weight", start, stop)
        numbers = (unpacked(stored, bits) if bits else stored).astype(np.float32)
        if height == 1:
            own = read("scale", start, stop)
        else:
            own = read("scale", 0, shape[0])[np.arange(start, stop) // height]
        return numbers * np.repeat(own.astype(np.float32), width, axis=1)[:, :columns]

    return Dequantised(parts, (rows, columns), make)


def unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """Cut int32 numbers into numbers of so many bits, lowest first, which are stored with 2^(bits − 1) added.

    >>> unpacked(np.array([[0x0000F80F]], np.int32), 4)[0, :5].tolist()
    [7, -8, 0, 7, -8]
    """
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    cut = (packed.view(np.uint32)[..., None] >> shifts) & np.uint32(2**bits - 1)
    return cut.reshape(len(packed), -1).astype(np.int32) - 2 ** (bits - 1)


def microscaled(parts: Parts) -> Dequantised:
    """Return weights of MXFP4: two numbers of 4 bits in a byte, the lower first, and an exponent for each 32 of them.

    `blocks` are (experts, outputs, groups, 16) bytes, `scales` (experts, outputs, groups). The tensor that they stand
    for is (experts, inputs, outputs), as the model has it, so an expert's matrix is made whole.
    """
    experts, outputs, groups, _ = parts["blocks"].shape
    inputs = 32 * groups

    def expert(read: Read, e: int) -> np.ndarray:
        count = outputs * groups
        blocks, scales = read("blocks", e * count, (e + 1) * count), read("scales", e * outputs, (e + 1) * outputs)
        numbers = np.stack([FP4[blocks & 15], FP4[blocks >> 4]], axis=-1).reshape(outputs, groups, 32)
        exponents = scales.astype(np.int32).reshape(outputs, groups, 1) - BIAS
        return np.ldexp(numbers, exponents).reshape(outputs, inputs).T

    def make(read: Read, start: int, stop: int) -> np.ndarray:
        found = []
        for e in range(start // inputs, -(-stop // inputs)):
            first, last = max(start - e * inputs, 0), min(stop - e * inputs, inputs)
            found.append(expert(read, e)[first:last])
        return np.concatenate(found)

    return Dequantised(parts, (experts, inputs, outputs), make, unit=inputs)


def fp8(stored: dict[str, Any], said: Mapping, where: Path) -> dict[str, Any]:
    """Read DeepSeek's FP8: `weight` with `weight_scale_inv`, a factor for each block of weight_block_size."""
    height, width = _block(said.get("weight_block_size"), where)
    return _replaced(stored, {".weight_scale_inv": ".weight"}, lambda parts: blockwise(parts, height, width))


def compressed(stored: dict[str, Any], said: Mapping, where: Path) -> dict[str, Any]:
    """Read compressed-tensors: weights of 8 bits, or of 4 or 8 packed into int32, with symmetric scales."""
    groups = said.get("config_groups")
    own = [one.get("weights") or {} for one in groups.values()] if isinstance(groups, Mapping) else []
    if len(own) != 1:
        raise CheckpointError(
            f"{where}: --dequantise reads compressed-tensors with one of config_groups, not {len(own)}."
        )
    weights, strategy = own[0], own[0].get("strategy")
    if strategy not in STRATEGIES or not weights.get("symmetric", True):
        kind = strategy if weights.get("symmetric", True) else "asymmetric"
        raise CheckpointError(
            f"{where}: --dequantise reads symmetric scales by {', '.join(STRATEGIES)}, not {printable(str(kind))[:99]}."
        )

    def make(parts: Parts, bits: int = 0) -> Dequantised:
        rows, columns = parts["weight"].shape[0], parts["weight"].shape[1] * (32 // bits if bits else 1)
        return blockwise(parts, *STRATEGIES[strategy](weights, rows, columns, where), bits)

    packed = sorted(name for name in stored if name.endswith(".weight_packed"))
    for name in packed:
        stored.pop(name.removesuffix("_packed") + "_shape", None)
    bits = weights.get("num_bits")
    if packed and bits not in (4, 8):
        raise CheckpointError(f"{where}: --dequantise reads packed weights of 4 or 8 bits, not {bits!r}.")
    suffix = {".weight_scale": ".weight_packed" if packed else ".weight"}
    return _replaced(stored, suffix, lambda parts: make(parts, bits if packed else 0))


def mxfp4(stored: dict[str, Any], said: Mapping, where: Path) -> dict[str, Any]:
    """Read MXFP4 as gpt-oss has it: `NAME_blocks` and `NAME_scales` in place of NAME."""
    found = dict(stored)
    for name in [name for name in stored if name.endswith("_blocks")]:
        plain = name.removesuffix("_blocks")
        if f"{plain}_scales" not in stored:
            raise UnfitError(f"{stored[name].file}: {shown(name)} has no {shown(plain)}_scales; download it again.")
        found[plain] = microscaled({"blocks": found.pop(name), "scales": found.pop(f"{plain}_scales")})
    return found


METHODS = {"fp8": fp8, "mxfp4": mxfp4, "compressed-tensors": compressed}  # by quant_method
STRATEGIES = {  # of compressed-tensors: from (what it says of weights, rows, columns, config.json) to a block
    "tensor": lambda weights, rows, columns, where: (rows, columns),
    "channel": lambda weights, rows, columns, where: (1, columns),
    "group": lambda weights, rows, columns, where: (1, _whole(weights.get("group_size"), "group_size", where)),
    "block": lambda weights, rows, columns, where: _block(weights.get("block_structure"), where),
}


def _replaced(stored: dict[str, Any], suffixes: Mapping[str, str], make: Callable[[Parts], Dequantised]) -> dict:
    """Put what `make` gives in place of pairs of tensors, by the ends of the names of scales and of numbers."""
    found = {name: tensor for name, tensor in stored.items() if not name.endswith(LEFT_OUT)}
    for of_scale, of_weight in suffixes.items():
        for name in [name for name in stored if name.endswith(of_scale)]:
            plain = name.removesuffix(of_scale)
            weight, scale = found.pop(plain + of_weight, None), found.pop(name)
            if weight is None or len(weight.shape) != 2:
                raise UnfitError(f"{scale.file}: {shown(name)} is the scale of no matrix {shown(plain + of_weight)}.")
            found[f"{plain}.weight"] = make({"weight": weight, "scale": scale})
    return found


def _block(given: Any, where: Path) -> tuple[int, int]:
    if not isinstance(given, list | tuple) or len(given) != 2:
        raise CheckpointError(f"{where}: --dequantise needs the two sizes of a block, not {given!r:.99}.")
    height, width = (_whole(size, "a block", where) for size in given)
    return height, width


def _whole(given: Any, what: str, where: Path) -> int:
    if not isinstance(given, int) or given < 1:
        raise CheckpointError(f"{where}: {what} is {given!r:.99} in {QUANTISATION}; it must be a whole number.")
    return given
