"""Search DAREx's q of an expert: one number, by which all that is kept of its delta is divided.

A rule takes a score function, which is to be high, and the density 1−p, and looks at q in [1−p, 1]. "parabola", the
default, is ours; "darex" is the walk of the authors' code.

    result = search_q(score, density=0.1, config=QConfig("auto"))
    result.q, result.score, result.visits
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.q import QConfig
from dppa_jax.config.search import SearchConfig
from dppa_jax.evaluate.ratios import domain_ratio
from dppa_jax.evaluate.tasks import Task
from dppa_jax.runtime.progress import steps
from dppa_jax.search.candidates import Candidates
from dppa_jax.search.factors import check_solvable
from dppa_jax.search.rules import search

POINTS = 41  # of the parabola's grid, even in ln q: at rate 0.99 the next one is 12 % larger, at 0.9 6 %
FIRST = 11.0  # the point where it begins: (1−p) to the power of ¾
MISSES = 4  # in a row end a walk of the authors'
FINER = 0.1  # their fine step, as a share of the coarse one
WALK = (10.0, 5.0)  # times 1−p: the highest q and the step of their example at rate 0.99

Score = Callable[[float], float]


class QVisit(NamedTuple):
    """A q that was scored."""

    q: float
    score: float


@dataclass(frozen=True)
class QResult:
    """The answer of a search, its score, and every q that was scored, in order."""

    q: float
    score: float
    visits: tuple[QVisit, ...]


@dataclass
class QSearched:
    """The search of one expert's q.

    Attributes:
      expert, rate: whose it is, and the share that is removed.
      measured: what a score is, in words.
      beside: other numbers of the same kind, by what they are of.
      result: the answer.
    """

    expert: str
    rate: float
    measured: str
    result: QResult
    beside: Mapping[str, float] = field(default_factory=dict)

    @property
    def q(self) -> float:
        """The answer."""
        return self.result.q

    def in_words(self) -> str:
        """Return the answer as one line of text."""
        beside = "".join(f", {name} {value:.4g}" for name, value in self.beside.items())
        return f"{self.measured} {abs(self.result.score):.4g}{beside}; {len(self.result.visits)} candidates"

    def as_dict(self) -> dict:
        """Return everything as JSON has it."""
        return asdict(self) | {"result": {**asdict(self.result), "visits": [v._asdict() for v in self.result.visits]}}


def search_q(score: Score, density: float, config: QConfig) -> QResult:
    """Search q in [density, 1] for a high score; each q is scored once.

    Raises:
      ValueError: nothing is kept, so that nothing can be rescaled.

    >>> round(search_q(lambda q: -((q - 0.237) ** 2), 0.1, QConfig("auto", rule="darex", walk=(1.0, 0.05))).q, 9)
    0.235
    """
    if density <= 0:
        raise ValueError("--rate=1: nothing is kept, and no q is to be found.")
    visits: dict[float, float] = {}

    def once(q: float) -> float:
        if q not in visits:
            visits[q] = float(score(q))
        return visits[q]

    if density == 1:
        answer = 1.0
        once(answer)
    else:
        answer = Q_SEARCHES[config.rule](once, density, config)
    return QResult(answer, visits[answer], tuple(QVisit(*visit) for visit in visits.items()))


def _parabola(score: Score, density: float, config: QConfig) -> float:
    """Enclose the top of the curve over ln q and jump to the vertex of a parabola: the rule of DPA's factors. Ours.

    1−p itself, DARE's own q, is always looked at. A factor is the number of a point of a grid from 1−p to 1 that is
    even in ln q. Scores that are negative, which stand for errors, count as their reciprocals, so that the parabola is
    fitted to their logarithms in either case.
    """

    def q_of(point: float) -> float:
        return float(density ** ((POINTS - point) / (POINTS - 1)))

    def height(factors: tuple[float, ...]) -> float:
        found = score(q_of(factors[0]))
        return found if found >= 0 else -1.0 / found

    walk = SearchConfig(methods=(2,), start=(FIRST,), step=(1.0,), lower=(1.0,), upper=(float(POINTS),))
    answer = q_of(search(height, 1, walk).factors[0])
    return max((answer, density), key=score)  # DARE's own q: a curve that is flat above it does not lead down to it


def _darex(score: Score, density: float, config: QConfig) -> float:
    """Walk as the authors' code does for encoders, within [1−p, 1]; for decoders it also visits q below 1−p.

    Source: Deng et al. 2024, algorithm 2 and the authors' repository. The steps are those of their one example, in
    proportion to 1−p, unless `--q_walk` gives others.
    """
    high, step = config.walk or (min(WALK[0] * density, 1.0), WALK[1] * density)
    inside = lambda q: score(q) if q <= 1.0 else -float("inf")  # noqa: E731
    return darex_walk(inside, density, high, step, bound=density + FINER * step)


def darex_walk(score: Score, low: float, high: float, step: float, bound: float) -> float:
    """Return the first of the best q of a coarse walk from `low` and of a fine one around its best.

    The coarse walk goes up to `high`; the fine one, a tenth of its step, from 0.9 steps below its best to one step
    above, but not below `bound`. Either ends after four scores in a row that are below its best.
    Source: Deng et al. 2024, the authors' repository: bound is low + step/10 for encoders and 0 for decoders.
    """
    coarse = _walk(score, low, high + step, step)
    around = _best(coarse)
    fine = _walk(score, max(bound, around - 0.9 * step), around + step, FINER * step)
    return _best(coarse + fine)


def _walk(score: Score, start: float, end: float, step: float) -> list[QVisit]:
    """Score start, start + step, … below `end`, added up in floating point as the authors do."""
    visits: list[QVisit] = []
    q, best, misses = start, -float("inf"), 0
    while q < end and misses < MISSES:
        visits.append(QVisit(q, score(q)))
        misses = 0 if visits[-1].score >= best else misses + 1
        best = max(best, visits[-1].score)
        q += step
    return visits


def _best(visits: Sequence[QVisit]) -> float:
    """Return the q of the highest score, the first of equals."""
    return max(visits, key=lambda visit: visit.score).q


Q_SEARCHES: Mapping[str, Callable[[Score, float, QConfig], float]] = {"parabola": _parabola, "darex": _darex}


def searched_by_score(
    candidates: Candidates, name: str, tasks: Sequence[Task], q: QConfig, merge: MergeConfig
) -> QSearched:
    """Search the q of an expert by the domain ratio of the expert, pruned, on labelled validation items.

    Deng et al. 2024 take the score of the task itself (their q_v). All candidates have the same mask.

    Raises:
      ValueError: the unpruned expert solves no item of a task, so that no ratio can be formed.
    """
    alone = alone_of(merge, name)
    options = replace(candidates.evaluation.options, limit=q.limit)
    dense = candidates.dense(name, tasks, q.split, options=options)
    check_solvable(name, dense, q.split)
    merger = candidates.opened.merger(alone)
    wholes = [score.accuracy for score in dense.values()]
    with steps(f"search the q of {name}", None, "candidates") as advance:

        def score(value: float) -> float:
            label, chosen = f"{name} with q {value:.4g}", {name: value}
            scores = candidates.merged(label, merger, tasks, q.split, options, q=chosen)
            advance()
            return domain_ratio([scores[task].accuracy for task in dense], wholes)

        result = search_q(score, 1.0 - merge.rate, q)
    return QSearched(name, merge.rate, f"domain ratio on the {q.split} split", result)


def alone_of(merge: MergeConfig, name: str) -> MergeConfig:
    """Return the merge of one expert with coefficient 1: the pruned expert itself."""
    own = {flag: {one: n for one, n in getattr(merge, flag).items() if one == name} for flag in ("q", "factors")}
    return replace(merge, experts=(name,), coefficients={}, tensor_coefficients=(), **own)
