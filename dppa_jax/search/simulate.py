"""Compare the rules of the DPA search on random score functions: candidates scored, and how good the answer is.

    python -m dppa_jax.search.simulate

prints a table; it takes about twenty seconds. Every score function is a bump over the factors of two or three
partitions. Its top lies near the start (1), far above it or below it. The partitions act on each other: mostly, the
larger the factor of one, the smaller the best factor of another. There are three kinds:

  concave: the bump itself, a quadratic or a bell.
  plateaued: the bump cut off at some height, or in coarse levels, or a curve that saturates and hardly falls.
  noisy: what an evaluation of two tasks measures, sqrt(a₁/dense₁ · a₂/dense₂). Each accuracy a is the share of correct
    answers to 60 to 1319 independent items. Each task has a bump of its own.

regret = best possible true score − true score of the answer, where "possible" means on the grid within the bounds. The
true score of a noisy function is that of its bumps, without the noise.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from rich.table import Table

from dppa_jax.config.search import Factors, SearchConfig
from dppa_jax.runtime.progress import console
from dppa_jax.search.rules import search

KINDS = ("concave", "plateaued", "noisy")
SEED = 4242  # not one that the rule's constants were chosen on
COUNT = 300  # score functions of each kind
DENSE = (0.598, 0.13, 0.474, 0.69, 0.217, 0.209)  # accuracies of the paper's dense experts on their tasks
REFERENCE = "reference"

Points = Float[np.ndarray, "points partitions"]
Heights = Float[np.ndarray, " points"]


class Landscape(NamedTuple):
    """A score function.

    Attributes:
      partitions: how many factors it takes.
      score: what a search measures.
      truth: what it would measure on infinitely many items.
    """

    partitions: int
    score: Callable[[Factors], float]
    truth: Callable[[Points], Heights]


class Row(NamedTuple):
    """The results of one rule on one kind of score functions.

    Attributes:
      evaluations, evaluations_high: distinct candidates scored, mean and 90 % quantile.
      visits: mean number of candidates looked at; a rule that remembers nothing would score them all.
      regret, regret_high: mean and 90 % quantile.
      wins, ties, losses: shares of functions where the regret is lower than, equal to, higher than the reference's.
    """

    kind: str
    rule: str
    functions: int
    evaluations: float
    evaluations_high: float
    visits: float
    regret: float
    regret_high: float
    wins: float
    ties: float
    losses: float


def landscape(kind: str, seed: int) -> Landscape:
    """Return a random score function; even seeds have two partitions, odd ones three."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    partitions = 2 + seed % 2
    bump = _random_bump(rng, partitions)
    if kind == "noisy":
        return _noisy(rng, bump, seed)
    truth = bump if kind == "concave" else _plateaued(rng, bump)
    return Landscape(partitions, lambda factors: float(truth(np.array([factors]))[0]), truth)


def compare_rules(kinds: Sequence[str] = KINDS, seed: int = SEED, count: int = COUNT) -> list[Row]:
    """Run both rules, with Methods 1 and 2, on `count` functions of each kind.

    The reference has two rows: one with the factors that the authors return, one with the best that it visited.
    """
    rows = []
    for kind in kinds:
        runs: dict[str, list[tuple[int, int, float]]] = {}
        for number in range(count):
            for rule, run in _run_rules(landscape(kind, seed * 100_000 + number)).items():
                runs.setdefault(rule, []).append(run)
        reference = np.array(runs[REFERENCE])[:, 2]
        rows += [_row(kind, rule, np.array(run), reference) for rule, run in runs.items()]
    return rows


def table(rows: Sequence[Row]) -> Table:
    """Return the rows as a table to print."""
    columns = ("scored", "90 %", "looked at", "regret", "90 %", "better", "equal", "worse")
    result = Table("scores", "rule", "functions", title="DPA search on random score functions")
    for name in columns:
        result.add_column(name, justify="right")
    for i, row in enumerate(rows):
        shares = [f"{share:.0%}" for share in (row.wins, row.ties, row.losses)]
        counts = [f"{number:.1f}" for number in (row.evaluations, row.evaluations_high, row.visits)]
        regrets = [f"{number:.4f}" for number in (row.regret, row.regret_high)]
        last = i + 1 == len(rows) or rows[i + 1].kind != row.kind
        result.add_row(row.kind, row.rule, str(row.functions), *counts, *regrets, *shares, end_section=last)
    return result


