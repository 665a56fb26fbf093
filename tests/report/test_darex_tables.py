"""Tables of DAREx: accuracies by method and rate, q, trainings of an expert, sizes of deltas."""

from report_runs import scores_of
from test_paper import body

from dppa_jax.evaluate.tasks import by_domain
from dppa_jax.report.darex import darex_tables
from dppa_jax.report.measurements import Measurements

(LAW,) = by_domain(("clause_type", "governing_law")).values()
DOMAINS = {"law": LAW, "law.adamr": LAW}
METHODS = ("dare", "darex_q+auto", "darex_q+bound", "magnitude", "dare/random_column", "magnitude/row")


def measured(shift: int, methods=METHODS) -> Measurements:
    """Of 100 items a task; every method answers 4 more than the one before it, and 2 more at the lower rate."""

    def of(*correct: int) -> dict:
        return scores_of(("clause_type", "governing_law"), correct, 100)

    single = {
        (method, rate, expert): of(10 + 4 * i + shift + (2 if rate == 0.8 else 0), 20 + (10 if "." in expert else 0))
        for i, method in enumerate(methods)
        for rate in (0.8, 0.9)
        for expert in DOMAINS
    }
    q = {key: 0.2 + shift / 100 for key in single if key[0].endswith("+auto")}
    q |= {key: {"a": 0.3, "b": 0.5} for key in single if key[0].endswith("+bound")}
    sizes = {"law": (0.01, 0.15), "law.adamr": (0.005, 0.08)}
    return Measurements(of(5, 15), {"law": of(100, 98), "law.adamr": of(96, 94)}, single, {}, q, sizes)


ONE = {table.name: table for table in darex_tables({0: measured(0)}, DOMAINS)}
TWO = {table.name: table for table in darex_tables({0: measured(0), 1: measured(4)}, DOMAINS)}


def test_an_expert_has_its_methods_by_what_they_remove_below_base_and_whole_expert():
    """The base answers 5 and 15 of 100, (5 + 15) / 200 = 10 %; DARE at 80 % 12 and 20, and 16 and 20 with seed 1."""
    assert body(TWO["rates-law"]) == [
        "| base | 10.0 ± 0.0 | 10.0 ± 0.0 |",
        "| whole expert | 99.0 ± 0.0 | 99.0 ± 0.0 |",
        "| **random elements** |  |  |",
        "| DARE | 17.0 ± 1.4 | 16.0 ± 1.4 |",
        "| DAREx-q, auto | 19.0 ± 1.4 | 18.0 ± 1.4 |",
        "| DAREx-q, bound | 21.0 ± 1.4 | 20.0 ± 1.4 |",
        "| **elements by importance** |  |  |",
        "| Magnitude | 23.0 ± 1.4 | 22.0 ± 1.4 |",
        "| **whole rows, columns or groups** |  |  |",
        "| DARE, random_column | 25.0 ± 1.4 | 24.0 ± 1.4 |",
        "| Magnitude, row | 27.0 ± 1.4 | 26.0 ± 1.4 |",
    ]
    assert "| DARE | 16.0 [11.6, 21.7] | 15.0 [10.7, 20.6] |" in body(ONE["rates-law"])


def test_q_that_was_found_is_shown_as_a_mean_over_linears_and_seeds():
    assert body(TWO["q"]) == [
        "| **DAREx-q, auto** |  |  |",
        "| Law | 0.22 ± 0.028 | 0.22 ± 0.028 |",
        "| Law, AdamR | 0.22 ± 0.028 | 0.22 ± 0.028 |",
        "| **DAREx-q, bound** |  |  |",
        "| Law | 0.4 ± 0 | 0.4 ± 0 |",
        "| Law, AdamR | 0.4 ± 0 | 0.4 ± 0 |",
    ]


def test_trainings_of_an_expert_stand_side_by_side_with_dare():
    table = ONE["trainings"]
    assert table.columns == ("whole (%)", "mean |δ|", "DARE 80 % (%)", "DARE 90 % (%)")
    assert [line.split(" | ")[::2] for line in body(table)[1:]] == [
        ["| Law", "0.01", "15.0 [10.7, 20.6] |"],
        ["| Law, AdamR", "0.005", "20.0 [15.0, 26.1] |"],
    ]


def test_the_best_random_and_the_best_other_method_stand_beside_the_size_smallest_first():
    """Columns and rows that go as a whole are neither."""
    assert body(ONE["sizes"])[:2] == [
        "| **Law, AdamR** |  |  |  |  |",
        "| 80 % | 0.005 | 0.08 | 25.0 [19.5, 31.4] DAREx-q, bound | 27.0 [21.3, 33.5] Magnitude |",
    ]
    assert [section for section, _ in ONE["sizes"].sections()] == ["Law, AdamR", "Law"]
    cell = ONE["sizes"].as_dict()["rows"][0]["cells"]["by importance, the best (%)"]
    assert (cell["of"], cell["values"]) == ("Magnitude", [0.27])


def test_other_reports_have_no_such_tables():
    assert darex_tables({0: measured(0, ("dare", "magnitude"))}, DOMAINS) == []
    names = [table.name for table in darex_tables({0: measured(0, ("darex_q+auto",))}, {"law": LAW})]
    assert names == ["rates-law", "q"]
