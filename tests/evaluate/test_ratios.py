"""Task and domain ratios, against published numbers and by their properties."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dppa_jax.evaluate.ratios import domain_ratio, task_ratio

SHARES = st.floats(0.01, 1)

# Accuracies of appendix A, and the ratios of tables 1 and 2 that follow from them, cut off after the second digit.
DENSE_MATH = (0.5981, 0.13)
PUBLISHED = [
    ("magnitude 90 %", (0.343442002, 0.0646), 53.41),
    ("owl 90 %", (0.342683851, 0.0664), 54.09),
    ("dp 90 %", (0.351781653, 0.0668), 54.97),
    ("magnitude 80 %", (0.501137225, 0.0996), 80.12),
    ("owl 80 %", (0.495072024, 0.0934), 77.11),
    ("dare 80 %", (0.53525398, 0.111), 87.41),
    ("dare 90 %", (0.498104625, 0.0842), 73.44),
]


@pytest.mark.parametrize(("method", "accuracies", "published"), PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_domain_ratio_reproduces_the_published_tables(method, accuracies, published):
    assert math.floor(1e4 * domain_ratio(accuracies, DENSE_MATH)) / 100 == published


def test_the_expert_itself_has_ratio_one():
    assert task_ratio(0.7, 0.7) == 1
    assert domain_ratio([0.7, 0.2], [0.7, 0.2]) == pytest.approx(1)


def test_a_model_better_than_the_expert_has_a_ratio_above_one():
    assert task_ratio(0.3, 0.2) == pytest.approx(1.5)


def test_one_lost_task_loses_the_domain():
    assert domain_ratio([0.0, 0.9], [0.9, 0.9]) == 0


def test_a_task_that_the_expert_cannot_do_has_no_ratio():
    assert math.isnan(task_ratio(0.5, 0.0))
    assert math.isnan(domain_ratio([0.5, 0.5], [0.0, 0.5]))


def test_every_task_needs_its_expert():
    with pytest.raises(ValueError, match="zip"):
        domain_ratio([0.5], [0.5, 0.6])


@given(st.lists(st.tuples(SHARES, SHARES), min_size=1, max_size=4))
def test_domain_ratio_lies_between_the_task_ratios_and_ignores_their_order(pairs):
    accuracies, experts = zip(*pairs, strict=True)
    ratios = [task_ratio(*pair) for pair in pairs]
    ratio = domain_ratio(accuracies, experts)
    assert min(ratios) * (1 - 1e-9) <= ratio <= max(ratios) * (1 + 1e-9)
    assert ratio == pytest.approx(domain_ratio(accuracies[::-1], experts[::-1]))
