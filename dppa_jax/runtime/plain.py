"""Plain bytes for what processes tell each other: numbers, text, lists, dicts and arrays, and nothing that runs code.

The format is MessagePack. An array is its dtype's name, its shape and its bytes. Floats and arrays keep their bits.
"""

import math
from typing import Annotated, Any

import ml_dtypes
import msgspec
import numpy as np

ARRAY = 1  # MessagePack's number for what is an array here
INTEGERS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
FLOATS = ("float16", "float32", "float64", ml_dtypes.bfloat16)
DTYPES = {dtype.name: dtype for dtype in map(np.dtype, INTEGERS + FLOATS)}  # of arrays; no other is made from bytes


class _Array(msgspec.Struct, array_like=True):
    """An array as it travels."""

    dtype: str
    shape: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]
    data: memoryview


def pack(value: Any) -> bytes:
    """Turn a value into bytes.

    Args:
      value: of None, bool, int of 64 bits, float, str, bytes, list, tuple, dict, dataclass and array, in any nesting.

    Raises:
      TypeError: something in it is of another type.
    """
    return msgspec.msgpack.encode(value, enc_hook=_plain)


def unpack(content: bytes, shape: Any = Any) -> Any:
    """Return the value of bytes that `pack` made.

    Args:
      content: from anyone; whatever it is, it is only read.
      shape: the type that the value must have, such as `dict[str, tuple[int, np.ndarray]]`. Without it, tuples and
        dataclasses arrive as lists and dicts.

    Raises:
      ValueError: the bytes are not such a value.

    >>> unpack(pack({"math": (1, 0.5)}), dict[str, tuple[int, float]])
    {'math': (1, 0.5)}
    """
    try:
        return msgspec.msgpack.decode(content, type=shape, ext_hook=_array)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"not a plain value: {error}") from None


def _plain(value: Any) -> Any:
    """Say what MessagePack shall hold for a value that it does not know."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and DTYPES.get(value.dtype.name) == value.dtype:
        data = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
        return msgspec.msgpack.Ext(ARRAY, msgspec.msgpack.encode(_Array(value.dtype.name, value.shape, data)))
    kind = f"array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
    raise TypeError(f"processes cannot tell each other a value of type {kind}")


def _array(code: int, content: memoryview) -> np.ndarray:
    """Make the array that bytes describe; it has memory of its own."""
    if code != ARRAY:
        raise ValueError(f"unknown kind of value {code}")
    array = msgspec.msgpack.decode(content, type=_Array)
    if array.dtype not in DTYPES:
        raise ValueError(f"unknown dtype {array.dtype!r}")
    dtype = DTYPES[array.dtype]
    if math.prod(array.shape) * dtype.itemsize != len(array.data):
        raise ValueError(f"{len(array.data)} bytes for {array.dtype} of shape {array.shape}")
    return np.frombuffer(array.data, dtype).reshape(array.shape).copy()
