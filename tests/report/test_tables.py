"""Tables as text, CSV and JSON."""

import csv
import io
import json
import math

import pytest
from rich.console import Console

from dppa_jax.evaluate.scores import Score
from dppa_jax.report.tables import Cell, ResultTable

TABLE = ResultTable("Ratios", "rate", ("dare", "dppa"), {"80 %": [Cell((0.5, 0.7)), Cell((0.9, 0.9))]})
PUBLISHED = ResultTable(
    "Accuracy (%)",
    "sparse ratio",
    ("Magnitude", "DARE"),
    {
        ("gsm8k", "80 %"): [Cell.of_scores([Score(661, 1319)], 0.501137225), Cell.of_scores([Score(706, 1319)])],
        ("scotus", "80 %"): [Cell(), Cell((math.nan,))],
    },
    ("A note.",),
)


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (Cell((0.8,)), "80.0"),
        (Cell((0.8, 0.9)), "85.0 ± 7.1"),
        (Cell((0.36,), ((0.291, 0.435),)), "36.0 [29.1, 43.5]"),
        (Cell((0.534,), published=0.5341), "53.4 (53.41)"),
        (Cell((0.8, 0.9), ((0.7, 0.9), (0.8, 0.95)), 0.829), "85.0 ± 7.1 (82.90)"),
        (Cell((math.nan,)), "–"),
        (Cell((0.5, math.nan)), "–"),
        (Cell(), ""),
    ],
)
def test_cells_are_percent(cell, text):
    assert str(cell) == text


def test_cells_are_percent_with_the_spread_over_seeds():
    assert TABLE.markdown().splitlines()[:3] == [
        "| rate | dare | dppa |",
        "|---|---:|---:|",
        "| 80 % | 60.0 ± 14.1 | 90.0 ± 0.0 |",
    ]


def test_markdown_has_sections_and_explains_every_sign():
    assert PUBLISHED.markdown() == (
        "| sparse ratio | Magnitude | DARE |\n"
        "|---|---:|---:|\n"
        "| **gsm8k** |  |  |\n"
        "| 80 % | 50.1 [47.4, 52.8] (50.11) | 53.5 [50.8, 56.2] |\n"
        "| **scotus** |  |  |\n"
        "| 80 % |  | – |\n"
        "\n"
        "[ ]: 95 % interval of the accuracy (Wilson 1927; of other metrics a bootstrap).  \n"
        "–: no ratio, because the dense expert answers nothing of a task correctly.  \n"
        "( ): published by Zhu et al. 2024, arXiv 2403.02799.  \n"
        "A note.\n"
    )


def test_signs_that_do_not_appear_are_not_explained():
    assert TABLE.footnotes() == ("±: standard deviation over the seeds.",)


def test_csv_has_every_seed():
    rows = list(csv.reader(io.StringIO(TABLE.csv())))
    assert rows[0] == ["section", "row", "column", "mean", "std", "published", "seed_0", "seed_1"]
    assert rows[1][:3] == ["", "80 %", "dare"]
    assert [float(x) for x in rows[1][3:5] + rows[1][6:]] == [0.6, 0.14142135623730948, 0.5, 0.7]


def test_csv_has_intervals_and_published_values():
    rows = list(csv.DictReader(io.StringIO(PUBLISHED.csv())))
    first, not_measured = rows[0], rows[2]
    assert (first["section"], first["row"], first["column"]) == ("gsm8k", "80 %", "Magnitude")
    assert float(first["published"]) == 0.501137225
    low, high = Score(661, 1319).interval
    assert [float(first[name]) for name in ("seed_0", "low_0", "high_0")] == [661 / 1319, low, high]
    assert not_measured["mean"] == not_measured["seed_0"] == ""


def test_json_has_the_same_and_null_for_no_ratio():
    table = json.loads(json.dumps(PUBLISHED.as_dict(), allow_nan=False))
    first, last = table["rows"]
    assert (first["section"], first["row"]) == ("gsm8k", "80 %")
    assert first["cells"]["Magnitude"]["published"] == 0.501137225
    assert first["cells"]["DARE"] == {"values": [706 / 1319], "intervals": [list(Score(706, 1319).interval)]}
    assert last["cells"]["DARE"] == {"values": [None]}


def test_printed_shows_every_cell():
    out = io.StringIO()
    Console(file=out, width=100).print(PUBLISHED.printed())
    for text in ("Accuracy (%)", "gsm8k", "50.1 [47.4, 52.8] (50.11)", "53.5 [50.8, 56.2]", "A note."):
        assert text in out.getvalue()
