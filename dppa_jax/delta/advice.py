"""Which method suits an expert at a rate: a table of decisions, read from the top; no JAX.

Deng et al. 2024 choose by a flow chart over the same questions: is there text, are there labels, can one fine-tune
again, are deltas large, what is the rate. Its text and its thresholds were not to be had. The table and both of its
thresholds are ours, from measurements on small models.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

SMALL_NOISE = 0.15  # below it DARE loses little of an expert
LARGE_NORM = 0.10  # of a delta beside its base; from it on importance keeps more than chance does
RETRAINED = "adamr_l2"  # fine-tuning that decays toward the base, as an L2 norm of the delta


@dataclass(frozen=True)
class Case:
    """What a decision looks at.

    Attributes:
      rate: the share p of the delta that is removed.
      norm: ρ = ‖δ‖/‖W‖ over all linears.
      noise: N, of DARE: see `noise_of`.
      text, labels: whether there is text to compute the expert on, and whether there are items with answers.
    """

    rate: float
    norm: float
    noise: float
    text: bool
    labels: bool

    @property
    def is_large(self) -> bool:
        """Whether the delta is large beside its base."""
        return self.norm >= LARGE_NORM


class Row(NamedTuple):
    """A row of the table.

    Attributes:
      holds: whether the row decides a case that no row above it decides.
      method, q: the decision; q is "1-p", "1", or what it is chosen by; None where nothing is rescaled.
      preset: the decision as `--job=report` calls it: a preset and, after "+", the way in which its q is found.
      final: whether the row decides even where the change of outputs could be measured.
      why: the reason, in words.
    """

    holds: Callable[[Case], bool]
    method: str
    q: str | None
    preset: str
    final: bool
    why: str


# fmt: off
TABLE = (
    Row(lambda case: case.rate == 0, "task_arithmetic", None, "task_arithmetic", True, "nothing is removed"),
    Row(lambda case: case.rate == 1, "base", None, "magnitude", True, "everything is removed"),
    Row(lambda case: case.noise < SMALL_NOISE, "dare", "1-p", "dare", True, "small noise"),
    Row(lambda case: case.is_large and case.text, "wanda", "search", "wanda_q+auto", False, "large deltas"),
    Row(lambda case: case.is_large and case.labels, "magnitude", "search", "magnitude_q+search", False, "large deltas"),
    Row(lambda case: case.is_large, "magnitude", "1", "magnitude", False, "large deltas"),
    Row(lambda case: case.labels, "darex_q", "labels", "darex_q+search", False, "high rate, labels"),
    Row(lambda case: case.text, "darex_q", "text", "darex_q+auto", False, "high rate, text"),
    Row(lambda case: True, "magnitude", "1", "magnitude", False, "high rate, no data to choose q by"),
)
# fmt: on

CANDIDATES = ("dare", "darex_q+auto", "magnitude_q+auto", "wanda_q+auto", "dppa+auto")  # are measured on text


class Advice(NamedTuple):
    """A decision; see `Row` for what has the same name.

    Attributes:
      noise: N; infinite where everything is removed.
      retrain_with: how to fine-tune again so that DARE suits the new delta; None where it is not needed, or cannot be.
    """

    noise: float
    method: str
    q: str | None
    why: str
    retrain_with: str | None
    preset: str
    final: bool


def noise_of(rate: float, norm: float) -> float:
    """Return N = ρ·sqrt(p/(1−p)): DARE's noise beside a linear's output, if inputs met δ as they meet W.

    >>> noise_of(0.5, 0.1), noise_of(1.0, 0.1)
    (0.1, inf)
    """
    return norm * math.sqrt(rate / (1.0 - rate)) if rate < 1 else math.inf


def rate_of_noise(noise: float, norm: float) -> float:
    """Return the rate at which the noise is `noise`, the inverse of `noise_of`.

    >>> round(noise_of(rate_of_noise(0.15, 0.032), 0.032), 12)
    0.15
    """
    return noise**2 / (noise**2 + norm**2)


def advise(
    rate: float,
    relative_norm: float,
    text: bool = False,
    labels: bool = False,
    can_retrain: bool = False,
    noise: float | None = None,
) -> Advice:
    """Decide which method suits an expert at a rate.

    Args:
      rate: the share of the delta that is removed.
      relative_norm: ‖δ‖/‖W‖ over all linears.
      text, labels: whether there is text to compute the expert on, and whether there are items with answers.
      can_retrain: whether the expert can be fine-tuned again.
      noise: DARE's noise as it was measured on text, in place of `noise_of`.

    >>> advise(0.9, 0.0038).method, advise(0.99, 0.032, text=True).preset
    ('dare', 'darex_q+auto')
    """
    noise = noise_of(rate, relative_norm) if noise is None else noise
    case = Case(rate, relative_norm, noise, text, labels)
    row = next(row for row in TABLE if row.holds(case))
    retrain = RETRAINED if can_retrain and SMALL_NOISE <= noise < math.inf else None
    return Advice(noise, row.method, row.q, row.why, retrain, row.preset, row.final)
