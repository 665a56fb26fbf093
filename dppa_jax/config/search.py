"""TODO."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import NamedTuple

from dppa_jax.config.evaluation import Split
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.option import choose

Factors = tuple[float, ...]
SEARCH_RULES = ("parabola", "reference")


class Range(NamedTuple):
    """The factors that one partition may take."""

    start: float
    step: float
    lower: float
    upper: float

    @property
    def decimals(self) -> int:
        """Decimal places of the step, to which factors are rounded.

        >>> Range(1.0, 0.25, 0.0, 4.0).decimals
        2
        """
        return max(0, -int(Decimal(repr(self.step)).normalize().as_tuple().exponent))

    @property
    def grid(self) -> tuple[float, ...]:
        """Whole steps from the start within the bounds, in the direction of the step.

        >>> Range(1.0, -0.25, 0.5, 1.3).grid
        (1.25, 1.0, 0.75, 0.5)
        """
        first, last = sorted(((self.lower - self.start) / self.step, (self.upper - self.start) / self.step))
        steps = range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1)
        return tuple(round(self.start + k * self.step, self.decimals) for k in steps)

    def allows(self, factor: float) -> bool:
        """Within the bounds, or 0: the partition is left out."""
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

    rule: str = "parabola"
    methods: tuple[int, ...] = (1, 2)
    start: Factors = (1.0,)
    step: Factors = (0.1,)
    lower: Factors = (0.0,)
    upper: Factors = (4.0,)
    max_evaluations: int = 200
    starts: Mapping[int, Factors] = field(default_factory=dict)

    def __post_init__(self):
        choose("--search_rule", self.rule, SEARCH_RULES)
        for method in (*self.methods, *self.starts):
            choose("--search_methods", str(method), ("1", "2"))
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"--search_methods={self.methods}: give 1, 2 or both, each once.")
        if self.max_evaluations < 1:
            raise ValueError(f"--search_evaluations={self.max_evaluations}: at least one candidate must be scored.")
        self.ranges(max(map(len, (self.start, self.step, self.lower, self.upper))))

    def ranges(self, partitions: int) -> list[Range]:
        """Of every partition, checked."""
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
        """Where the walk of `method` begins."""
        ranges = self.ranges(partitions)
        present = partitions if method == 2 else 1
        default = [one.start if i < present else 0.0 for i, one in enumerate(ranges)]
        factors = tuple(map(float, self.starts.get(method, default)))
        if len(factors) != partitions or not all(one.allows(f) for one, f in zip(ranges, factors, strict=True)):
            raise ValueError(
                f"starts of method {method}: {factors} does not fit {partitions} partitions within bounds."
            )
        return factors


def search_defaults(rates: Sequence[float], score: str = "magnitude", **changes) -> SearchConfig:
    """The configuration for partitions of these rates, highest first, and this score of delta parameters.

    Pruning by magnitude leaves a partition at factor 1, and factors are raised from there. DARE has multiplied what it
    keeps by 1/(1 − rate) already, so the factors are reduced: a partition by itself starts there, which is also its
    upper bound, and steps down by a twentieth of it. Method 2, where all are present, starts from plain DARE at the
    target, 1/(1 − rate) of the last partition for all. `changes` are fields that replace these.

    Raises:
      ValueError: a random score with rate 1, which has no 1/(1 − rate).

    Source: Zhu et al. 2024, section 4.5 ("we modified the approach to dynamic reduction"); the paper gives no step.

    >>> config = search_defaults((0.9, 0.8), "random")
    >>> config.start, config.step, config.upper
    ((10.0, 5.0), (-0.5, -0.25), (10.0, 5.0))
    >>> config.begin(1, 2), config.begin(2, 2)
    ((10.0, 0.0), (5.0, 5.0))
    """
    if score != "random":
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
    """What the flags of a search say; empty tuples stand for what suits the score: see `search_defaults`.

    Attributes:
      split: "validation", or "test" to choose by what is reported, as the paper did.
      limit: items per task; None for all of the split.
      given: factors of experts that are not searched, one for each partition.
    """

    rule: str = "parabola"
    methods: tuple[int, ...] = (1, 2)
    start: Factors = ()
    step: Factors = ()
    lower: Factors = ()
    upper: Factors = ()
    max_evaluations: int = 200
    split: Split = "validation"
    limit: int | None = None
    given: Mapping[str, Factors] = field(default_factory=dict)

    def __post_init__(self):
        choose("--search_split", self.split, ("validation", "test"))
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--search_limit={self.limit}: 1 or more items per task, or 0 for all.")

    def config(self, merge: MergeConfig) -> SearchConfig:
        """With what suits the score where the flags are silent."""
        given = {"start": self.start, "step": self.step, "lower": self.lower, "upper": self.upper}
        return search_defaults(
            merge.partitions,
            merge.score,
            rule=self.rule,
            methods=self.methods,
            max_evaluations=self.max_evaluations,
            **{name: value for name, value in given.items() if value},
        )


ADAMERGING = {"adamerging": "task", "adamerging_layerwise": "layer", "adamerging_linearwise": "linear"}  # --coefficient


POSITIONS = ("all", "last", "generated")


@dataclass(frozen=True)
class AdaMergingConfig:
    """How coefficients are found.

    Attributes:
      granularity: one coefficient per expert ("task"), per expert and decoder layer with one more for what is outside
        the layers ("layer"), or per expert and tensor ("linear").
      steps: of Adam.
      batch_size: prompts of each domain in a step.
      start: of every coefficient.
      positions: whose entropy counts, see `prompts.prompts_of`.
      new_tokens: at most, of the continuations that positions "generated" needs. They are made once, greedily, by the
        merge with the starting coefficients.
      split, limit: of the tasks' items that prompts are taken from; the first `limit` of each task, None for all.
      patience, min_delta: end when the mean entropy of `patience` steps is not lower by `min_delta` nats than that of
        the `patience` steps before them; patience 0 never ends early.
      seed: of the order of the prompts.

    Raises:
      ValueError: names the flag.
    """

    granularity: str = "task"
    steps: int = 500
    batch_size: int = 16
    learning_rate: float = 1e-3
    start: float = 0.3
    positions: str = "all"
    new_tokens: int = 32
    split: Split = "validation"
    limit: int | None = None
    patience: int = 0
    min_delta: float = 1e-3
    seed: int = 0

    def __post_init__(self):
        choose("the granularity", self.granularity, ADAMERGING.values())
        choose("--adamerging_positions", self.positions, POSITIONS)
        choose("--adamerging_split", self.split, ("validation", "test"))
        least = {"steps": 1, "batch_size": 1, "new_tokens": 1, "patience": 0, "seed": 0}
        if self.limit is not None:
            least["limit"] = 1
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"--adamerging_{name}={getattr(self, name)}: it must be {bound} or more.")
        if not 0.0 < self.learning_rate < math.inf:
            raise ValueError(f"--adamerging_learning_rate={self.learning_rate:g}: it must be above 0.")
        if not 0.0 <= self.start <= 1.0:
            raise ValueError(f"--adamerging_start={self.start:g}: outside [0, 1], where coefficients are kept.")
        if not 0.0 <= self.min_delta < math.inf:
            raise ValueError(f"--adamerging_min_delta={self.min_delta:g}: it must be 0 or more.")
