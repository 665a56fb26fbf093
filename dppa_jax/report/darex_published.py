"""What is known of the numbers of Deng et al. 2024 (DAREx), arXiv 2410.09344, from darex_published.csv.

The paper's own text was not to be had. A line of the file is from its abstract, from the authors' repository
(vengdeng/DAREx, commit 0873fc2), or second-hand from a human reviewer (the third of OpenReview avSocG0oFA) who quotes
the paper; its mark says which. Numbers that only others tell are left out.
"""

import csv
from collections.abc import Collection, Mapping
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from dppa_jax.report.published import same_model
from dppa_jax.report.tables import Cell, ResultTable

MARKS = {
    "abstract": "the abstract of Deng et al. 2024, arXiv 2410.09344, which names no rate",
    "repository": "the authors' repository, github.com/vengdeng/DAREx at 0873fc2",
    "human reviewer": "second-hand: a human reviewer of OpenReview avSocG0oFA, who quotes table 5",
}
ENCODERS = ("bert-base-uncased", "roberta-base")  # the paper's; its fine-tunes of them are not on the hub


class Told(NamedTuple):
    """One number.

    Attributes:
      table: of the paper, or where else it is from.
      model: the base, or "encoders" for all of `ENCODERS`.
      task: what the expert was fine-tuned on.
      quantity: what was measured, or chosen.
      rate: the share removed; None where it is not told.
      value: as it was printed.
      mark: a key of `MARKS`.
    """

    table: str
    model: str
    task: str
    quantity: str
    rate: float | None
    value: float
    mark: str

    @property
    def models(self) -> tuple[str, ...]:
        """The bases that it is of."""
        return ENCODERS if self.model == "encoders" else (self.model,)


@cache
def told() -> tuple[Told, ...]:
    """Return every number, in the order of the file.

    >>> told()[0].models, told()[0].value, told()[0].mark
    (('bert-base-uncased', 'roberta-base'), 30.0, 'abstract')
    """
    with files("dppa_jax.report").joinpath("darex_published.csv").open(newline="", encoding="utf-8") as lines:
        next(lines)  # the names of the columns
        return tuple(
            Told(table, model, task, quantity, float(rate) if rate else None, float(value), mark)
            for table, model, task, quantity, rate, value, mark in csv.reader(lines)
        )


def told_table(base: str, experts: Mapping[str, str], tasks: Collection[str]) -> ResultTable | None:
    """Return what was told of a base and of tasks, each number with its mark; None if these are not the paper's.

    The experts are the paper's where each is named after the task that it was fine-tuned on.
    """
    own = [one for one in told() if any(same_model(base, model) for model in one.models)]
    own = [one for one in own if one.task in tasks and one.task in experts]
    if not own:
        return None
    rows = {}
    for one in own:
        at = "" if one.rate is None else f" at rate {one.rate:g}"
        rows[one.task, f"{one.quantity}{at}"] = [Cell((one.value,), share=False, of=f"({one.mark})")]
    notes = tuple(f"({mark}): {MARKS[mark]}." for mark in dict.fromkeys(one.mark for one in own))
    title = "Published by Deng et al. 2024, as far as it is known; nothing here was measured"
    return ResultTable(title, "quantity", ("value",), rows, notes, "darex_published")
