"""How DAREx's q is found: by a rule or by gradient for each linear, by the change of outputs, or by a score."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import msgspec

from dppa_jax.config.evaluation import Split
from dppa_jax.config.numbers import Coefficient, of_experts
from dppa_jax.config.option import check, option, same
from dppa_jax.config.search import FactorSearch
from dppa_jax.runtime.reading import MAX_KEPT_BYTES, read_json

UNLABELLED, LABELLED, GRADIENT = "auto", "search", "gradient"  # ways that measure a whole model
FIX = 'Give --q a file with {"q": {"NAME": 0.2}}, or with a number for each linear in place of 0.2.'


def ways() -> tuple[str, ...]:
    """Return the values of --q that ask for it to be found: the rules for linears, and what measures a whole model."""
    return (*rules(), UNLABELLED, LABELLED, GRADIENT)


def rules() -> Collection[str]:
    """Return the names of the rules for linears."""
    from dppa_jax.delta.q_rules import Q_RULES  # here, as --help does without NumPy

    return Q_RULES


class QFile(msgspec.Struct):
    """What a merge reads of a file of DAREx's q."""

    q: dict[str, float | dict[str, float]]


def read_q(file: str | Path, experts: Sequence[str]) -> dict[str, Coefficient]:
    """Read {"q": {expert: number, or numbers by linear}}, as `--q=WAY` writes it to q.json in `--workdir`.

    Raises:
      ValueError: not such a file, or an expert is missing or unknown.
    """
    return of_experts(f"--q={file}", "q", read_json(file, QFile, MAX_KEPT_BYTES, FIX).q, experts)


@dataclass(frozen=True)
class QConfig:
    """How DAREx's q is found.

    Attributes:
      way: a rule of `delta.q_rules.Q_RULES`; "auto", by the change of outputs on --calibration text; "gradient", of
        every linear by the derivative of that change; or "search", by the score on validation items.
      eta: the parameter η of the bound, whose unit is that of 1/h: deltas that are twice as large need half of it. Of
        several the one is taken whose q changes the outputs least.
      objective: the change of outputs that "auto" makes small.
      positions: which of a row's positions "auto" looks at: "all", or the "last" alone, where an answer begins.
      rule: how "auto" and "search" walk q.
      walk: HIGH and STEP of the authors' walk; by default those of their example at rate 0.99, in proportion to the
        density: ten and five times 1−p.
      split, limit: the items of "search".
      steps: how many steps "gradient" takes at most.
      given: experts whose q is not searched.
    """

    FLAG_PREFIX: ClassVar[str] = "q_"
    HELP_GROUP: ClassVar[str] = "DAREx-q"

    way: str
    eta: tuple[float, ...] = option(
        (0.45,), "bound, reference: the bound's parameter; of several the one that changes outputs least", above=0
    )
    objective: str = option(
        "top_logits",
        "auto: what is to change least: top_logits, squares of the 5 largest; hidden, sizes of the last states",
        choices=("top_logits", "hidden"),
    )
    positions: str = option(
        "all",
        "auto: positions of a row that count: all, or the last, if the lines of --calibration end where answers begin",
        choices=("all", "last"),
        rare=True,
    )
    rule: str = option(
        "parabola",
        "auto, search: how q is walked; parabola: in ln q on [1-rate, 1]; darex: as the authors' code does",
        choices=("parabola", "darex"),
    )
    walk: tuple[float, ...] = option((), "HIGH,STEP of --q_rule=darex; default 10 and 5 times 1-rate")
    steps: int = option(200, "gradient: steps at most, over which the learning rate falls to 0", least=1, rare=True)
    split: Split = same(FactorSearch, "split")
    limit: int | None = same(FactorSearch, "limit")
    given: tuple[str, ...] = ()

    @property
    def is_rule(self) -> bool:
        """Whether a rule finds the q of each linear, in closed form."""
        return self.way in rules()

    @property
    def holds_models(self) -> bool:
        """Whether base and expert are whole on the devices meanwhile."""
        return self.way == GRADIENT

    @property
    def is_of_linears(self) -> bool:
        """Whether each linear has its own q."""
        return self.is_rule or self.holds_models

    def __post_init__(self):
        check(self)
        if self.walk and not (len(self.walk) == 2 and self.walk[1] > 0 and 0 < self.walk[0] <= 1):
            raise ValueError(f"--q_walk={self.walk}: give HIGH,STEP, the largest q up to 1 and the first step.")
