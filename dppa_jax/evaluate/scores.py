"""Scores: how many items of a task are answered correctly, the accuracy, and its confidence interval."""

from typing import NamedTuple


class Score(NamedTuple):
    """How many items of a task a model answers correctly, and how many it was asked."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """The share of correct answers, in [0, 1]."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the accuracy. Source: Wilson 1927.

        >>> low, high = Score(36, 172).interval
        >>> round(low, 4), round(high, 4)
        (0.1552, 0.2761)
        """
        from scipy.stats import binomtest  # takes half a second, which a merge should not cost

        interval = binomtest(self.correct, self.total).proportion_ci(0.95, method="wilson")
        return float(interval.low), float(interval.high)


Scores = dict[str, Score]  # by task
