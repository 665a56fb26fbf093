"""The rules of the DPA search on random score functions: how many candidates each scores, and what its answer misses.

    python -m dppa_jax.search.simulate

prints a table; takes about twenty seconds. Every function is a bump over the factors of two or three partitions whose
top lies near the start (1), far above it or below it, and whose partitions act on each other: the more of one, the less
of another, mostly. Kinds:

  concave: the bump itself, a quadratic or a bell.
  plateaued: the bump cut off at some height, or in coarse levels, or a curve that saturates and hardly falls.
  noisy: what an evaluation of two tasks measures, sqrt(a₁/dense₁ · a₂/dense₂), each accuracy a being a share of 60 to
    1319 items that are answered correctly independently of each other. Each task has a bump of its own.

Regret is the true score of the best factors on the grid within the bounds, minus the true score of the answer: for
noisy functions the bumps themselves, not what was measured.
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
COUNT = 300  # functions of each kind
DENSE = (0.598, 0.13, 0.474, 0.69, 0.217, 0.209)  # accuracies of the paper's experts on their tasks
REFERENCE = "reference"

Points = Float[np.ndarray, "points partitions"]
Heights = Float[np.ndarray, " points"]


class Landscape(NamedTuple):
    """A score function: `score` is what a search measures, `truth` what it would measure on endlessly many items."""

    partitions: int
    score: Callable[[Factors], float]
    truth: Callable[[Points], Heights]


class Row(NamedTuple):
    """One rule on one kind of functions.

    Attributes:
      evaluations, evaluations_high: distinct candidates scored, mean and 90 % quantile.
      visits: candidates looked at, mean: what the rule would score if it remembered nothing.
      regret, regret_high: mean and 90 % quantile.
      wins, ties, losses: shares of functions where its regret is lower than, equal to, higher than the reference's.
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
    """A random score function; even seeds have two partitions, odd ones three."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    partitions = 2 + seed % 2
    bump = _random_bump(rng, partitions)
    if kind == "noisy":
        return _noisy(rng, bump, seed)
    truth = bump if kind == "concave" else _plateaued(rng, bump)
    return Landscape(partitions, lambda factors: float(truth(np.array([factors]))[0]), truth)


def compare(kinds: Sequence[str] = KINDS, seed: int = SEED, count: int = COUNT) -> list[Row]:
    """Both rules, with Methods 1 and 2, on `count` functions of each kind.

    The reference appears twice: with the factors that the authors return, and with the best it visited.
    """
    rows = []
    for kind in kinds:
        runs: dict[str, list[tuple[int, int, float]]] = {}
        for one in range(count):
            for rule, run in _run(landscape(kind, seed * 100_000 + one)).items():
                runs.setdefault(rule, []).append(run)
        reference = np.array(runs[REFERENCE])[:, 2]
        rows += [_row(kind, rule, np.array(run), reference) for rule, run in runs.items()]
    return rows


def table(rows: Sequence[Row]) -> Table:
    """For printing."""
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
    top: float
    place: Float[np.ndarray, " partitions"]
    curvature: Float[np.ndarray, "partitions partitions"]
    bell: bool

    def __call__(self, points: Points) -> Heights:
        away = points - self.place
        fall = np.einsum("ni,ij,nj->n", away, self.curvature, away) / 2
        return self.top * (np.exp(-fall) if self.bell else np.maximum(1 - fall / 2, 0.02))


def _random_bump(rng: np.random.Generator, partitions: int) -> _Bump:
    """The paper's factors are about 2 at 90 % and 1.4 at 80 %; these lie around them."""
    later = partitions - 1
    place = np.append(rng.uniform(0.5, 3.2), rng.uniform(0.3, 2.4, later))
    width = np.append(rng.uniform(0.6, 2.0), rng.uniform(0.6, 2.5, later))
    return _Bump(rng.uniform(0.6, 1.0), place, _curvature(width, rng.uniform(-0.2, 0.7)), bool(rng.integers(2)))


def _curvature(width: np.ndarray, interaction: float) -> np.ndarray:
    """Positive interaction: raising one factor lowers the best value of the others."""
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
        draw = np.random.default_rng(
            [seed, *(round(1000 * factor) for factor in factors)]
        )  # the same for the same model
        accuracies = dense * [float(task(np.array([factors]))[0]) for task in tasks]
        return float(np.sqrt(np.prod(draw.binomial(items, accuracies) / items / dense)))

    return Landscape(partitions, score, lambda points: np.sqrt(tasks[0](points) * tasks[1](points)))


@cache
def _grid(partitions: int) -> np.ndarray:
    axes = [one.grid for one in SearchConfig().ranges(partitions)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, partitions)


def _run(land: Landscape) -> dict[str, tuple[int, int, float]]:
    """By rule: candidates scored, candidates looked at, regret."""
    best = float(land.truth(_grid(land.partitions)).max())

    def regret(factors: Factors) -> float:
        return best - float(land.truth(np.array([factors]))[0])

    runs = {}
    for rule in ("parabola", REFERENCE):
        found = search(land.score, land.partitions, SearchConfig(rule=rule))
        runs[rule] = (found.evaluations, len(found.visits), regret(found.factors))
    runs["reference, best visited"] = (found.evaluations, len(found.visits), regret(found.best.factors))
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
    console().print(table(compare()))
