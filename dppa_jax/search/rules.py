"""Search the amplification factors of an expert's partitions (DPA) for the highest score.

A candidate is a tuple of factors, one per partition, highest rate first. Its score is the domain ratio of the expert
with these factors. Scoring is what costs time, so a rule should ask for few candidates.

The paper changes one partition's factor after the other, from the highest rate down, in two ways. Method 1 begins with
the first partition alone: the others have factor 0 until their turn. Method 2 begins with all partitions present. The
better result is taken. Two rules walk these methods: "parabola", the default, described at `_parabola`, and
"reference", the authors' own, described at `_reference`.

    result = search(score, partitions=2, config=search_defaults((0.9, 0.8)))
    result.factors, result.score, result.evaluations

`python -m dppa_jax.search.simulate` compares the rules on random score functions.
Source: Zhu et al. 2024, section 3.3.2; the authors' `python_contral`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dppa_jax.config.search import Factors, SearchConfig

STRIDES = (8, 3)  # steps of the first move along a line, by round; 8 show a slope above the noise of some 100 items
FLOOR = 0.05  # share of a line's highest score; lower scores count as this, because 0 has no logarithm
CLEAR = 0.03  # error in log score that a fit may have near the top; with a larger one, differences count as noise
NEAR = 0.8  # share of a line's highest score; scores above it are near the top, below it a bump need not be a bell


class Visit(NamedTuple):
    """A candidate that a rule looked at.

    Attributes:
      method: the paper's method, 1 or 2, whose walk it belongs to.
      partition: the partition whose factor was being changed, 0 for the highest rate.
      factors: the factors that were scored.
      score: their score, measured now or remembered.
      raw: the factors before rounding; they differ from `factors` where rule "reference" adds up its steps.
    """

    method: int
    partition: int
    factors: Factors
    score: float
    raw: Factors


@dataclass(frozen=True)
class SearchResult:
    """The answer of a search, and how it was found.

    Attributes:
      factors, score, method: the answer, its score, and the method that found it.
      visits: all candidates that the rule looked at, in order; one that came up again is listed again.
      evaluations: the number of distinct candidates that were scored.
      finals: for each method the factors where its walk ended, not rounded; with rule "reference" they are the alpha
        that the authors' code returns. Empty if max_evaluations ended the search.
    """

    factors: Factors
    score: float
    method: int
    visits: tuple[Visit, ...]
    evaluations: int
    finals: Mapping[int, Factors]

    @property
    def best(self) -> Visit:
        """The visit with the highest score, the first of equals. The answer may be another one: see the rules."""
        return max(self.visits, key=lambda visit: visit.score)


def search(
    score: Callable[[Factors], float],
    partitions: int,
    config: SearchConfig,
    report: Callable[[Visit], None] = lambda visit: None,
) -> SearchResult:
    """Search the factors of `partitions` partitions for a high `score`.

    A candidate is rounded to the decimals of its steps and scored once, however often it is asked for. `report` is
    called as soon as a candidate is scored. Equal scores give an equal search, so a search that was killed resumes if
    `score` remembers what it has measured.

    Returns:
      The factors where the better method's walk ended. If max_evaluations ended the search, those of the best visit.

    Raises:
      ValueError: a score is not a finite number.

    >>> search(lambda f: 1 - (f[0] - 1.9) ** 2 / 9 - (f[1] - 0.7) ** 2 / 9, 2, SearchConfig()).factors
    (1.9, 0.7)
    """
    if partitions < 1:
        raise ValueError(f"{partitions} partitions: at least one is needed to have a factor to search.")
    trials = _Trials(score, config, partitions, report)
    try:
        finals = RULES[config.rule](trials)
    except _BudgetSpent:
        finals = {}
    ends = {method: trials.rounded(raw) for method, raw in finals.items()}
    scored_ends = [(method, factors) for method, factors in ends.items() if factors in trials.scored]
    if not scored_ends:
        best = max(trials.visits, key=lambda visit: visit.score)
        scored_ends = [(best.method, best.factors)]
    method, factors = max(scored_ends, key=lambda end: trials.scored[end[1]])
    return SearchResult(factors, trials.scored[factors], method, tuple(trials.visits), len(trials.scored), finals)


def _reference(trials: "_Trials") -> dict[int, Factors]:
    """Walk by the authors' rule: each method raises one partition's factor after the other, while the score rises.

    A step is kept if its score exceeds the best one so far, which is carried from partition to partition. The first
    step that fails is taken back, unless that would go below the start. A later partition enters at the start if it was
    absent; otherwise it moves one step first, because the score where it stands is known. Steps are summed in floating
    point (0.1 + 0.1 + 0.1) and rounded before they are scored.

    The authors return the factors where this ends. They are not always the best that were seen: a later partition that
    comes in stays at its start even if every score with it is lower than without it. `SearchResult.finals` has the
    factors that they return, unrounded; `SearchResult.best` is the best visit.

    Differs from the authors' code where that says nothing: any number of partitions, bounds (outside them no score is
    an improvement), negative steps, and the choice between the methods.
    """
    return {method: _stepwise(trials, method) for method in trials.config.methods}


def _stepwise(trials: "_Trials", method: int) -> Factors:
    alpha, best = list(trials.begin(method)), 0.0
    for i, (start, step, _, _) in enumerate(trials.ranges):
        if i > 0:
            alpha[i] = start if abs(alpha[i]) < abs(step) else alpha[i] + step
        while (score := trials(method, i, tuple(alpha))) > best:
            best = score
            alpha[i] += step
        if (alpha[i] - start) * step > 0:
            alpha[i] -= step
    return tuple(alpha)


def _parabola(trials: "_Trials") -> dict[int, Factors]:
    """Walk by the default rule: enclose the top of each partition's curve, then jump to the vertex of a parabola.

    Method 2 is walked first, one partition after the other, from the highest rate down. For each partition:

    1. Its factor moves in growing strides until the best score has a lower one on either side.
    2. A parabola is fitted to the logarithms of all scores on this line, and its vertex is the next candidate.
    3. The parabola is fitted again. The partition gets the scored factor that the fit puts highest. That need not be
       the one with the highest score, which may be luck. Among equal highest scores it is the one nearest to the start.

    If every fit passes close to the scores near its top, differences are clear of noise. Then a second round with
    shorter strides settles how the partitions act on each other.

    Method 1 follows only if it can win: the differences are clear of noise, and the first partition alone, with the
    factor that Method 2 gave it, scores higher than Method 2's answer. If an answer scores below the start of its walk,
    the best visit replaces it.
    """
    finals: dict[int, Factors] = {}
    clear = True
    for method in sorted(trials.config.methods, reverse=True):
        begin = trials.rounded(trials.begin(method))
        if finals:
            begin = (finals[2][0], *begin[1:])
            if not clear or trials(method, 0, begin) <= trials.scored[finals[2]]:
                break
        finals[method], clear = _walk(trials, method, begin)
    return finals


def _walk(trials: "_Trials", method: int, begin: Factors) -> tuple[Factors, bool]:
    """Return the factors where a method's walk ends, and whether all fits passed close to the scores."""
    low, at = trials(method, 0, begin), list(begin)
    for stride in STRIDES:
        before, clear = list(at), True
        for i, (start, *_) in enumerate(trials.ranges):
            absent = stride == STRIDES[0] and at[i] == 0
            at[i], agree = _climb(trials, method, at, i, start if absent else at[i], stride)
            clear = clear and agree
        if at == before or not clear:
            break
    factors = tuple(at)
    if trials.scored[factors] < low:
        factors = max(trials.scored, key=trials.scored.__getitem__)
    return factors, clear


