"""The scores that a report is made from: those of every model that was compared."""

from typing import NamedTuple

from dppa_jax.evaluate.scores import Scores


class Merged(NamedTuple):
    """A merge of all experts.

    Attributes:
      method: a preset of `--method`.
      rate: the share removed; 0 for a method that prunes nothing.
      coefficients: how they were found, a key of `config.search.ADAMERGING`; empty if they were given.
    """

    method: str
    rate: float
    coefficients: str = ""


class Measurements(NamedTuple):
    """All scores of one seed.

    Attributes:
      base: the base's scores by task.
      experts: the score of each task, by the dense expert of its domain.
      single: the scores of each pruned expert, by (method, rate, expert).
      merged: the scores of each merge.
    """

    base: Scores
    experts: Scores
    single: dict[tuple[str, float, str], Scores]
    merged: dict[Merged, Scores]
