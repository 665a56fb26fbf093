"""Choose a method for an expert and a rate: by the table of `delta.advice` and, where there is text, by measurement.

adviser = Adviser(opened, "math", merge, config, inspection)
decision = adviser.decide(0.9)
decision.chosen.preset, decision.why
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from dppa_jax.checkpoint.matched import opened_model
from dppa_jax.config.advise import AdviseConfig
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.numbers import listed
from dppa_jax.config.q import LABELLED, UNLABELLED
from dppa_jax.config.search import Factors
from dppa_jax.delta.advice import CANDIDATES, Advice, advise, noise_of
from dppa_jax.delta.presets import METHODS
from dppa_jax.delta.scale import SCALES
from dppa_jax.evaluate.scores import Score
from dppa_jax.evaluate.tasks import Task
from dppa_jax.merging.activations import probe, tokens_of
from dppa_jax.merging.alignment import Alignment, alignments, total
from dppa_jax.merging.inspection import Inspection
from dppa_jax.merging.merger import kernels_of
from dppa_jax.merging.opened import Opened
from dppa_jax.search.candidates import Candidates
from dppa_jax.search.output_change import PrunedChange, factors_by_change, searched_by_change
from dppa_jax.search.q import alone_of, searched_by_score


@dataclass
class Tried:
    """A method for an expert at a rate, with the number that suits it.

    Attributes:
      preset: a preset and, after "+", the way in which its number was found; as `--job=report` calls it.
      q, factors: what was found; None and empty where the method has none.
      change: the mean change of the expert's outputs on text; None where there is no text.
      visits: how many candidates were merged for it.
      seconds: what it took.
      score: right answers to validation items of all tasks of the expert; None where none were asked.
    """

    preset: str
    q: float | None = None
    factors: Factors = ()
    change: float | None = None
    visits: int = 0
    seconds: float = 0.0
    score: Score | None = None

    @property
    def method(self) -> str:
        """The preset alone, a value of `--method`."""
        return self.preset.partition("+")[0]

    @property
    def numbers(self) -> dict[str, float | Factors]:
        """The numbers by the name of their flag."""
        given = {"q": self.q, "factors": self.factors}
        return {flag: number for flag, number in given.items() if number not in (None, ())}

    def in_words(self) -> str:
        """Return the method and its number as one line of text."""
        said = [f"q {self.q:.4g}"] if self.q is not None else []
        said += [f"factors {listed(self.factors)}"] if self.factors else []
        return " with ".join([self.method, *said])

    def as_dict(self) -> dict:
        """Return everything as JSON has it."""
        score = None if self.score is None else {**self.score._asdict(), "interval": self.score.interval}
        return asdict(self) | {"score": score}


@dataclass
class Decision:
    """What was chosen for an expert at a rate, and why.

    Attributes:
      expert, rate: what it is for.
      advice: what the table says.
      noise: N by norms; `advice` has that of the text where there is text.
      base: the change of outputs if nothing at all is kept; None where nothing was measured.
      tried: what was measured, the smallest change first.
      chosen: the choice.
      why: the reason.
    """

    expert: str
    rate: float
    advice: Advice
    noise: float
    chosen: Tried
    why: str
    base: float | None = None
    tried: list[Tried] = field(default_factory=list)

    def as_dict(self) -> dict:
        """Return everything as JSON has it; None stands for an infinite noise."""
        finite = lambda number: number if number < float("inf") else None  # noqa: E731
        said = self.advice
        return {
            "method": self.chosen.preset,
            "why": self.why,
            "noise": finite(self.noise),
            "chosen": self.chosen.as_dict(),
            "table": said._asdict() | {"noise": finite(said.noise)},
            "change_of_base": self.base,
            "tried": [one.as_dict() for one in self.tried],
        }


class Adviser:
    """Chooses for one expert; what was measured is kept, so that rates and experts of a merge share it.

    Args:
      opened: the models; their job says where the text is.
      name: the expert.
      merge: what stays the same whatever is chosen: seed, ties, dtypes, rates of single tensors.
      config: how to choose.
      inspection: of the expert's delta.
      candidates, tasks: what is needed to measure right answers; None and empty where there are no labels.
    """

    def __init__(
        self,
        opened: Opened,
        name: str,
        merge: MergeConfig,
        config: AdviseConfig,
        inspection: Inspection,
        candidates: Candidates | None = None,
        tasks: Sequence[Task] = (),
    ):
        self.opened, self.expert = opened.reading(name), name
        self.merge, self.config = alone_of(merge, name), config
        self.inspection, self.candidates, self.tasks = inspection, candidates, tasks
        self.has_text = bool(opened.job.calibration)
        self._tried: dict[tuple[float, str], Tried] = {}

    @cached_property
    def alignment(self) -> dict[str, Alignment]:
        """How the delta of every linear meets its inputs on the text."""
        expert = opened_model(self.opened.experts[self.expert])
        tokens = probe(tokens_of(self.opened.job, expert, "advice by text"))
        delta = kernels_of(self.opened.mesh, self.merge)[1].elementwise.delta
        return alignments(opened_model(self.opened.base), expert, tokens, delta)

    @cached_property
    def change(self) -> PrunedChange:
        """How pruning changes the expert's outputs on the text."""
        return PrunedChange(self.opened, self.expert, self.config.q, self.merge)

    def decide(self, rate: float) -> Decision:
        """Choose a method at a rate.

        The table alone decides where its row is final, and where there is no text. Else the candidates are measured,
        and the smallest change of outputs wins. With labels the two best are asked validation items, and the second is
        taken if its interval lies above that of the first.
        """
        norm, text = self.inspection.relative_norm, self.has_text
        noise = total(self.alignment).noise(rate) if text else None
        said = advise(rate, norm, text, bool(self.tasks), self.config.can_retrain, noise)
        if said.final or not text:
            chosen = Tried(said.preset) if said.final else self.tried(said.preset, rate)
            return Decision(self.expert, rate, said, noise_of(rate, norm), chosen, said.why)
        tried = sorted((self.tried(preset, rate) for preset in CANDIDATES), key=lambda one: one.change)
        first, second = tried[:2]
        chosen, why = first, f"the smallest change of outputs; {second.preset} has {second.change / first.change:.2f}×"
        if self.tasks:
            chosen, why = self._by_items(first, second, rate, why)
        if self.change.base <= first.change:
            why += "; the base itself changes them less, so that nothing that is kept helps at this rate"
        return Decision(self.expert, rate, said, noise_of(rate, norm), chosen, why, self.change.base, tried)

    def can_try(self, preset: str) -> bool:
        """Return whether what finds the method's number is there: text or labels."""
        way = preset.partition("+")[2]
        return {UNLABELLED: self.has_text, LABELLED: bool(self.tasks)}.get(way, True)

    def tried(self, preset: str, rate: float) -> Tried:
        """Return a method with its number, measured once."""
        if (rate, preset) not in self._tried:
            started = time.perf_counter()
            found = self._measured(preset, rate)
            found.seconds = time.perf_counter() - started
            self._tried[rate, preset] = found
        return self._tried[rate, preset]

    def _measured(self, preset: str, rate: float) -> Tried:
        method, _, way = preset.partition("+")
        merge, q = merge_by(self.merge, method, rate), self.config.q
        if way == LABELLED:
            found = searched_by_score(self.candidates, self.expert, self.tasks, q, merge).result
            return Tried(preset, q=found.q, visits=len(found.visits))
        if way == UNLABELLED and merge.takes_factors:
            result = factors_by_change(self.change, merge)
            return Tried(preset, None, result.factors, 1.0 / result.score, result.evaluations)
        if way == UNLABELLED:
            found = searched_by_change(self.change, q, merge).result
            return Tried(preset, found.q, (), -found.score, len(found.visits))
        return Tried(preset, change=self.change.by(merge)(), visits=1) if self.has_text else Tried(preset)

    def _by_items(self, first: Tried, second: Tried, rate: float, why: str) -> tuple[Tried, str]:
        """Ask the two best validation items; return the choice and its reason."""
        for one in (first, second):
            one.score = self._score(one, rate)
        said = "; ".join(f"{one.preset} {one.score.correct} of {one.score.total}" for one in (first, second))
        if second.score.interval[0] > first.score.interval[1]:
            return second, f"more right answers ({said}), the intervals apart"
        if first.score.interval[0] > second.score.interval[1]:
            return first, f"{why}, and more right answers ({said}), the intervals apart"
        return first, f"{why}; right answers decide nothing ({said}: the intervals overlap)"

    def _score(self, one: Tried, rate: float) -> Score:
        merge = merge_by(self.merge, one.method, rate, {flag: {self.expert: n} for flag, n in one.numbers.items()})
        options = replace(self.candidates.evaluation.options, limit=self.config.q.limit)
        merger, label = self.opened.merger(merge), f"{self.expert} by {one.in_words()}"
        scores = self.candidates.merged(label, merger, self.tasks, self.config.q.split, options).values()
        return Score(sum(score.correct for score in scores), sum(score.total for score in scores))


