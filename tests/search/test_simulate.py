"""The default rule of the DPA search against the authors', on random score functions."""

import pytest

from dppa_jax.search.simulate import KINDS, compare_rules, landscape


@pytest.fixture(scope="module")
def rows() -> dict:
    return {(row.kind, row.rule): row for row in compare_rules(seed=31, count=60)}


@pytest.mark.parametrize("kind", KINDS)
def test_default_rule_scores_fewer_candidates_than_reference(rows: dict, kind: str):
    assert rows[kind, "parabola"].evaluations < rows[kind, "reference"].evaluations


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answer", ["reference", "reference, best visited"])
def test_default_rule_misses_no_more_than_reference(rows: dict, kind: str, answer: str):
    assert rows[kind, "parabola"].regret <= rows[kind, answer].regret
    assert rows[kind, "parabola"].regret_high <= rows[kind, answer].regret_high


def test_shares_are_relative_to_the_reference(rows: dict):
    for row in rows.values():
        assert row.wins + row.ties + row.losses == pytest.approx(1)
    assert all(rows[kind, "reference"].ties == 1 for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_landscapes_are_seeded_and_differ(kind: str):
    first, again, other = (landscape(kind, seed) for seed in (4, 4, 6))
    assert first.score((1.0, 1.0)) == again.score((1.0, 1.0)) != other.score((1.0, 1.0))
