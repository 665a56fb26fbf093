"""The DPA search: the authors' walk exactly, and what every rule promises."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dppa_jax.config.search import SearchConfig, search_defaults
from dppa_jax.search.rules import RULES, search


def concave(nine: float, eight: float) -> float:
    """The score function of the golden runs."""
    task1 = 0.55 - 0.05 * (nine - 2.1) ** 2 - 0.02 * (eight - 1.3) ** 2
    task2 = 0.12 - 0.008 * (nine - 1.95) ** 2 - 0.006 * (eight - 1.45) ** 2
    return math.sqrt((task1 / 0.5981) * (task2 / 0.13))


@pytest.fixture(scope="module")
def runs(golden: Path) -> dict:
    return json.loads((golden / "dpa_search" / "concave.json").read_text())["runs"]


@pytest.mark.parametrize(("method", "run"), [(1, "method1_start_1.8_0.0"), (2, "method2_start_1.0_1.0")])
def test_reference_rule_walks_the_authors_sequence(runs: dict, method: int, run: str):
    expected = runs[run]
    start = (expected["start"]["nine"], expected["start"]["eight"])
    config = SearchConfig(rule="reference", methods=(method,), starts={method: start})
    found = search(lambda factors: concave(*factors), 2, config)
    assert [list(visit.raw) for visit in found.visits] == [visit["alpha"] for visit in expected["visited"]]
    used = [(visit["nine_used"], visit["eight_used"]) for visit in expected["visited"]]
    assert [visit.factors for visit in found.visits] == used
    assert [visit.score for visit in found.visits] == [visit["performance"] for visit in expected["visited"]]
    assert list(found.finals[method]) == expected["final_alpha"]
    assert found.evaluations == expected["n_evaluated"]
    assert list(found.best.factors) == expected["best_visited"]


def test_reference_rule_takes_the_better_method_and_shares_evaluations(runs: dict):
    config = SearchConfig(rule="reference", starts={1: (1.8, 0.0)})
    found = search(lambda factors: concave(*factors), 2, config)
    assert found.factors == (2.0, 1.4)
    both = {
        tuple(visit[key] for key in ("nine_used", "eight_used")) for run in runs.values() for visit in run["visited"]
    }
    assert found.evaluations == len(both) < sum(run["n_evaluated"] for run in runs.values())


def test_reference_rule_returns_the_final_alpha_and_shows_the_best_visit():
    """The later partition does harm, and the authors' walk keeps it."""
    found = search(lambda f: 1 - 0.5 * f[1], 2, SearchConfig(rule="reference", methods=(1,)))
    assert (found.factors, found.score) == ((1.0, 1.0), 0.5)
    assert (found.best.factors, found.best.score) == ((1.0, 0.0), 1.0)


def test_reference_rule_carries_the_best_score_to_the_next_partition():
    found = search(lambda f: 2 - abs(f[0] - 1.2) - abs(f[1] - 0.9), 2, SearchConfig(rule="reference", methods=(2,)))
    later = [visit.factors for visit in found.visits if visit.partition == 1]
    assert later == [(1.2, 1.1)]
    assert found.factors == (1.2, 1.0)


def test_default_rule_finds_the_golden_optimum_with_fewer_evaluations():
    found = search(lambda factors: concave(*factors), 2, SearchConfig())
    reference = search(lambda factors: concave(*factors), 2, SearchConfig(rule="reference"))
    assert found.score >= reference.best.score
    assert found.evaluations < reference.evaluations / 2


def test_default_rule_goes_below_the_start():
    found = search(lambda f: 1 - (f[0] - 0.4) ** 2 - (f[1] - 1.3) ** 2 / 4, 2, SearchConfig())
    assert found.factors == (0.4, 1.3)


def test_default_rule_leaves_out_a_partition_that_does_harm():
    found = search(lambda f: math.exp(-((f[0] - 2) ** 2) - f[1]), 2, SearchConfig())
    assert found.factors == (2.0, 0.0)


def test_default_rule_passes_a_dip_that_stops_the_reference():
    def dipped(factors):
        return math.exp(-((factors[0] - 2.2) ** 2) / 4) - 0.05 * (factors[0] == 1.3)

    assert search(dipped, 1, SearchConfig(rule="reference")).factors == (1.2,)
    assert abs(search(dipped, 1, SearchConfig()).factors[0] - 2.2) <= 0.1


def test_default_rule_goes_no_farther_than_it_must_on_a_level_top():
    found = search(lambda factors: min(1.0, 0.5 + 0.4 * factors[0]), 2, SearchConfig())
    assert found.score == 1.0
    assert found.factors[0] < 2.5  # level from 1.25 up to the bound, 4
    assert found.factors[1] == 1.0
    assert search(lambda factors: 1.0, 2, SearchConfig()).factors == (1.0, 1.0)


def test_methods_begin_with_the_first_partition_alone_and_with_all():
    found = search(lambda f: 1.0, 3, SearchConfig(rule="reference"))
    firsts = {method: next(v.factors for v in found.visits if v.method == method) for method in (1, 2)}
    assert firsts == {1: (1.0, 0.0, 0.0), 2: (1.0, 1.0, 1.0)}


