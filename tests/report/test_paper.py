"""The paper's tables, in its layout, from scores."""

import json
import math

import pytest
from report_runs import DOMAINS, PAIR, as_the_paper, two_seeds

from dppa_jax.evaluate.scores import Score, Scores
from dppa_jax.report.measurements import Measurements, Merged
from dppa_jax.report.paper import merge_table, paper_tables, published_merge, raw
from dppa_jax.report.published import published

SMALL = {table.name: table for table in paper_tables(two_seeds(), PAIR, 2)}
AS_THE_PAPER = {table.name: table for table in paper_tables({0: as_the_paper()}, DOMAINS, 3, papers=True)}


def together(measured: Measurements) -> Scores:
    """The scores of the dense experts, by task."""
    return {task: score for scores in measured.experts.values() for task, score in scores.items()}


def body(table) -> list[str]:
    """The lines of rows, without the heading and the notes."""
    return [line for line in table.markdown().splitlines()[2:] if line.startswith("|")]


def test_table_1_has_a_section_per_domain_and_means_over_seeds():
    """Math: (40/160 · 50/200)^½ = 25 % with the first seed, (60/160 · 70/200)^½ = 36.2 % with the second."""
    assert SMALL["table_1"].columns == ("Magnitude", "DARE")
    assert body(SMALL["table_1"]) == [
        "| **Math** |  |  |",
        "| 80 % | 30.6 ± 7.9 | 50.0 ± 0.0 |",
        "| **Finance** |  |  |",
        "| 80 % | 50.0 ± 0.0 | 100.0 ± 0.0 |",
    ]


def test_a_merge_of_two_experts_is_table_6_with_every_method_measured():
    table = SMALL["table_6"]
    assert table.columns == ("Math", "Finance")
    assert body(table) == [
        "| Task arithmetic | 100.0 ± 0.0 | 100.0 ± 0.0 |",
        "| DARE 80 % | 25.0 ± 0.0 | 50.0 ± 0.0 |",
        "| TIES 80 % | 50.0 ± 0.0 | 55.9 ± 8.3 |",
        "| DARE, AdaMerging 80 % | 37.5 ± 0.0 | 50.0 ± 0.0 |",
    ]


def test_only_tables_whose_methods_were_measured_appear():
    assert list(SMALL) == ["dense", "table_1", "table_6", "merge_accuracies", "table_7", "kept"]
    assert {"table_1", "table_2", "table_3", "table_5", "table_7"} < set(AS_THE_PAPER)
    only_dense = Measurements(two_seeds()[0].base, two_seeds()[0].experts, {}, {})
    assert [table.name for table in paper_tables({0: only_dense}, PAIR, 2)] == ["dense"]


def test_appendix_has_accuracies_with_intervals():
    first = next(table for table in paper_tables({0: two_seeds()[0]}, PAIR, 2) if table.name == "table_7")
    assert body(first)[:2] == [
        "| **addition** |  |  |",
        "| 80 % | 20.0 [15.0, 26.1] | 40.0 [33.5, 46.9] |",
    ]


def test_the_last_table_has_the_density_beside_the_mean_domain_ratio():
    """Magnitude, single: (25 % + 50 %) / 2 with the first seed, (36.2 % + 50 %) / 2 with the second."""
    table = paper_tables(two_seeds(), PAIR, 2)[-1]
    assert table.columns == ("bytes", "accuracy")
    assert body(table) == [
        "| **single experts, pruned** |  |  |",
        "| Magnitude 80 % | 20.0 | 40.3 ± 4.0 |",
        "| DARE 80 % | 20.0 | 75.0 ± 0.0 |",
        "| **merge of all experts** |  |  |",
        "| Task arithmetic | 100.0 | 100.0 ± 0.0 |",
        "| DARE 80 % | 20.0 | 37.5 ± 0.0 |",
        "| TIES 80 % | 20.0 | 53.0 ± 4.2 |",
        "| DARE, AdaMerging 80 % | 20.0 | 43.8 ± 0.0 |",
    ]
    assert "bytes of the delta: its density" in " ".join(table.footnotes()).lower()


@pytest.mark.parametrize("number", [1, 2, 3, 5, 7])
def test_every_published_value_stands_beside_the_measured_one(number):
    """The measured values are the published ones, up to the rounding to whole answers."""
    table = AS_THE_PAPER[f"table_{number}"]
    shown = {}
    for section, rows in table.sections():
        for row, cells in rows:
            for column, cell in zip(table.columns, cells, strict=True):
                if cell.published is not None:
                    shown[section, row, column] = cell.published
                    assert cell.mean == pytest.approx(cell.published, abs=0.02)
    assert sorted(shown.values()) == sorted(p.value for p in published() if p.table == number)


def test_published_values_stand_in_their_places():
    eighty = "| 80 % | 80.1 (80.12) | 77.1 (77.11) | 87.4 (87.41) | 97.1 (97.08) | 77.3 |  |"
    assert AS_THE_PAPER["table_1"].columns == ("Magnitude", "OWL", "DARE", "DPPA", "DP", "DARE+DPA")
    assert eighty in body(AS_THE_PAPER["table_1"])
    assert body(AS_THE_PAPER["table_2"])[0] == "| Math | 53.4 (53.41) | 54.1 (54.09) | 55.0 (54.97) |"
    assert body(AS_THE_PAPER["table_3"])[0] == "| Math | 73.4 (73.44) | 83.7 (83.63) | 86.9 (86.85) |"
    assert [line.split("|")[1].strip() for line in body(AS_THE_PAPER["table_5"])] == [
        "DARE 90 %",
        "DPPA 90 %",
        "DARE 80 %",
        "DPPA 80 %",
    ]
    assert "| 90 % | 15.0 [8.1, 26.1] (15.00) |" in AS_THE_PAPER["table_7"].markdown()