def _climb(trials: "_Trials", method: int, at: list[float], i: int, start: float, stride: int) -> tuple[float, bool]:
    """Return the best factor of partition i while the others stay, and whether the fit is close to the scores."""
    grid = trials.ranges[i].grid
    candidates = [(*at[:i], factor, *at[i + 1 :]) for factor in grid]
    scores = {p: trials.scored[c] for p, c in enumerate(candidates) if c in trials.scored}
    here = min(range(len(grid)), key=lambda p: abs(grid[p] - start))
    scores[here] = trials(method, i, candidates[here])
    while True:  # until the top is enclosed, or at a bound
        top = _highest(scores)
        if top == max(scores) and top < len(grid) - 1:
            new = min(top + stride, len(grid) - 1)
        elif top == min(scores) and top > 0:
            new = max(top - stride, 0)
        else:
            break
        scores[new] = trials(method, i, candidates[new])
        if scores[new] > scores[top]:
            stride *= 2
    if len(scores) == 2:  # the top is at a bound
        between = sum(scores) // 2
        scores[between] = trials(method, i, candidates[between])
    fitted = _fit(scores, range(min(scores), max(scores) + 1))
    vertex = max(fitted, key=fitted.__getitem__)
    if vertex not in scores:
        scores[vertex] = trials(method, i, candidates[vertex])
    top = _highest(scores)
    fitted = _fit(scores, scores)
    answer = max(fitted, key=fitted.__getitem__)
    near = [p for p in fitted if scores[p] > NEAR * scores[top]]
    agree = all(abs(math.log(scores[p] / scores[top]) - fitted[p]) <= CLEAR for p in near)
    if scores[answer] == scores[top]:  # of a level top take the edge nearest to the start
        answer = min((p for p in scores if scores[p] == scores[top]), key=lambda p: abs(p - here))
    return grid[answer], agree


