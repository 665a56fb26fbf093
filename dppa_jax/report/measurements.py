"""The scores that a report is made from: those of every model that was compared."""

from dataclasses import dataclass, field
from typing import NamedTuple

from dppa_jax.config.numbers import Coefficient
from dppa_jax.config.report import Choice
from dppa_jax.config.search import Factors
from dppa_jax.evaluate.scores import Scores


def prunes(method: str) -> bool:
    """Tell whether a method, as a report names it, removes anything.

    >>> prunes("darex_q+auto"), prunes("task_arithmetic")
    (True, False)
    """
    return Choice.of(method).ranks is not None


class Merged(NamedTuple):
    """A merge of all experts.

    Attributes:
      method: as `config.report.Choice.name` has it.
      rate: the share removed; 0 for a method that prunes nothing.
      coefficients: how they were found, a key of `config.search.ADAMERGING`; empty if they were given.
    """

    method: str
    rate: float
    coefficients: str = ""


@dataclass(frozen=True)
class Measurements:
    """All scores of one seed.

    Attributes:
      base: the base's scores by task.
      experts: the scores of each dense expert on the tasks of its domain.
      single: the scores of each pruned expert, by (method, rate, expert).
      merged: the scores of each merge.
      q: DAREx's q where it was found, by the keys of `single`.
      sizes: of each expert's delta, over the linears: the mean |δ|, and ‖δ‖ / ‖base‖.
      factors: DPA's factors where a change of outputs found them, by the keys of `single`.
    """

    base: Scores
    experts: dict[str, Scores]
    single: dict[tuple[str, float, str], Scores]
    merged: dict[Merged, Scores]
    q: dict[tuple[str, float, str], Coefficient] = field(default_factory=dict)
    sizes: dict[str, tuple[float, float]] = field(default_factory=dict)
    factors: dict[tuple[str, float, str], Factors] = field(default_factory=dict)