def test_method_1_is_walked_by_default_only_where_it_can_win():
    """Two tops: with the later partition the first is 1, without it 3, which scores higher only if `alone` is high."""

    def two_tops(alone: float):
        return lambda f: max(
            math.exp(-((f[0] - 1) ** 2) - (f[1] - 1) ** 2), alone * math.exp(-((f[0] - 1.6) ** 2) - 40 * f[1] ** 2)
        )

    assert search(two_tops(0.5), 2, SearchConfig()).method == 2
    found = search(two_tops(1.8), 2, SearchConfig())
    assert (found.method, found.factors) == (1, (1.6, 0.0))


@pytest.mark.parametrize("rule", RULES)
def test_random_scores_reduce_factors_from_dare_s(rule: str):
    config = search_defaults((0.9, 0.8), random=True, rule=rule)
    found = search(lambda f: 1 - (f[0] - 8) ** 2 / 100 - (f[1] - 4.5) ** 2 / 100, 2, config)
    first = {visit.method: visit.factors for visit in reversed(found.visits)}
    assert first[2] == (5.0, 5.0)  # plain DARE at the target
    assert config.begin(1, 2) == (10.0, 0.0)  # DARE of the first partition by itself
    assert all(visit.factors[0] <= 10 and visit.factors[1] <= 5 for visit in found.visits)
    assert found.factors == (8.0, 4.5)


def test_magnitude_scores_raise_factors_from_one():
    config = search_defaults((0.9, 0.8), max_evaluations=7)
    assert (config.start, config.step, config.max_evaluations) == ((1.0,), (0.1,), 7)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_score_that_is_no_number_is_an_error(rule: str, value: float):
    with pytest.raises(ValueError, match=r"factors \(1\.0, .*solves no item"):
        search(lambda factors: value, 2, SearchConfig(rule=rule))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rule": "parabla"}, "Did you mean 'parabola'|parabola"),
        ({"methods": (3,)}, "search_methods"),
        ({"methods": ()}, "search_methods"),
        ({"methods": (1, 1)}, "search_methods"),
        ({"step": (0.0,)}, "search_step"),
        ({"start": (5.0,)}, "search_start"),
        ({"start": (0.0,)}, "search_start"),
        ({"upper": (math.inf,)}, "finite"),
        ({"max_evaluations": 0}, "at least one"),
    ],
)
def test_wrong_configuration_is_an_error(wrong: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SearchConfig(**wrong)


@pytest.mark.parametrize(
    "config",
    [SearchConfig(start=(1.0, 1.0, 1.0)), SearchConfig(starts={2: (1.0,)}), SearchConfig(starts={2: (9.0, 1.0)})],
)
def test_numbers_that_do_not_fit_the_partitions_are_an_error(config: SearchConfig):
    with pytest.raises(ValueError, match="partitions"):
        search(lambda factors: 1.0, 2, config)


@st.composite
def configs(draw) -> tuple[int, dict]:
    partitions = draw(st.integers(1, 9))
    decimals = draw(st.integers(1, 2))
    unit = 10**-decimals

    def each(low: int, high: int):
        return tuple(round(draw(st.integers(low, high)) * unit, decimals) for _ in range(partitions))

    lower, start, upper = each(0, 10), each(11, 20), each(20, 60)
    step = tuple(s * draw(st.sampled_from((1, -1))) for s in each(1, 4))
    return partitions, {
        "rule": draw(st.sampled_from(sorted(RULES))),
        "methods": draw(st.sampled_from([(1,), (2,), (1, 2), (2, 1)])),
        "start": start,
        "step": step,
        "lower": lower,
        "upper": upper,
        "max_evaluations": draw(st.integers(1, 80)),
    }


@settings(deadline=None)
@given(configs(), st.integers(0, 2**32), st.sampled_from((0, 2, 30)))
def test_every_rule_keeps_its_promises(chosen: tuple[int, dict], seed: int, levels: int):
    """On scores without any order, with many ties, or all 0: within bounds, nothing scored twice, not too much."""
    partitions, config = chosen[0], SearchConfig(**chosen[1])
    asked, reported = [], []

    def score(factors):
        asked.append(factors)
        return hash((seed, factors)) % (levels + 1) / max(levels, 1)

    found = search(score, partitions, config, reported.append)
    assert len(set(asked)) == len(asked) == found.evaluations <= config.max_evaluations
    assert [visit.factors for visit in reported] == asked
    assert {visit.factors for visit in found.visits} == set(asked)
    for factors in asked:
        for factor, lower, upper in zip(factors, config.lower, config.upper, strict=True):
            assert factor == 0 or lower <= factor <= upper
    assert found.factors in asked
    assert search(score, partitions, config) == found
    if config.rule == "parabola":
        assert found.score >= found.visits[0].score
    assert found.best.score == max(visit.score for visit in found.visits)
