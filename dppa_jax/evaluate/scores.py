"""Scores: how many items of a task are answered correctly, the accuracy, and its confidence interval."""

import math
from statistics import NormalDist
from typing import NamedTuple

Z = NormalDist().inv_cdf(0.975)  # 95 % of a normal distribution are within as many standard deviations


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
        share, doubled = self.accuracy, 2 * (self.total + Z * Z)
        centre = (2 * self.correct + Z * Z) / doubled
        reach = Z * math.sqrt(4 * self.total * share * (1 - share) + Z * Z) / doubled
        low = 0.0 if self.correct == 0 else centre - reach
        high = 1.0 if self.correct == self.total else centre + reach
        return low, high


Scores = dict[str, Score]  # by task
