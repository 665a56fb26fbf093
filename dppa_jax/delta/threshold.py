"""Which score separates kept from dropped: exact order statistics by counting.

The authors' rule: with scores sorted ascending, t = sorted[int(n·rate)] (index clamped to n−1), and an element is kept
when its score is greater than t (`tied` has the other rules). Sorting a linear costs a hundred times what reading it
does; counting how many keys reach a bound costs one read. A sorted sample says where to look, exact counts at a key and
at the next one prove it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, UInt32
from numpy.typing import ArrayLike

BOUNDS = 4  # counted in one read: four 8-bit counters share a 32-bit word
SAMPLED_READS = 8  # then the sample has said what it can
END = 2**32  # one past the last key
SAMPLE = 65_536  # per linear: its rank error, 0.1 %, is a few distinct values of a 16-bit delta


class Thresholds(NamedTuple):
    """The keys t = sorted(keys)[index] of every problem and rank, with how many keys are around them.

    Attributes:
      keys: t.
      below: #{key < t}.
      through: #{key ≤ t}.
    """

    keys: UInt32[np.ndarray, "problems ranks"]
    below: Int64[np.ndarray, "problems ranks"]
    through: Int64[np.ndarray, "problems ranks"]


def index(numel: int, rate: ArrayLike) -> np.int64 | np.ndarray:
    """int(n·rate), clamped to n−1, in float64.

    >>> index(10, [0.0, 0.55, 1.0]).tolist()
    [0, 5, 9]
    """
    return np.minimum((numel * np.asarray(rate, np.float64)).astype(np.int64), numel - 1)


def sample_starts(rows: int, columns: int, many: int) -> Int32[np.ndarray, "rows 1"]:
    """Where in each row to take a sample of `many` neighbours: consecutive rows at columns far apart."""
    prime = 7919
    return (np.arange(rows, dtype=np.int64) * prime % (columns - many + 1)).astype(np.int32)[:, None]


def order_statistics(
    count: Callable[[UInt32[np.ndarray, "problems 4"]], Int64[np.ndarray, "problems 4"]],
    numel: int,
    index: Int64[np.ndarray, "problems ranks"],
    sample: UInt32[np.ndarray, "problems samples"],
) -> Thresholds:
    """Find t = sorted(keys)[index] for every problem (a linear of a layer) and every rank, exactly.

    Args:
      count: for every problem and four bounds, how many of its keys are at or above the bound.
      numel: keys of a problem.
      index: ranks wanted, 0-based ascending.
      sample: some of each problem's keys, in any order; guides the search, never decides it.

    With below(x) = #{key < x}, the answer is the largest x with below(x) ≤ index. Each read tests four bounds
    per problem and narrows [low, high) until one key is left.
    """
    sample = np.sort(sample, axis=1)
    searches = [[_KeySearch(numel, int(k), row) for k in ranks] for ranks, row in zip(index, sample, strict=True)]
    _narrow(searches, count, numel)
    found = np.array([[(s.low, s.below_low, s.below_high) for s in problem] for problem in searches], np.int64)
    return Thresholds(found[..., 0].astype(np.uint32), found[..., 1], found[..., 2])


def cuts(
    count: Callable[[UInt32[np.ndarray, "problems 4 2"]], Int64[np.ndarray, "problems 4"]],
    numel: int,
    found: Thresholds,
    dropped: Int64[np.ndarray, "problems ranks"],
) -> UInt32[np.ndarray, "problems ranks"]:
    """Find the places at which to cut tied elements, so that `dropped` elements are below the pair (t, place).

    Args:
      count: for every problem and four pairs, how many of its elements are at or above the pair.
      numel: elements of a problem, no two of which have one place.
      dropped: how many elements are to be below; where that is #{key < t} or less the cut is 0.
    """
    ranks = zip(*(x.tolist() for x in (*found, dropped)), strict=True)
    searches = [[_CutSearch(*of_rank) for of_rank in zip(*problem, strict=True)] for problem in ranks]
    _narrow(searches, count, numel)
    return np.array([[s.low for s in problem] for problem in searches], np.uint32)


def _narrow(searches: Sequence[Sequence["_Search"]], count: Callable[[np.ndarray], np.ndarray], numel: int) -> None:
    """Count at bounds that the searches of each problem ask for, four in a read, until all of them are done."""
    while any(not s.done for problem in searches for s in problem):
        bounds = np.zeros((len(searches), BOUNDS, *searches[0][0].bound(0).shape), np.uint32)
        asked: list[list[tuple[_Search, int]]] = []
        for m, problem in enumerate(searches):
            open_ = [s for s in problem if not s.done][: BOUNDS // 2]
            pairs = [(s, x) for s in open_ for x in s.candidates(BOUNDS // len(open_))]
            for c, (search, x) in enumerate(pairs):
                bounds[m, c] = search.bound(x)
            asked.append(pairs)
        for pairs, counts in zip(asked, count(bounds), strict=True):
            for (search, x), reached in zip(pairs, counts, strict=False):
                search.learn(x, numel - int(reached))


class _Search:
    """One rank of one problem: below(low) ≤ index < below(high)."""

    def __init__(self, index: int, below_low: int, below_high: int):
        self.index = index
        self.low, self.below_low = 0, below_low
        self.high, self.below_high = END, below_high
        self.reads = 0

    @property
    def done(self) -> bool:
        return self.high - self.low == 1

    def bound(self, x: int) -> UInt32[np.ndarray, "*pair"]:
        """What to count at, to learn of x."""
        return np.array(x, np.uint32)

    def learn(self, x: int, below: int) -> None:
        if below <= self.index:
            if x > self.low:
                self.low, self.below_low = x, below
        elif x < self.high:
            self.high, self.below_high = x, below

    def candidates(self, many: int) -> list[int]:
        """`many` bounds to count at next, most telling first."""
        self.reads += 1
        return [x for x in dict.fromkeys(self.wanted()) if self.low < x < self.high][:many]

    def wanted(self) -> list[int]:
        raise NotImplementedError


class _KeySearch(_Search):
    """For t = sorted(keys)[index]."""

    def __init__(self, numel: int, index: int, sample: np.ndarray):
        super().__init__(index, 0, numel)
        self.sample = sample

    def wanted(self) -> list[int]:
        first, last = np.searchsorted(self.sample, (self.low, min(self.high, END - 1)))
        inside = self.sample[first:last]
        return self._from_sample(inside) if len(inside) and self.reads <= SAMPLED_READS else self._round_keys()

    def _from_sample(self, inside: np.ndarray) -> list[int]:
        """Keys at the wanted rank among the sampled ones: to be proved exact on a grid, to bracket it elsewhere."""
        share = (self.index - self.below_low + 0.5) / (self.below_high - self.below_low)
        position = share * len(inside)
        spread = 2.0 * np.sqrt(position * (1.0 - share)) + 1.0

        def at(place: float | np.integer) -> int:
            return int(inside[min(max(int(place), 0), len(inside) - 1)])

        guess = at(position)
        start, stop = np.searchsorted(inside, (guess, guess + 1))
        outer = [at(position - spread), at(position + spread) + 1]
        if 2 * (stop - start) < spread:
            return [*outer, at(position - spread / 4), at(position + spread / 4) + 1, guess, guess + 1]
        near, far = (at(start - 1), at(stop)) if position - start < stop - position else (at(stop), at(start - 1))
        return [guess, guess + 1, near, near + 1, far, far + 1, *outer]

    def _round_keys(self) -> list[int]:
        """No sample left inside: the roundest keys there, since deltas of 16-bit weights have few mantissa bits."""
        middle = _roundest(self.low, self.high)
        left, right = _roundest(self.low, middle), _roundest(middle, self.high)
        return [middle, middle + 1, left, left + 1, right, right + 1, self.low + 1, self.high - 1]


class _CutSearch(_Search):
    """For a cut among elements whose key is t, with exactly `dropped` elements below (t, cut)."""

    def __init__(self, key: int, below: int, through: int, dropped: int):
        super().__init__(min(max(dropped, below), through), below, through)
        self.key = key
        self.split = below < dropped < through

    @property
    def done(self) -> bool:
        return not self.split or self.below_low == self.index or super().done

    def bound(self, x: int) -> UInt32[np.ndarray, "2"]:
        return np.array([self.key, x], np.uint32)

    def wanted(self) -> list[int]:
        """Places are spread evenly, so the cut is where the share is, give or take a standard deviation."""
        tied, width = self.below_high - self.below_low, self.high - self.low
        share = (self.index - self.below_low) / tied if self.reads <= SAMPLED_READS else 0.5
        spread = np.sqrt(share * (1.0 - share) / tied)
        near = [self.low + round(width * (share + way * spread)) for way in (-0.4, 0.4, -1.5, 1.5)]
        return [*near, min(max(self.low + round(width * share), self.low + 1), self.high - 1)]


def _roundest(low: int, high: int) -> int:
    """The number with most trailing zero bits strictly between low and high; high − 1 when there is none.

    >>> _roundest(5, 9), _roundest(4, 8), _roundest(4, 6)
    (8, 6, 5)
    """
    number = high - 1
    while number & (number - 1) > low:
        number &= number - 1
    return number
