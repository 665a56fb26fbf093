"""Scores: how many items of a task are answered correctly, the accuracy, and its confidence interval."""

from typing import NamedTuple


class Score(NamedTuple):
    """How many items of a task a model answers correctly, and how many it was asked.

    Attributes:
      measured: what the task's own metric says of the answers, at most 1; None where that is the share of correct ones.
      bounds: the 95 % confidence interval of what is measured.
    """

    correct: int
    total: int
    measured: float | None = None
    bounds: tuple[float, float] | None = None

    @property
    def accuracy(self) -> float:
        """The share of correct answers, in [0, 1], or what the task's own metric says in its place."""
        return self.correct / self.total if self.measured is None else self.measured

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the accuracy. Source: Wilson 1927; of other metrics a bootstrap.

        >>> low, high = Score(36, 172).interval
        >>> round(low, 4), round(high, 4)
        (0.1552, 0.2761)
        """
        if self.bounds is not None:
            return self.bounds
        from scipy.stats import binomtest  # takes half a second, which a merge should not cost

        interval = binomtest(self.correct, self.total).proportion_ci(0.95, method="wilson")
        return float(interval.low), float(interval.high)


Scores = dict[str, Score]  # by task
