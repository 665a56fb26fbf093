"""How many items of a task are answered correctly, and how sure that makes the accuracy."""

from typing import NamedTuple


class Score(NamedTuple):
    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """In [0, 1]."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the accuracy. Source: Wilson 1927.

        >>> low, high = Score(36, 172).interval
        >>> round(low, 4), round(high, 4)
        (0.1552, 0.2761)
        """
        from scipy.stats import binomtest  # half a second, which a merge should not cost

        found = binomtest(self.correct, self.total).proportion_ci(0.95, method="wilson")
        return float(found.low), float(found.high)


Scores = dict[str, Score]  # by task
