"""What advice looks at: the rates, how the change of outputs is measured, and what else there is."""

from dataclasses import dataclass
from typing import ClassVar

from dppa_jax.config.merge import A_RATE
from dppa_jax.config.option import check, option
from dppa_jax.config.q import QConfig

AUTO = "auto"  # of --method: what advice chooses
UNDECIDED = "magnitude"  # stands in a config until then
# flags that go with a method
DECIDED = (
    *("score", "allocate", "scale", "combine", "compare", "prune"),
    *("q", "factors", "partitions", "lora_factors"),
)


@dataclass(frozen=True)
class AdviseConfig:
    """How a method is chosen.

    Attributes:
      q: how outputs are compared, and how q is walked; on what items the two best are scored.
      can_retrain: whether the experts can be fine-tuned again.
      rates: the shares that are removed, for each of which a method is chosen.
    """

    HELP_GROUP: ClassVar[str] = "report, validate and benchmark"

    q: QConfig
    can_retrain: bool = False
    rates: tuple[float, ...] = option(
        (),
        "report, advise: rates to look at, default --rate; 0.1:0.9:0.1 is a range",
        kind="ranges",
        **A_RATE,
        complement="densities",
    )

    def __post_init__(self):
        check(self)