class _Bump(NamedTuple):
    """A bump of height `top` at `place`: a bell, or a quadratic that ends at 2 % of the top."""

    top: float
    place: Float[np.ndarray, " partitions"]
    curvature: Float[np.ndarray, "partitions partitions"]
    bell: bool

    def __call__(self, points: Points) -> Heights:
        away = points - self.place
        fall = np.einsum("ni,ij,nj->n", away, self.curvature, away) / 2
        return self.top * (np.exp(-fall) if self.bell else np.maximum(1 - fall / 2, 0.02))


def _random_bump(rng: np.random.Generator, partitions: int) -> _Bump:
    """Return a bump whose best factors lie around the paper's, which are about 2 at 90 % and 1.4 at 80 %."""
    later = partitions - 1
    place = np.append(rng.uniform(0.5, 3.2), rng.uniform(0.3, 2.4, later))
    width = np.append(rng.uniform(0.6, 2.0), rng.uniform(0.6, 2.5, later))
    return _Bump(rng.uniform(0.6, 1.0), place, _curvature(width, rng.uniform(-0.2, 0.7)), bool(rng.integers(2)))


def _curvature(width: np.ndarray, interaction: float) -> np.ndarray:
    """Return a bump's quadratic form. With a positive interaction a larger factor lowers the best of the others."""
    together = np.full((len(width), len(width)), interaction)
    np.fill_diagonal(together, 1.0)
    return together / np.outer(width, width)


def _plateaued(rng: np.random.Generator, bump: _Bump) -> Callable[[Points], Heights]:
    form = rng.integers(3)
    if form == 0:
        height = rng.uniform(0.85, 0.97) * bump.top
        return lambda points: np.minimum(bump(points), height)
    if form == 1:
        levels = rng.integers(20, 101)
        return lambda points: np.floor(bump(points) * levels) / levels
    scale, decay = bump.place / rng.uniform(1.5, 3.0, len(bump.place)), rng.uniform(0.0, 0.04, len(bump.place))
    return lambda points: bump.top * np.prod((1 - np.exp(-points / scale)) * np.exp(-decay * points), axis=1)


def _noisy(rng: np.random.Generator, bump: _Bump, seed: int) -> Landscape:
    partitions = len(bump.place)
    items = np.exp(rng.uniform(np.log(60), np.log(1319), 2)).astype(int)
    dense = rng.choice(DENSE, 2)
    tasks = [
        bump._replace(place=np.clip(bump.place + rng.normal(0, 0.25, partitions), 0.2, 3.6))._replace(
            curvature=bump.curvature * rng.uniform(0.7, 1.5)
        )
        for _ in range(2)
    ]

    def score(factors: Factors) -> float:
        thousandths = [round(1000 * factor) for factor in factors]  # the same model gives the same answers
        draw = np.random.default_rng([seed, *thousandths])
        accuracies = dense * [float(task(np.array([factors]))[0]) for task in tasks]
        return float(np.sqrt(np.prod(draw.binomial(items, accuracies) / items / dense)))

    return Landscape(partitions, score, lambda points: np.sqrt(tasks[0](points) * tasks[1](points)))


@cache
def _grid(partitions: int) -> np.ndarray:
    axes = [bounds.grid for bounds in SearchConfig().ranges(partitions)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, partitions)


def _run_rules(land: Landscape) -> dict[str, tuple[int, int, float]]:
    """Return the candidates scored, the candidates looked at and the regret of every rule."""
    best = float(land.truth(_grid(land.partitions)).max())

    def regret(factors: Factors) -> float:
        return best - float(land.truth(np.array([factors]))[0])

    runs = {}
    for rule in ("parabola", REFERENCE):
        result = search(land.score, land.partitions, SearchConfig(rule=rule))
        runs[rule] = (result.evaluations, len(result.visits), regret(result.factors))
    runs["reference, best visited"] = (result.evaluations, len(result.visits), regret(result.best.factors))
    return runs


def _row(kind: str, rule: str, runs: np.ndarray, reference: np.ndarray) -> Row:
    scored, visits, regret = runs.T
    ahead = reference - regret
    return Row(
        kind,
        rule,
        len(runs),
        evaluations=float(scored.mean()),
        evaluations_high=float(np.quantile(scored, 0.9)),
        visits=float(visits.mean()),
        regret=float(regret.mean()),
        regret_high=float(np.quantile(regret, 0.9)),
        wins=float(np.mean(ahead > 1e-9)),
        ties=float(np.mean(np.abs(ahead) <= 1e-9)),
        losses=float(np.mean(ahead < -1e-9)),
    )


if __name__ == "__main__":
    console().print(table(compare_rules()))
