"""Tables as text."""

import csv
import io

from dppa_jax.report.tables import Cell, ResultTable

TABLE = ResultTable("Ratios", "rate", ("dare", "dppa"), {"80 %": [Cell((0.5, 0.7)), Cell((0.9, 0.9))]})


def test_cells_are_percent_with_the_spread_over_seeds():
    assert TABLE.markdown().splitlines() == [
        "| rate | dare | dppa |",
        "|---|---|---|",
        "| 80 % | 60.0 ± 14.1 | 90.0 ± 0.0 |",
    ]


def test_csv_has_every_seed():
    rows = list(csv.reader(io.StringIO(TABLE.csv())))
    assert rows[0] == ["rate", "column", "mean", "std", "seed_0", "seed_1"]
    assert [float(x) for x in rows[1][2:]] == [0.6, 0.14142135623730948, 0.5, 0.7]
