"""What the options of a merge are where they are not given: as `--compatible` has them, or as here."""

from typing import Any

from dppa_jax.config.option import choose
from dppa_jax.delta.compatible import COMPATIBLE, Conventions
from dppa_jax.delta.presets import METHODS

OURS = {"arithmetic": "float32", "prune": "linears"}
PROGRAMS = ("none", *COMPATIBLE)  # of --compatible; none has ours, beside a recipe, too


def conventions_of(config: Any) -> Conventions | None:
    """Return the conventions of the program that `--compatible` names; None for our own.

    Raises:
      ValueError: the program has no such method.
    """
    if config.compatible in (None, "none"):
        return None
    conventions = COMPATIBLE[config.compatible]
    choose(f"--compatible={config.compatible}, whose methods are others: --method", config.method, conventions.divide)
    return conventions


def by_convention(config: Any, own_divide: str) -> dict[str, Any]:
    """Return the values of scale, divide, ties, arithmetic and prune that are not given; for ours, no program's name.

    Args:
      own_divide: what the sum of the combination is divided by, if nothing else is said.
    """
    theirs = conventions_of(config)
    found = {"divide": own_divide, **OURS}
    if theirs:
        scale = METHODS[config.method].scale
        found |= {"divide": theirs.divide[config.method], "scale": theirs.scales.get(scale, scale)}
        found |= {"arithmetic": theirs.arithmetic, "prune": theirs.prune}
    found = {name: getattr(config, name) or value for name, value in found.items()}
    found["compatible"] = config.compatible if theirs else None
    ranks_by_count = config.ties == "auto" and config.compare == "linear"
    return found | ({"ties": theirs.ties} if theirs and ranks_by_count else {})
