"""Tables of measured values, which can be printed and written as markdown, CSV, JSON and HTML."""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from dppa_jax.evaluate.scores import Score
from dppa_jax.runtime import markdown

DASH = "–"
NO_RATIO = f"{DASH}: no ratio, because the dense expert answers nothing of a task correctly."
INTERVALS = "[ ]: 95 % interval of the accuracy (Wilson 1927; of other metrics a bootstrap)."
SPREAD = "±: standard deviation over the seeds."
PUBLISHED = "( ): published by Zhu et al. 2024, arXiv 2403.02799."


@dataclass(frozen=True)
class Cell:
    """One value of a table, measured with one or several seeds; empty if nothing was measured.

    Attributes:
      values: fractions, one per seed; NaN if there is no ratio.
      intervals: the 95 % interval of every value, or none. They are not pooled: seeds share their questions, so their
        counts are not independent. With several seeds the spread over seeds is shown in place of an interval.
      published: the value that the paper printed in this place, as a fraction.
      share: whether the values are shares, which are shown in percent.
      of: a word about the value, such as the method that reached it.
    """

    values: tuple[float, ...] = ()
    intervals: tuple[tuple[float, float], ...] = ()
    published: float | None = None
    share: bool = True
    of: str = ""

    @classmethod
    def of_scores(cls, scores: Sequence[Score], published: float | None = None) -> "Cell":
        """Make a cell of the accuracies of one task, one per seed.

        >>> str(Cell.of_scores([Score(36, 172)]))
        '20.9 [15.5, 27.6]'
        """
        return cls(tuple(s.accuracy for s in scores), tuple(s.interval for s in scores), published)

    @property
    def mean(self) -> float:
        """The mean over the seeds; NaN if there is none."""
        return float(np.mean(self.values)) if self.values else math.nan

    @property
    def spread(self) -> float:
        """The standard deviation over the seeds; 0 for one seed."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else 0.0

    @property
    def has_ratio(self) -> bool:
        """Whether every seed has a number."""
        return not any(math.isnan(value) for value in self.values)

    @property
    def measured(self) -> str:
        """The measured value, a share in percent as in the paper's tables; empty if nothing was measured."""
        if not self.values:
            return ""
        if not self.has_ratio:
            return DASH
        text = f"{100 * self.mean:.1f}" if self.share else f"{self.mean:.4g}"
        if len(self.values) > 1:
            text += f" ± {100 * self.spread:.1f}" if self.share else f" ± {self.spread:.2g}"
        else:
            text += "".join(f" [{100 * low:.1f}, {100 * high:.1f}]" for low, high in self.intervals)
        return f"{text} {self.of}".rstrip()

    @property
    def beside(self) -> str:
        """The published value in brackets, in percent, with two digits like the paper's ratios."""
        return "" if self.published is None else f"({100 * self.published:.2f})"

    def __str__(self) -> str:
        """
        >>> str(Cell((0.8, 0.9))), str(Cell((0.8,))), str(Cell((0.534,), published=0.5341))
        ('85.0 ± 7.1', '80.0', '53.4 (53.41)')
        >>> str(Cell((0.0049, 0.0051), share=False)), str(Cell((0.9,), of="DARE"))
        ('0.005 ± 0.00014', '90.0 DARE')
        """
        return f"{self.measured} {self.beside}".strip()


