"""The published numbers: complete, exact, and what they say of our ratios."""

import math
import re
from collections import Counter
from itertools import pairwise

import pytest

from dppa_jax.evaluate.ratios import domain_ratio
from dppa_jax.report.published import BASE, DENSE, EXPERTS, Published, is_papers, lookup, published

TASKS = {"math": ("gsm8k", "math"), "finance": ("fiqa_sa", "fpb"), "law": ("scotus", "unfair_tos")}
FOLLOW_FROM_APPENDIX = [p for p in published() if p.table in (1, 2) and p.column != "dppa"]


def test_every_number_of_every_table_is_there():
    assert Counter(p.table for p in published()) == {1: 33, 2: 9, 3: 9, 4: 12, 5: 12, 6: 8, 7: 216, 8: 33}
    places = [(p.table, p.subject, p.column, p.rate) for p in published()]
    assert len(set(places)) == len(places)


def test_numbers_are_those_of_the_paper(shared):
    text = (shared / "papers/dppa_full_text.txt").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ") and line.count("|") > 3]
    number = re.compile(r"-?\d+\.\d+(?:e-\d+)?")
    printed = Counter(found for line in lines for cell in line.split("|")[2:] for found in number.findall(cell))
    assert Counter(p.printed for p in published()) == printed


@pytest.mark.parametrize("row", FOLLOW_FROM_APPENDIX, ids=lambda p: f"table {p.table} {p.subject} {p.column} {p.rate}")
def test_tables_1_and_2_follow_from_appendix_a(row: Published):
    """Percentages are cut off after two digits. 36 numbers, of which six of table 2 repeat table 1."""
    tasks = TASKS[row.subject]
    accuracies = [lookup(7, task, row.column, row.rate) for task in tasks]
    ratio = domain_ratio(accuracies, [DENSE[task] for task in tasks])
    assert math.floor(1e4 * ratio) == round(1e4 * row.value)


def test_thirty_different_values_were_checked():
    assert len({(p.subject, p.column, p.rate) for p in FOLLOW_FROM_APPENDIX}) == 30


def test_one_right_answer_more_or_less_of_the_dense_experts_would_not_do():
    """What DENSE deduces is no free choice: each number of right answers is pinned down by the printed digits."""
    totals = {"fiqa_sa": 235, "fpb": 970, "scotus": 60, "unfair_tos": 172}
    for subject in ("finance", "law"):
        rows = [p for p in FOLLOW_FROM_APPENDIX if p.subject == subject]
        for changed in TASKS[subject]:
            for step in (-1, 1):
                dense = DENSE | {changed: DENSE[changed] + step / totals[changed]}
                of = [dense[task] for task in TASKS[subject]]
                ratios = [domain_ratio([lookup(7, t, p.column, p.rate) for t in TASKS[subject]], of) for p in rows]
                assert any(math.floor(1e4 * r) != round(1e4 * p.value) for r, p in zip(ratios, rows, strict=True))


def test_quantiles_of_appendix_b_ascend():
    for domain in TASKS:
        quantiles = [p.value for p in published() if p.table == 8 and p.subject == domain]
        assert len(quantiles) == 11
        assert all(low <= high for low, high in pairwise(quantiles))


@pytest.mark.parametrize(
    ("base", "experts", "papers"),
    [
        (BASE, EXPERTS, True),
        (f"{BASE}@01c7f73", {name: f"{hub}@main" for name, hub in EXPERTS.items()}, True),
        ("/data/Llama-2-7b-hf/", {"math": "./Abel-7B-001", "finance": "../finance-chat"}, True),
        ("meta-llama/Llama-2-13b-hf", EXPERTS, False),
        (BASE, {"math": "WizardLM/WizardMath-7B-V1.0"}, False),
        (BASE, EXPERTS | {"medicine": "AdaptLLM/medicine-chat"}, False),
        (BASE, {"law": EXPERTS["finance"]}, False),
        ("demo:base", {"math": "demo:math"}, False),
        (BASE, {}, False),
    ],
)
def test_the_papers_models_are_recognised(base, experts, papers):
    assert is_papers(base, experts) is papers
