"""Tables of measured values: printed, as CSV and as JSON."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table


@dataclass(frozen=True)
class Cell:
    """One value measured with several seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds, 0 of one."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else 0.0

    def __str__(self) -> str:
        """In percent, as the paper's tables are.

        >>> str(Cell((0.8, 0.9))), str(Cell((0.8,)))
        ('85.0 ± 7.1', '80.0')
        """
        text = f"{100 * self.mean:.1f}"
        return f"{text} ± {100 * self.spread:.1f}" if len(self.values) > 1 else text


@dataclass(frozen=True)
class ResultTable:
    """Named rows and columns of cells."""

    title: str
    corner: str
    columns: tuple[str, ...]
    rows: dict[str, Sequence[Cell]]

    def printed(self) -> Table:
        table = Table(self.corner, title=self.title)
        for column in self.columns:
            table.add_column(column, justify="right")
        for name, cells in self.rows.items():
            table.add_row(name, *map(str, cells))
        return table

    def markdown(self) -> str:
        lines = ["| " + " | ".join((self.corner, *self.columns)) + " |", "|---" * (1 + len(self.columns)) + "|"]
        lines += ["| " + " | ".join((name, *map(str, cells))) + " |" for name, cells in self.rows.items()]
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """One line per cell: row, column, mean, standard deviation and the value of every seed, as fractions."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        seeds = max(len(cell.values) for cells in self.rows.values() for cell in cells)
        writer.writerow([self.corner, "column", "mean", "std", *(f"seed_{i}" for i in range(seeds))])
        for name, cells in self.rows.items():
            for column, cell in zip(self.columns, cells, strict=True):
                writer.writerow([name, column, cell.mean, cell.spread, *cell.values])
        return out.getvalue()

    def as_dict(self) -> dict:
        return {
            "title": self.title,
            "rows": {
                name: {column: list(cell.values) for column, cell in zip(self.columns, cells, strict=True)}
                for name, cells in self.rows.items()
            },
        }
