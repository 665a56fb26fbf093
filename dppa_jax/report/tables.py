"""Tables of measured values: printed, and as markdown, CSV, JSON and the cells of a page."""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from dppa_jax.evaluate.scores import Score

DASH = "–"
NO_RATIO = f"{DASH}: no ratio, because the dense expert answers nothing of a task correctly."
INTERVALS = "[ ]: 95 % interval of the accuracy (Wilson 1927)."
SPREAD = "±: standard deviation over the seeds."
PUBLISHED = "( ): published by Zhu et al. 2024, arXiv 2403.02799."


@dataclass(frozen=True)
class Cell:
    """One value measured with several seeds, or none.

    Attributes:
      values: fractions, one per seed; NaN where there is no ratio.
      intervals: the 95 % interval of every value, or none. They are not pooled: seeds share their questions, so counts
        of several seeds are not independent, and the spread over seeds is shown in place of an interval.
      published: what the paper printed in this place, as a fraction.
    """

    values: tuple[float, ...] = ()
    intervals: tuple[tuple[float, float], ...] = ()
    published: float | None = None

    @classmethod
    def of_scores(cls, scores: Sequence[Score], published: float | None = None) -> "Cell":
        """The accuracies of one task, by seed.

        >>> str(Cell.of_scores([Score(36, 172)]))
        '20.9 [15.5, 27.6]'
        """
        return cls(tuple(s.accuracy for s in scores), tuple(s.interval for s in scores), published)

    @property
    def mean(self) -> float:
        return float(np.mean(self.values)) if self.values else math.nan

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds, 0 of one."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else 0.0

    @property
    def has_ratio(self) -> bool:
        return not any(math.isnan(value) for value in self.values)

    @property
    def measured(self) -> str:
        """In percent, as the paper's tables are; empty where nothing was measured."""
        if not self.values:
            return ""
        if not self.has_ratio:
            return DASH
        text = f"{100 * self.mean:.1f}"
        if len(self.values) > 1:
            return f"{text} ± {100 * self.spread:.1f}"
        return text + "".join(f" [{100 * low:.1f}, {100 * high:.1f}]" for low, high in self.intervals)

    @property
    def beside(self) -> str:
        """The published value, in percent with the two digits of the paper's ratios."""
        return "" if self.published is None else f"({100 * self.published:.2f})"

    def __str__(self) -> str:
        """
        >>> str(Cell((0.8, 0.9))), str(Cell((0.8,))), str(Cell((0.534,), published=0.5341))
        ('85.0 ± 7.1', '80.0', '53.4 (53.41)')
        """
        return f"{self.measured} {self.beside}".strip()


@dataclass(frozen=True)
class ResultTable:
    """Named rows and columns of cells.

    Attributes:
      title: what the table shows, with its unit.
      corner: what the rows are.
      rows: by name, or by (section, name): a section's rows follow each other under one heading.
      notes: what a reader needs to know of the numbers, beside what the cells' signs mean.
      name: of files and links.
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
        """(section, its rows), the section "" where rows have only names."""
        found: dict[str, list] = {}
        for key, cells in self.rows.items():
            section, row = key if isinstance(key, tuple) else ("", key)
            found.setdefault(section, []).append((row, cells))
        yield from found.items()

    def footnotes(self) -> tuple[str, ...]:
        """What the signs in the cells mean, as far as they appear, and the table's own notes."""
        cells = [cell for row in self.rows.values() for cell in row]
        signs = (
            (SPREAD, any(len(cell.values) > 1 and cell.has_ratio for cell in cells)),
            (INTERVALS, any(len(cell.values) == 1 and cell.intervals for cell in cells)),
            (NO_RATIO, any(not cell.has_ratio for cell in cells)),
            (self.beside, any(cell.published is not None for cell in cells)),
        )
        return (*(text for text, appears in signs if appears), *self.notes)

    def printed(self) -> Table:
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
        lines = [_line((self.corner, *self.columns)), "|---" + "|---:" * len(self.columns) + "|"]
        for section, rows in self.sections():
            lines += [_line((f"**{section}**", *[""] * len(self.columns)))] if section else []
            lines += [_line((name, *map(str, cells))) for name, cells in rows]
        lines += ["", "  \n".join(self.footnotes())] if self.footnotes() else []
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """One line per cell, in fractions: mean, standard deviation, published value, value and interval by seed."""
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
        """As JSON: rows, whose cells have values by seed, and intervals and a published value where there are any.

        A value that is no number (no ratio) is null.
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
        found = {}
        for column, cell in zip(self.columns, row, strict=True):
            found[column] = {"values": [None if math.isnan(value) else value for value in cell.values]}
            found[column] |= {"intervals": [list(interval) for interval in cell.intervals]} if cell.intervals else {}
            found[column] |= {} if cell.published is None else {"published": cell.published}
        return found


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _with_bounds(cell: Cell, seed: int, bounds: bool) -> tuple:
    if not bounds:
        return (cell.values[seed],)
    return (cell.values[seed], *(cell.intervals[seed] if cell.intervals else ("", "")))
