"""Which score separates kept from dropped: exact order statistics by counting.

The authors' rule: with scores sorted ascending, t = sorted[int(n·rate)] (index clamped to n−1), and an element is kept
when its score is greater than t. Sorting a linear costs a hundred times what reading it does; counting how many keys
reach a bound costs one read. A sorted sample says where to look, exact counts at a key and at the next one prove it.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int64, UInt32

BOUNDS = 4  # counted in one read: four 8-bit counters share a 32-bit word
END = 2**32  # one past the last key
SAMPLE = 65_536  # per linear: its rank error, 0.1 %, is a few distinct values of a 16-bit delta


def index(numel: np.ndarray | int, rate: np.ndarray | float) -> np.ndarray:
    """int(n·rate), clamped to n−1, in float64.

    >>> index(10, [0.0, 0.55, 1.0]).tolist()
    [0, 5, 9]
    """
    return np.minimum((np.asarray(numel) * np.asarray(rate, np.float64)).astype(np.int64), np.asarray(numel) - 1)


def order_statistics(
    count: Callable[[UInt32[np.ndarray, "problems 4"]], Int64[np.ndarray, "problems 4"]],
    numel: int,
    index: Int64[np.ndarray, "problems ranks"],
    sample: UInt32[np.ndarray, "problems samples"],
) -> tuple[UInt32[np.ndarray, "problems ranks"], Int64[np.ndarray, "problems ranks"]]:
    """t = sorted(keys)[index] for every problem (a linear of a layer) and every rank, exactly, and #{key ≤ t}.

    Args:
      count: for every problem and four bounds, how many of its keys are at or above the bound.
      numel: keys of a problem.
      index: ranks wanted, 0-based ascending.
      sample: some of each problem's keys, in any order; guides the search, never decides it.

    With below(x) = #{key < x}, the answer is the largest x with below(x) ≤ index. Each read tests two pairs of bounds
    per problem and narrows [low, high) until one key is left.
    """
    sample = np.sort(sample, axis=1)
    searches = [[_Search(numel, int(k), row) for k in ranks] for ranks, row in zip(index, sample, strict=True)]
    while any(not s.done for problem in searches for s in problem):
        bounds = np.zeros((len(searches), BOUNDS), np.uint32)
        asked: list[list[tuple[_Search, int]]] = []
        for m, problem in enumerate(searches):
            open_ = [s for s in problem if not s.done][: BOUNDS // 2]
            pairs = [(s, x) for s in open_ for x in s.candidates(BOUNDS // len(open_))]
            bounds[m, : len(pairs)] = [x for _, x in pairs]
            asked.append(pairs)
        for pairs, counts in zip(asked, count(bounds), strict=True):
            for (search, x), reached in zip(pairs, counts, strict=False):
                search.learn(x, numel - int(reached))
    found = np.array([[(s.low, s.below_high) for s in problem] for problem in searches], np.int64)
    return found[..., 0].astype(np.uint32), found[..., 1]


class _Search:
    """One rank of one problem: below(low) ≤ index < below(high)."""

    def __init__(self, numel: int, index: int, sample: np.ndarray):
        self.index, self.sample = index, sample
        self.low, self.below_low = 0, 0
        self.high, self.below_high = END, numel
        self.reads = 0

    @property
    def done(self) -> bool:
        return self.high - self.low == 1

    def learn(self, x: int, below: int) -> None:
        if below <= self.index:
            if x > self.low:
                self.low, self.below_low = x, below
        elif x < self.high:
            self.high, self.below_high = x, below

    def candidates(self, many: int) -> list[int]:
        """`many` bounds to count at next: a key and its successor where the sample repeats, else a bracket."""
        self.reads += 1
        first, last = np.searchsorted(self.sample, (self.low, min(self.high, END - 1)))
        inside = int(last - first)
        share = (self.index - self.below_low + 0.5) / (self.below_high - self.below_low)
        if inside == 0 or self.reads > 12:
            return self._split_keys(share, many)
        spread = 2.0 * np.sqrt(inside * share * (1.0 - share)) + 1.0

        def at(position: float) -> int:
            return int(self.sample[first + min(max(int(position), 0), inside - 1)])

        guess = at(share * inside)
        if at(share * inside - 1) == guess or at(share * inside + 1) == guess:  # a grid: the guess may be exact
            wanted = [guess, guess + 1]
            if many > 2:
                below, above = at(share * inside - spread), at(share * inside + spread)
                wanted += [below, above + 1]
        else:
            wanted = [at(share * inside - spread), at(share * inside + spread) + 1]
            if many > 2:
                wanted += [at(share * inside - spread / 4), at(share * inside + spread / 4) + 1]
        return wanted[:many]

    def _split_keys(self, share: float, many: int) -> list[int]:
        """No sample left inside: cut the interval of keys itself, around the guess at first, evenly at last."""
        width = self.high - self.low
        if self.reads > 8:
            cuts = [self.low + width * (i + 1) // (many + 1) for i in range(many)]
        else:
            spread = np.sqrt(share * (1 - share) / (self.below_high - self.below_low)) + 1e-9
            cuts = [self.low + int(width * (share + spread * side)) for side in (-1, 1, -0.25, 0.25)[:many]]
        return [min(max(x, self.low + 1), self.high - 1) for x in cuts]
