"""What the flags of AdaMerging say."""

import math
from dataclasses import dataclass

from dppa_jax.config.merge import choose
from dppa_jax.demo.text import Split

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