@dataclass(frozen=True)
class ResultTable:
    """A table with named rows and columns of cells.

    Attributes:
      title: what the table shows, with its unit.
      corner: what the rows are.
      columns: names of the columns.
      rows: cells by row name, or by (section, row name). The rows of a section stand together under one heading.
      notes: sentences about the numbers, beside the explanation of signs, which is added.
      name: a name for files and links.
      beside: what the values in ( ) are.
    """

    title: str
    corner: str
    columns: tuple[str, ...]
    rows: dict[str, Sequence[Cell]] | dict[tuple[str, str], Sequence[Cell]]
    notes: tuple[str, ...] = ()
    name: str = "table"
    beside: str = PUBLISHED

    def sections(self) -> Iterator[tuple[str, list[tuple[str, Sequence[Cell]]]]]:
        """Yield (section, its rows); the section is "" for rows without one."""
        sections: dict[str, list] = {}
        for key, cells in self.rows.items():
            section, row = key if isinstance(key, tuple) else ("", key)
            sections.setdefault(section, []).append((row, cells))
        yield from sections.items()

    def footnotes(self) -> tuple[str, ...]:
        """Return what the signs in the cells mean, if they appear, and the table's own notes."""
        cells = [cell for row in self.rows.values() for cell in row]
        signs = (
            (SPREAD, any(len(cell.values) > 1 and cell.has_ratio for cell in cells)),
            (INTERVALS, any(len(cell.values) == 1 and cell.intervals for cell in cells)),
            (NO_RATIO, any(not cell.has_ratio for cell in cells)),
            (self.beside, any(cell.published is not None for cell in cells)),
        )
        return (*(text for text, appears in signs if appears), *self.notes)

    def printed(self) -> Table:
        """Return the table for a terminal."""
        table = Table(self.corner, title=self.title, caption="\n".join(self.footnotes()) or None)
        for column in self.columns:
            table.add_column(column, justify="right")
        for section, rows in self.sections():
            if section:
                table.add_section()
                table.add_row(section, style="bold")
            for name, cells in rows:
                table.add_row(name, *map(str, cells))
        return table

    def markdown(self) -> str:
        """Return the table and its footnotes as markdown."""
        head = map(markdown.text, (self.corner, *self.columns))
        lines = [markdown.row(head), "|---" + "|---:" * len(self.columns) + "|"]
        for section, rows in self.sections():
            lines += [markdown.row((f"**{markdown.text(section)}**", *[""] * len(self.columns)))] if section else []
            lines += [markdown.row((markdown.text(name), *map(str, cells))) for name, cells in rows]
        lines += ["", "  \n".join(self.footnotes())] if self.footnotes() else []
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """Return a line for each cell, in fractions: mean, standard deviation, published value, and values by seed."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        cells = [cell for row in self.rows.values() for cell in row]
        seeds = max((len(cell.values) for cell in cells), default=0)
        bounds = any(cell.intervals for cell in cells)
        head = [f"{what}_{i}" for i in range(seeds) for what in (("seed", "low", "high") if bounds else ("seed",))]
        writer.writerow(["section", "row", "column", "mean", "std", "published", *head])
        for section, rows in self.sections():
            for name, row in rows:
                for column, cell in zip(self.columns, row, strict=True):
                    measured = [cell.mean, cell.spread] if cell.values else ["", ""]
                    values = [x for i in range(len(cell.values)) for x in _with_bounds(cell, i, bounds)]
                    published = "" if cell.published is None else cell.published
                    padding = [""] * (len(head) - len(values))
                    writer.writerow([section, name, column, *measured, published, *values, *padding])
        return out.getvalue()

    def as_dict(self) -> dict:
        """Return the table as JSON has it.

        A cell holds a value for each seed, null if there is no ratio, and intervals and a published value if any.
        """
        return {
            "title": self.title,
            "columns": list(self.columns),
            "rows": [
                {"section": section, "row": name, "cells": self._cells(row)}
                for section, rows in self.sections()
                for name, row in rows
            ],
            "notes": list(self.footnotes()),
        }

    def _cells(self, row: Sequence[Cell]) -> dict:
        cells = {}
        for column, cell in zip(self.columns, row, strict=True):
            cells[column] = {"values": [None if math.isnan(value) else value for value in cell.values]}
            cells[column] |= {"intervals": [list(interval) for interval in cell.intervals]} if cell.intervals else {}
            cells[column] |= {} if cell.published is None else {"published": cell.published}
            cells[column] |= {"of": cell.of} if cell.of else {}
        return cells


def _with_bounds(cell: Cell, seed: int, bounds: bool) -> tuple:
    if not bounds:
        return (cell.values[seed],)
    return (cell.values[seed], *(cell.intervals[seed] if cell.intervals else ("", "")))