def test_other_models_have_no_published_values_beside_them():
    for table in paper_tables({0: as_the_paper()}, DOMAINS, 3, papers=False):
        assert all(cell.published is None for cells in table.rows.values() for cell in cells)


def test_table_6_is_published_for_math_and_finance_only():
    def published_in(names: tuple[str, str]) -> list[float]:
        domains = {name: DOMAINS[name] for name in names}
        tables = {table.name: table for table in paper_tables({0: as_the_paper()}, domains, len(domains), papers=True)}
        cells = [cell for cells in tables["table_6"].rows.values() for cell in cells]
        return [cell.published for cell in cells if cell.published is not None]

    assert sorted(published_in(("math", "finance"))) == sorted(p.value for p in published() if p.table == 6)
    assert published_in(("math", "law")) == []


def test_ratios_over_other_tasks_than_the_papers_have_no_published_values_beside_them():
    domains = {**DOMAINS, "math": DOMAINS["math"][:1]}
    tables = {table.name: table for table in paper_tables({0: as_the_paper()}, domains, 3, papers=True)}
    assert all(cells[0].published is None for cells in tables["table_5"].rows.values())
    assert any(cells[1].published is not None for cells in tables["table_5"].rows.values())
    assert all(
        cell.published is None
        for (domain, _), cells in tables["table_1"].rows.items()
        for cell in cells
        if domain == "Math"
    )


def test_a_merge_of_three_experts_is_table_5_whatever_is_evaluated():
    domains = {name: DOMAINS[name] for name in ("math", "finance")}
    names = [table.name for table in paper_tables({0: as_the_paper()}, domains, 3, papers=True)]
    assert "table_5" in names
    assert "table_6" not in names


def test_models_that_no_seed_changes_are_measured_once_and_keep_their_interval():
    first = two_seeds()[0]
    later = Measurements(first.base, first.experts, {}, {})
    alone, beside = (
        {table.name: table for table in paper_tables(measured, PAIR, 2)}
        for measured in ({0: first}, {0: first, 1: later})
    )
    assert alone.keys() == beside.keys()
    for name in alone:
        assert alone[name].markdown() == beside[name].markdown()


def test_dense_accuracies_beside_ours_are_said_to_be_deduced():
    assert "not printed in the paper" in AS_THE_PAPER["dense"].markdown()
    assert "published by" not in AS_THE_PAPER["dense"].markdown()


def test_one_evaluated_merge():
    m = two_seeds()[0]
    experts = together(m) | {"trend": Score(0, 200)}
    table = merge_table(m.base, experts, m.merged[Merged("ties", 0.8)], PAIR)
    assert body(table) == [
        "| **Math** |  |  |  |  |",
        "| addition | 10.0 [6.6, 14.9] | 80.0 [73.9, 85.0] | 40.0 [33.5, 46.9] | 50.0 |",
        "| comparison | 40.0 [33.5, 46.9] | 100.0 [98.1, 100.0] | 50.0 [43.1, 56.9] | 50.0 |",
        "| domain ratio |  |  |  | 50.0 |",
        "| **Finance** |  |  |  |  |",
        "| sentiment | 30.0 [24.1, 36.7] | 90.0 [85.1, 93.4] | 45.0 [38.3, 51.9] | 50.0 |",
        "| trend | 20.0 [15.0, 26.1] | 0.0 [0.0, 1.9] | 40.0 [33.5, 46.9] | – |",
        "| domain ratio |  |  |  | – |",
    ]
    assert "–: no ratio, because the dense expert answers nothing of a task correctly." in table.footnotes()


def test_raw_scores_are_json():
    found = json.loads(json.dumps(raw(two_seeds()), allow_nan=False))
    assert found["1"]["merged"][1] == {
        "method": "ties",
        "rate": 0.8,
        "coefficients": "",
        "scores": {
            "addition": {"correct": 80, "total": 200},
            "comparison": {"correct": 100, "total": 200},
            "sentiment": {"correct": 110, "total": 200},
            "trend": {"correct": 100, "total": 200},
        },
    }
    assert found["0"]["single"][0]["expert"] == "math"


def test_a_seed_without_a_ratio_leaves_no_mean():
    measured = two_seeds()
    measured[1].experts["finance"]["trend"] = Score(0, 200)
    table = next(t for t in paper_tables(measured, PAIR, 2) if t.name == "table_6")
    cell = table.rows["DARE 80 %"][1]
    assert math.isnan(cell.values[1])
    assert str(cell) == "–"


def test_a_merge_of_the_papers_models_has_its_published_ratio_beside_it():
    m = as_the_paper()
    scores = next(iter(m.merged.values()))
    known = published_merge(3, DOMAINS, "dppa", 0.8)
    assert known == {"math": 0.9128, "finance": 0.952, "law": 1.4623}
    table = merge_table(m.base, together(m), scores, DOMAINS, known)
    assert [cells[-1].published for (_, row), cells in table.rows.items() if row == "domain ratio"] == list(
        known.values()
    )
    assert published_merge(3, DOMAINS, "ties", 0.8) == dict.fromkeys(DOMAINS)
    assert published_merge(2, {name: DOMAINS[name] for name in ("math", "finance")}, "dare", 0.9)["math"] == 0.211
