"""Searches of DAREx's q: the authors' walk visit by visit, and the parabola."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from darex_golden import Stack, read_cases

from dppa_jax.config.q import QConfig
from dppa_jax.search.q import Q_SEARCHES, darex_walk, search_q

RATES = (0.9, 0.95, 0.99)


STEP = 0.05  # of the reference's walks
STATED = {  # how many q are visited, and the answer, by rate
    "encoder": {0.9: (20, pytest.approx(0.195)), 0.95: (18, pytest.approx(0.135)), 0.99: (18, pytest.approx(0.095))},
    "decoder": {0.9: (22, pytest.approx(0.16)), 0.95: (19, pytest.approx(0.095)), 0.99: (16, pytest.approx(0.04))},
}


@pytest.fixture(scope="module")
def stack(golden) -> Stack:
    return Stack(golden)


@pytest.fixture(scope="module")
def cases(golden) -> dict[float, dict]:
    return read_cases(golden)


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_3_the_walk_visits_what_the_authors_visits(kind, p, cases, stack):
    wanted = cases[p]["walk_encoder_l1" if kind == "encoder" else "walk_decoder_top5_seed0"]
    visited = []

    def score(q: float) -> float:
        visited.append((q, -stack.hidden(p, q) if kind == "encoder" else -stack.top(p, q, 0)))
        return visited[-1][1]

    low = cases[p]["walk_encoder_l1"]["visited"][0][0]
    answer = darex_walk(score, low, 1.0, STEP, low + STEP / 10 if kind == "encoder" else 0.0)
    assert (len(visited), answer) == STATED[kind][p]
    np.testing.assert_allclose(visited, wanted["visited"], rtol=0, atol=1e-9)
    assert answer == pytest.approx(wanted["answer"], abs=1e-9)


def test_3_the_top_of_a_parabola_is_found_within_a_fine_step():
    score = lambda q: 0.8 - (q - 0.237) ** 2  # noqa: E731
    found = search_q(score, 0.1, QConfig("auto", rule="darex", walk=(1.0, STEP)))
    assert abs(found.q - 0.237) <= STEP / 10
    assert abs(search_q(score, 0.1, QConfig("auto")).q / 0.237 - 1) < 0.06  # a point of its grid


SCORES = ["rising", "falling", "flat", "almost flat"]


@pytest.mark.parametrize("rule", Q_SEARCHES)
@pytest.mark.parametrize("score", [lambda q: q, lambda q: -q, lambda q: 0.0, lambda q: -1e-300], ids=SCORES)
def test_no_rule_leaves_what_q_may_be_and_the_answer_was_scored(rule: str, score: Callable[[float], float]):
    for density in (0.2, 0.01, 0.5):
        found = search_q(score, density, QConfig("auto", rule=rule))
        assert all(density <= visit.q <= 1 for visit in found.visits)
        assert found.q in [visit.q for visit in found.visits]
        assert len(found.visits) == len({visit.q for visit in found.visits}) <= 40


def test_a_flat_curve_above_it_does_not_hide_what_dare_reaches():
    assert search_q(lambda q: 80.0 if q < 0.06 else 25.0, 0.05, QConfig("auto")).q == 0.05


def test_rate_0_needs_no_search_and_rate_1_has_no_q():
    assert search_q(lambda q: 1.0, 1.0, QConfig("auto")).q == 1.0
    with pytest.raises(ValueError, match="nothing is kept"):
        search_q(lambda q: 1.0, 0.0, QConfig("auto"))
    with pytest.raises(ValueError, match="--q_walk"):
        replace(QConfig("auto"), walk=(0.1,))
