"""The numbers that the paper printed, from published.csv, which has a line for every number of its tables.

Source: Zhu et al. 2024, "DPPA: Pruning Method for Large Language Model to Model Merging", arXiv 2403.02799. Tables 1,
2, 3, 5 and 6 are domain ratios in percent, table 7 (appendix A) is accuracies in [0, 1], tables 4 and 8 (appendix B)
are quantiles of the deltas. Values are kept as the digits that were printed.
"""

import csv
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import PurePath
from typing import NamedTuple

SOURCE = "Zhu et al. 2024, arXiv 2403.02799"
URL = "https://arxiv.org/abs/2403.02799"

BASE = "meta-llama/Llama-2-7b-hf"
EXPERTS = {"math": "GAIR/Abel-7B-001", "finance": "AdaptLLM/finance-chat", "law": "AdaptLLM/law-chat"}

TASKS = {"math": {"gsm8k", "math"}, "finance": {"fiqa_sa", "fpb"}, "law": {"scotus", "unfair_tos"}}

# The paper prints no accuracy of its dense experts. These are the ones from which all of its tables 1 and 2 follow by
# its appendix A: for math the accuracies as the authors rounded them, for the others numbers of right answers.
DENSE = {
    "gsm8k": 0.5981,
    "math": 0.13,
    "fiqa_sa": 161 / 235,
    "fpb": 671 / 970,
    "scotus": 13 / 60,
    "unfair_tos": 36 / 172,
}

PERCENT_TABLES = (1, 2, 3, 5, 6)


class Published(NamedTuple):
    """One printed number.

    Attributes:
      table: the number of its table.
      subject: a domain; in table 7 a task.
      column: a method; in tables 4 and 8 a quantile.
      rate: the share removed.
      printed: the digits as they were printed.
    """

    table: int
    subject: str
    column: str
    rate: float | None
    printed: str

    @property
    def value(self) -> float:
        """The number; ratios and accuracies are fractions.

        >>> Published(1, "math", "owl", 0.8, "77.11").value
        0.7711
        """
        value = float(self.printed)
        return round(value / 100, 6) if self.table in PERCENT_TABLES else value


@cache
def published() -> tuple[Published, ...]:
    """Return every number, in the order of the paper's tables.

    >>> published()[0]
    Published(table=1, subject='math', column='magnitude', rate=0.1, printed='96.46')
    """
    with files("dppa_jax.report").joinpath("published.csv").open(newline="", encoding="utf-8") as lines:
        next(lines)  # the names of the columns
        return tuple(
            Published(int(table), subject, column, float(rate) if rate else None, printed)
            for table, subject, column, rate, printed in csv.reader(lines)
        )


def lookup(table: int, subject: str, column: str, rate: float) -> float | None:
    """Return a printed value as a fraction; None if the table has none in this place.

    >>> lookup(5, "law", "dppa", 0.8), lookup(1, "math", "dppa", 0.1)
    (1.4623, None)
    """
    return _by_place().get((table, subject, column, round(rate, 4)))


def is_papers(base: str, experts: Mapping[str, str]) -> bool:
    """Tell whether these are the paper's models: hub ids, with or without a revision, or directories of the same name.

    Fewer than the paper's three experts are fine. Another expert is not, nor one of the three under a wrong domain.

    >>> is_papers("meta-llama/Llama-2-7b-hf@main", {"math": "/models/Abel-7B-001", "law": "AdaptLLM/law-chat"})
    True
    >>> is_papers("meta-llama/Llama-2-7b-hf", {"math": "AdaptLLM/law-chat"})
    False
    """
    named = {name: EXPERTS.get(name, "") for name in experts}
    return (
        bool(experts) and same_model(base, BASE) and all(same_model(experts[name], hub) for name, hub in named.items())
    )


def same_model(where: str, hub: str) -> bool:
    """Tell whether a place is that of a hub id: the id, with or without a revision, or a directory of its name."""
    return bool(hub) and PurePath(where.split("@")[0]).name.casefold() == PurePath(hub).name.casefold()


@cache
def _by_place() -> dict[tuple, float]:
    return {(p.table, p.subject, p.column, p.rate): p.value for p in published()}
