"""What processes tell each other: the bits arrive, and bytes of any kind give a value or a message."""

import math
import pickle
import struct
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from dppa_jax.runtime.plain import DTYPES, pack, unpack

floats = st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack("<d", struct.pack("<Q", bits))[0])  # any NaN, too
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | floats | st.binary() | st.text()
dtypes = st.sampled_from([dtype for name, dtype in DTYPES.items() if name != "bool"])
shapes = st_numpy.array_shapes(min_dims=0, min_side=0, max_side=4)


@st.composite
def arrays(draw) -> np.ndarray:
    """Any bits, and a layout that is not that of C."""
    dtype, shape = draw(dtypes), draw(shapes)
    content = np.random.default_rng(draw(st.integers(0, 9))).bytes(math.prod(shape) * dtype.itemsize)
    return np.frombuffer(content, dtype).reshape(shape).T


values = st.recursive(
    scalars | arrays(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(0, 9), inner, max_size=4),
    max_leaves=8,
)


def same(one, other) -> bool:
    """Tells whether two values are of the same types and the same bits."""
    if type(one) is not type(other):
        return False
    match one:
        case float():
            return struct.pack("<d", one) == struct.pack("<d", other)
        case np.ndarray():
            return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
        case list():
            return len(one) == len(other) and all(map(same, one, other))
        case dict():
            return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return one == other


@settings(max_examples=60, deadline=None)
@given(values)
def test_values_arrive_with_the_same_bits(value):
    assert same(unpack(pack(value)), value)


class Pair(NamedTuple):
    right: int
    asked: int


@dataclass
class Step:
    raw: np.ndarray
    losses: list


def test_tuples_and_classes_arrive_as_the_shape_says():
    told = {(0, 1): (None, np.arange(3, dtype=np.uint32)), (2, 3): (np.eye(2), np.zeros((0, 4)))}
    arrived = unpack(pack(told), dict[tuple[int, int], tuple[np.ndarray | None, np.ndarray]])
    assert arrived.keys() == told.keys()
    assert all(isinstance(pair, tuple) for pair in arrived.values())
    arrived[0, 1][1][0] = 7  # memory of its own
    assert unpack(pack({"mmlu": Pair(3, 4)}), dict[str, Pair]) == {"mmlu": Pair(3, 4)}
    step = unpack(pack(Step(np.ones(2, np.float32), [0.1, np.float64(0.2)])), Step)
    assert (step.raw.tolist(), step.losses) == ([1.0, 1.0], [0.1, 0.2])
    with pytest.raises(ValueError, match="Expected `int`, got `str`"):
        unpack(pack({"mmlu": ("3", 4)}), dict[str, Pair])


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_bytes_of_any_kind_give_a_value_or_a_message(data):
    content = bytearray(pack(data.draw(values)))
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    for stranger in (bytes(content), bytes(content[:-1]), data.draw(st.binary())):
        with suppress(ValueError):
            unpack(stranger)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"math": 1}),
        b"\x91" * 100_000,  # nested too deep
        b"\xdd\xff\xff\xff\xff",  # 4 billion values, none of which is there
        pack(np.zeros(4)).replace(b"float64", b"object_"),
        pack(np.zeros(4)).replace(b"\x91\x04", b"\x91\x05"),  # one element more than there are bytes
    ],
)
def test_what_is_no_plain_value_is_refused(content):
    with pytest.raises(ValueError, match="not a plain value"):
        unpack(content)


@pytest.mark.parametrize("value", [object(), np.array([object()]), np.zeros(2, ">f8"), np.zeros(2, "M8[s]")])
def test_what_has_no_plain_bytes_is_refused_where_it_is_told(value):
    with pytest.raises(TypeError, match="cannot tell each other"):
        pack([value])