def merge_by(given: MergeConfig, method: str, rate: float, fields: Mapping[str, Any] | None = None) -> MergeConfig:
    """Return a merge by another method at a rate: its own axes and numbers; q that is not given is DARE's.

    Args:
      fields: of the config, where they are not those of `given` or the method's own, such as "q" and "factors".
    """
    preset, fields = METHODS[method], fields or {}
    experts = fields.get("experts", given.experts)
    own = dict.fromkeys(("score", "allocate", "scale", "combine")) | {
        "method": method,
        "rate": rate,
        "partitions": (),
        "factors": {},
        "q": dict.fromkeys(experts, (1.0 - rate) or 1.0) if SCALES[preset.scale].takes_q else {},
        "tensor_rates": given.tensor_rates if preset.score else (),
        "method_options": {},
        "tensor_options": {},
    }
    return replace(given, **own | dict(fields))


def shared(decisions: Sequence[Decision], advisers: Mapping[str, Adviser]) -> tuple[str, str]:
    """Return the one method of a merge whose experts share it, and why.

    Where decisions differ and were measured, it is the one with the smallest sum over experts of the change of outputs
    as a share of the base's change. Where nothing was measured, it is the decision for the largest noise, as an expert
    with little noise bears any method.
    """
    rate, presets = decisions[0].rate, {one.chosen.preset for one in decisions}
    if len(presets) == 1:
        return presets.pop(), "every expert's choice" if len(decisions) > 1 else decisions[0].why
    if measured := [one for one in decisions if one.base is not None]:
        sums = {
            preset: sum(advisers[one.expert].tried(preset, rate).change / one.base for one in measured)
            for preset in CANDIDATES
        }
        best = min(sums, key=sums.__getitem__)
        return best, f"experts differ; the smallest sum of changes, each as a share of its base's ({sums[best]:.3g})"
    noisiest = sorted(decisions, key=lambda one: -one.advice.noise)
    can_all = lambda one: all(adviser.can_try(one.chosen.preset) for adviser in advisers.values())  # noqa: E731
    one = next(filter(can_all, noisiest))  # there is one: an expert without text and labels has a choice without them
    return one.chosen.preset, f"experts differ; the choice of {one.expert}, whose noise counts most"
