"""How numbers of a merge are searched: DPA's factors, and coefficients by AdaMerging."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import ClassVar, NamedTuple

from dppa_jax.config.evaluation import Split
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.option import check, choose, option, same

Factors = tuple[float, ...]
ITEMS = "--{flag}={value}: 1 or more items per task, or 0 for all."


class Range(NamedTuple):
    """The factors that one partition may take."""

    start: float
    step: float
    lower: float
    upper: float

    @property
    def decimals(self) -> int:
        """The decimal places of the step, to which factors are rounded.

        >>> Range(1.0, 0.25, 0.0, 4.0).decimals
        2
        """
        return max(0, -int(Decimal(repr(self.step)).normalize().as_tuple().exponent))

    @property
    def grid(self) -> tuple[float, ...]:
        """The whole steps from the start within the bounds, in the direction of the step.

        >>> Range(1.0, -0.25, 0.5, 1.3).grid
        (1.25, 1.0, 0.75, 0.5)
        """
        first, last = sorted(((self.lower - self.start) / self.step, (self.upper - self.start) / self.step))
        steps = range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1)
        return tuple(round(self.start + k * self.step, self.decimals) for k in steps)

    def allows(self, factor: float) -> bool:
        """Return whether a factor is within the bounds, or 0: then the partition is left out."""
        return factor == 0 or self.lower <= round(factor, self.decimals) <= self.upper


@dataclass(frozen=True)
class SearchConfig:
    """How factors are searched. A tuple has one number per partition, highest rate first, or one for all of them.

    Attributes:
      rule: a key of RULES.
      methods: the paper's methods that may be used.
      start: the factor with which a partition comes in.
      step: the smallest change of a factor; negative looks below the start first, and "reference" only there.
      lower, upper: the bounds of a factor, both included. A partition that is absent has factor 0 whatever they are.
      max_evaluations: how many candidates may be scored.
      starts: by method, where its walk begins, if not at `start`; 0 for a partition that is absent.

    >>> SearchConfig().begin(1, 3), SearchConfig().begin(2, 3)
    ((1.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    """

    FLAG_PREFIX: ClassVar[str] = "search_"
    HELP_GROUP: ClassVar[str] = "search of factors"

    rule: str = option(
        "parabola", "how factors are walked; reference: as the authors' code does", choices=("parabola", "reference")
    )
    methods: tuple[int, ...] = option(
        (1, 2), "1: partition after partition, 2: all from the start; the better wins", choices=("1", "2")
    )
    start: Factors = option((1.0,), "factors to begin with, one for all or each; default 1; DARE: 1/(1-rate)")
    step: Factors = option((0.1,), "smallest change of a factor; default 0.1; DARE: downwards, a share of the start")
    lower: Factors = option(
        (0.0,), "LOWEST,HIGHEST factor; default 0,4; DARE: from 0 to the start", flag="search_bounds"
    )
    upper: Factors = (4.0,)
    max_evaluations: int = option(
        200,
        "candidates of an expert at most",
        flag="search_evaluations",
        least=1,
        message="--{flag}={value}: at least one candidate must be scored.",
    )
    starts: Mapping[int, Factors] = field(default_factory=dict)

    def __post_init__(self):
        check(self)
        for method in self.starts:
            choose("--search_methods", str(method), ("1", "2"))
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"--search_methods={self.methods}: give 1, 2 or both, each once.")
        self.ranges(max(map(len, (self.start, self.step, self.lower, self.upper))))

    def ranges(self, partitions: int) -> list[Range]:
        """Return the range of each partition, checked."""
        columns = []
        for name in Range._fields:
            numbers = getattr(self, name)
            if len(numbers) not in (1, partitions):
                raise ValueError(
                    f"--search_{name}={numbers}: give one number, or one for each of {partitions} partitions."
                )
            columns.append([float(number) for number in numbers] * (partitions // len(numbers)))
        ranges = [Range(*row) for row in zip(*columns, strict=True)]
        for one in ranges:
            if not all(map(math.isfinite, one)) or one.step == 0:
                raise ValueError(
                    f"--search_step={one.step}: it must not be 0, and start and bounds must be finite: {one}."
                )
            if one.start == 0 or not one.allows(one.start):
                raise ValueError(f"--search_start={one.start}: not 0, and within [{one.lower}, {one.upper}].")
        return ranges

    def begin(self, method: int, partitions: int) -> Factors:
        """Return the factors with which the walk of `method` begins."""
        ranges = self.ranges(partitions)
        present = partitions if method == 2 else 1
        default = [one.start if i < present else 0.0 for i, one in enumerate(ranges)]
        factors = tuple(map(float, self.starts.get(method, default)))
        if len(factors) != partitions or not all(one.allows(f) for one, f in zip(ranges, factors, strict=True)):
            raise ValueError(
                f"starts of method {method}: {factors} does not fit {partitions} partitions within bounds."
            )
        return factors


def search_defaults(rates: Sequence[float], random: bool = False, **changes) -> SearchConfig:
    """Return how to search factors for partitions of these rates, highest first; `random`: of a random score.

    Pruning by magnitude leaves a partition at factor 1, and factors are raised from there. DARE has multiplied what it
    keeps by 1/(1 − rate) already, so the factors are reduced: a partition by itself starts there, which is also its
    upper bound, and steps down by a twentieth of it. Method 2, where all are present, starts from plain DARE at the
    target, 1/(1 − rate) of the last partition for all. `changes` are fields that replace these.

    Raises:
      ValueError: a random score with rate 1, which has no 1/(1 − rate).

    Source: Zhu et al. 2024, section 4.5 ("we modified the approach to dynamic reduction"); the paper gives no step.

    >>> config = search_defaults((0.9, 0.8), random=True)
    >>> config.start, config.step, config.upper
    ((10.0, 5.0), (-0.5, -0.25), (10.0, 5.0))
    >>> config.begin(1, 2), config.begin(2, 2)
    ((10.0, 0.0), (5.0, 5.0))
    """
    if not random:
        return SearchConfig(**changes)
    if max(rates) >= 1:
        raise ValueError(
            f"--partitions={tuple(rates)}: with random scores a rate must be below 1, as 1/(1-rate) is used."
        )
    step = tuple(-round(0.05 / (1 - rate), 2) for rate in rates)
    start = tuple(
        round(1 / (1 - rate), Range(1.0, by, 0.0, 1.0).decimals) for rate, by in zip(rates, step, strict=True)
    )
    starts = {} if "start" in changes else {2: (start[-1],) * len(start)}
    return SearchConfig(**({"start": start, "step": step, "upper": start, "starts": starts} | changes))


@dataclass(frozen=True)
class FactorSearch:
    """What the flags say about a search; empty tuples stand for what suits the score: see `search_defaults`.

    Attributes:
      rule, methods, start, step, lower, upper, max_evaluations: as in `SearchConfig`.
      split: "validation", or "test" to choose by what is reported, as the paper did.
      limit: items per task; None for all of the split.
      given: factors of experts that are not searched, one for each partition.
    """

    FLAG_PREFIX: ClassVar[str] = SearchConfig.FLAG_PREFIX
    HELP_GROUP: ClassVar[str] = SearchConfig.HELP_GROUP

    rule: str = same(SearchConfig, "rule")
    methods: tuple[int, ...] = same(SearchConfig, "methods")
    start: Factors = same(SearchConfig, "start", default=())
    step: Factors = same(SearchConfig, "step", default=())
    lower: Factors = same(SearchConfig, "lower", default=())
    upper: Factors = ()
    max_evaluations: int = same(SearchConfig, "max_evaluations")
    split: Split = option(
        "validation",
        "items that factors are chosen by; test: those that are reported, as the paper did",
        choices=("validation", "test"),
    )
    limit: int | None = option(
        None,
        "items per task; 0: all of the split",
        least=1,
        message=ITEMS,
    )
    given: Mapping[str, Factors] = field(default_factory=dict)

    def __post_init__(self):
        check(self)

    def config(self, merge: MergeConfig) -> SearchConfig:
        """Return the search of a merge, with what suits its score where the flags are silent."""
        given = {"start": self.start, "step": self.step, "lower": self.lower, "upper": self.upper}
        return search_defaults(
            merge.partitions,
            merge.has_random_score,
            rule=self.rule,
            methods=self.methods,
            max_evaluations=self.max_evaluations,
            **{name: value for name, value in given.items() if value},
        )


ADAMERGING = {"adamerging": "task", "adamerging_layerwise": "layer", "adamerging_linearwise": "linear"}
"""The granularity of coefficients, by the value of --coefficient that asks for it."""


@dataclass(frozen=True)
class AdaMergingConfig:
    """How AdaMerging finds coefficients.

    Attributes:
      granularity: one coefficient per expert ("task"), per expert and decoder layer with one more for what is outside
        the layers ("layer"), or per expert and tensor ("linear").
      steps: updates by Adam.
      batch_size: prompts of each domain in a step.
      start: where every coefficient begins.
      positions: the positions whose entropy counts, see `prompts.prompts_of`.
      new_tokens: the longest continuation that positions "generated" needs. Continuations are made once, greedily, by
        the merge with the starting coefficients.
      split, limit: the tasks' items that prompts are taken from; the first `limit` of each task, None for all.
      patience, min_delta: end when the mean entropy of `patience` steps is not lower by `min_delta` nats than that of
        the `patience` steps before them; patience 0 never ends early.
      seed: decides the order of the prompts.

    Raises:
      ValueError: a value is not allowed; the message names the flag.
    """

    FLAG_PREFIX: ClassVar[str] = "adamerging_"
    HELP_GROUP: ClassVar[str] = "AdaMerging"

    granularity: str = "task"
    steps: int = option(500, "steps of Adam", least=1)
    batch_size: int = option(16, "prompts of each domain in a step", least=1)
    learning_rate: float = option(1e-3, "learning rate of Adam", above=0)
    start: float = option(
        0.3,
        "where every coefficient begins",
        within=(0, 1),
        message="--{flag}={value}: outside [0, 1], where coefficients are kept.",
    )
    positions: str = option("all", "positions of a prompt whose entropy counts", choices=("all", "last", "generated"))
    new_tokens: int = option(32, "tokens of a continuation at most, for positions generated", least=1)
    split: Split = option(
        "validation",
        "items that prompts come from; test: those that are reported, as the paper did",
        choices=("validation", "test"),
    )
    limit: int | None = option(None, "prompts per task; 0: all of the split", least=1)
    patience: int = option(0, "end when as many steps bring no lower entropy; 0: never", least=0)
    min_delta: float = option(1e-3, "nats that count as lower", least=0)
    seed: int = same(MergeConfig, "seed")

    def __post_init__(self):
        choose("the granularity", self.granularity, ADAMERGING.values())
        check(self)
        if self.seed < 0:
            raise ValueError(f"--adamerging_seed={self.seed}: it must be 0 or more.")
