"""What the flags of a search of factors say."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dppa_jax.config.merge import MergeConfig, choose
from dppa_jax.demo.text import Split
from dppa_jax.search.dpa import Factors, SearchConfig, search_defaults


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
