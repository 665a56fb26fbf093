"""Which of the elements that tie at a threshold are kept.

Deltas of 16-bit weights have few distinct sizes, so that many elements of a linear have the score of its threshold t.
The authors drop them all, which can be far more than the rate. A rule of `TIES` says how many elements are dropped, at
least #{score < t} and at most #{score ≤ t}, so that only those that tie are in question. Where some of them are kept, a
hash of their place in the tensor chooses: an element is then ranked by the pair (score, hash), and a bound is a pair.
"""

import hashlib
from decimal import Decimal
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int64, UInt32

from dppa_jax.delta.draws import COLUMN_STEP, hashed
from dppa_jax.delta.score import Keys
from dppa_jax.delta.threshold import Thresholds, index

FAR = 0.25  # of what is asked to be kept: a difference that matters

TIES = {  # from (n, how many are `asked` to be dropped, thresholds) to how many elements are dropped
    "auto": lambda numel, asked, found: _where(_is_far(numel, asked, found), asked, found.through),
    "drop": lambda numel, asked, found: found.through,
    "keep": lambda numel, asked, found: found.below,
    "exact": lambda numel, asked, found: asked,
    "floor": lambda numel, asked, found: asked,
}
FLOORED = ("floor",)  # the rules that ask for whole shares, see `floors`


class Placed(NamedTuple):
    """What a score needs beside the delta, and the `place_words` of its rows."""

    inputs: jax.Array | tuple | None
    words: UInt32[Array, "rows 2"]


class Pair(NamedTuple):
    """What ranks an element where ties are told apart: by `place` where `key` is equal."""

    key: Keys
    place: Keys


def dropped(ties: str, numel: int, rates: np.ndarray, found: Thresholds) -> Int[Array | np.ndarray, "problems ranks"]:
    """How many elements of each linear a rule drops. Rate 0 drops none and rate 1 all, whatever the rule.

    "exact" drops ⌈n·rate⌉, in float64, and so keeps ⌊n·(1−rate)⌋. Where no two scores are equal, "drop" keeps as many,
    and one less where n·rate is a whole number. "auto" is "exact" where "drop" would keep far less, else "drop".
    "floor" keeps what `floors` says.
    """
    asked = floors(numel, rates) if ties in FLOORED else np.ceil(numel * np.asarray(rates, np.float64)).astype(np.int64)
    return _where(np.isin(rates, (0, 1)), asked, TIES[ties](numel, asked, found))


def ranks_of(ties: str, numel: int, rates: np.ndarray) -> Int64[np.ndarray, "problems ranks"]:
    """Which thresholds a rule needs: the ranks of their keys, 0-based ascending."""
    return np.minimum(floors(numel, rates), numel - 1) if ties in FLOORED else index(numel, rates)


def floors(numel: int, rates: np.ndarray) -> Int64[np.ndarray, "problems ranks"]:
    """How many elements are dropped where ⌊n·density⌋ are kept, but at least one, densities being exact in decimals.

    Of several rates, highest first, ⌊n·share⌋ elements lie between one and the next, share being their difference, and
    there may be none. Source: the counts of mergekit 0.1.5, for Breadcrumbs too.

    >>> floors(10, np.array([[0.75], [0.999]])).tolist(), floors(10, np.array([[0.9, 0.35]])).tolist()
    ([[8], [9]], [[9, 4]])
    """
    return np.array([_floors(numel, [float(rate) for rate in own]) for own in np.asarray(rates)], np.int64)


def _floors(numel: int, rates: list[float]) -> list[int]:
    kept = [int(_share(high, low) * numel) for high, low in pairwise([1.0, *rates])]
    if len(rates) == 1 and rates[0] < 1:
        kept = [max(1, kept[0])]
    gone = [0 if rates[-1] == 0 else max(0, numel - sum(kept))]
    for between in reversed(kept[1:]):
        gone.append(gone[-1] + between)
    return gone[::-1]


def _share(high: float, low: float) -> float:
    """Return high − low as decimals: 1 − 0.8 is 0.2."""
    share = float(Decimal(repr(high)) - Decimal(repr(low)))
    return round(share, 12) if abs(share - round(share, 12)) < 1e-15 else share


def place_words(expert: str, tensor: str, start: int, stop: int, columns: int) -> UInt32[np.ndarray, "rows 2"]:
    """Make the words of the rows start..stop with which no two elements of a tensor are `hashed` to one number.

    What is hashed is column · COLUMN_STEP + first word, and each step of that can be undone where the second word is
    one and the same. With row · columns · COLUMN_STEP in the first word, all elements, of which a tensor has fewer than
    2³², differ.
    """
    digest = hashlib.blake2b(f"ties\0{expert}\0{tensor}".encode(), digest_size=8).digest()
    low, high = np.frombuffer(digest, "<u4")
    first = np.arange(start, stop, dtype=np.uint32) * np.uint32(columns) * COLUMN_STEP + low
    return np.stack([first, np.full_like(first, high)], axis=1)


def chosen(
    tied: Bool[np.ndarray, "rows columns"], count: int, expert: str, tensor: str
) -> Bool[np.ndarray, "rows columns"]:
    """Say which `count` of the tied elements of a whole tensor are kept: those whose places have the largest hashes."""
    hashes = hashed(place_words(expert, tensor, 0, *tied.shape), np.arange(tied.shape[1])[None])
    return tied & (hashes >= np.sort(hashes[tied])[-count])


def pairs(bounds: UInt32[np.ndarray, "partitions ..."]) -> UInt32[np.ndarray, "partitions 2"]:
    """Turn bounds of keys into those of pairs that say the same; leave bounds of pairs as they are."""
    return bounds if bounds.ndim == 2 else np.stack([bounds, np.zeros_like(bounds)], axis=-1)


def reaches(
    keys: Keys | Pair, bounds: UInt32[Array | np.ndarray, "#rows 1 ..."]
) -> Bool[Array | np.ndarray, "rows columns"]:
    """Is an element at or above its row's bound? Bounds of pairs are pairs, on the last axis."""
    if not isinstance(keys, Pair):
        return keys >= bounds
    key, place = bounds[..., 0], bounds[..., 1]
    return (keys.key > key) | ((keys.key == key) & (keys.place >= place))


def _where(condition: Any, yes: Any, no: Any) -> Any:
    """Choose on the host or, inside of jit, in the graph."""
    traced = any(isinstance(one, jax.Array) for one in (condition, yes, no))
    return (jnp if traced else np).where(condition, yes, no)


def _is_far(numel: int, asked: np.ndarray, found: Thresholds) -> np.ndarray | jax.Array:
    """Whether to drop all that tie keeps far less than asked. A score of zero is no change, which nobody misses."""
    return (found.through - asked > FAR * (numel - asked)) & (found.keys > 0)