def _highest(scores: Mapping[int, float]) -> int:
    """Return the position with the highest score, the last of equals, so that a level stretch does not end a climb."""
    return max(scores, key=lambda p: (scores[p], p))


def _fit(scores: Mapping[int, float], positions: Iterable[int]) -> dict[int, float]:
    """Fit a parabola to the logarithms of the scores and return its values at `positions`.

    If the parabola does not bend down, return the highest position alone. The fit is by least squares. It is made in
    logarithms because scores fall off from their top like a bell. It is weighted by the scores because the logarithm of
    a share of correct answers is less certain the lower the share is.
    """
    top = _highest(scores)
    if len(scores) < 3 or scores[top] <= 0:
        return {top: 0.0}
    heights = np.maximum(np.array(list(scores.values())) / scores[top], FLOOR)
    curve = np.polyfit(list(scores), np.log(heights), 2, w=heights)
    return {p: float(np.polyval(curve, p)) for p in positions} if curve[0] < 0 else {top: 0.0}


class _BudgetSpent(Exception):
    """max_evaluations candidates are scored, and the rule asks for another one."""


class _Trials:
    """Score the candidates that a rule asks for: round them, keep them within bounds, score each once, count them."""

    def __init__(self, score: Callable, config: SearchConfig, partitions: int, report: Callable):
        self.config = config
        self.ranges = config.ranges(partitions)
        self.scored: dict[Factors, float] = {}
        self.visits: list[Visit] = []
        self._score, self._report = score, report

    def __call__(self, method: int, partition: int, raw: Factors) -> float:
        """Return the score of a candidate; minus infinity outside the bounds, where nothing is scored."""
        factors = self.rounded(raw)
        if not all(bounds.allows(factor) for bounds, factor in zip(self.ranges, factors, strict=True)):
            return -math.inf
        new = factors not in self.scored
        if new:
            if len(self.scored) == self.config.max_evaluations:
                raise _BudgetSpent
            self.scored[factors] = self._measure(factors)
        self.visits.append(Visit(method, partition, factors, self.scored[factors], raw))
        if new:
            self._report(self.visits[-1])
        return self.scored[factors]

    def begin(self, method: int) -> Factors:
        return self.config.begin(method, len(self.ranges))

    def rounded(self, raw: Factors) -> Factors:
        return tuple(round(factor, bounds.decimals) for factor, bounds in zip(raw, self.ranges, strict=True))

    def _measure(self, factors: Factors) -> float:
        value = float(self._score(factors))
        if not math.isfinite(value):
            raise ValueError(
                f"factors {factors}: the score is {value}, not a number to compare. A domain ratio is undefined when "
                f"the unpruned expert solves no item of a task: search on more items, or without that task."
            )
        return value


RULES: dict[str, Callable[[_Trials], dict[int, Factors]]] = {"parabola": _parabola, "reference": _reference}
