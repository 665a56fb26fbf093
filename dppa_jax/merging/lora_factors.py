"""--lora_factors: DARE's masks on the factors A and B of adapters, in place of their product."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dppa_jax.architecture.specs import CheckpointError
from dppa_jax.checkpoint.lora import AdaptedHeaders, Keep, Thinned
from dppa_jax.checkpoint.matched import unwrapped
from dppa_jax.config.merge import MergeConfig
from dppa_jax.delta.draws import hashed, row_words
from dppa_jax.delta.scale import SCALES, Numbers
from dppa_jax.delta.score import random_bound
from dppa_jax.merging.gone import Gone
from dppa_jax.merging.kept import warn_of_q


def check_adapters(models: Mapping[str, Any]) -> None:
    """Refuse experts that are no adapters of the base, by their headers.

    Args:
      models: base and experts as they were looked at; the base is called "base".
    """
    for name, model in models.items():
        if name == "base":
            continue
        if not isinstance(model, AdaptedHeaders) or model.base is not models["base"]:
            raise CheckpointError(
                f"--lora_factors: expert {name!r} in {model.directory} is no adapter of --base, and has no factors; "
                f"give --expert={name}=ADAPTER, or leave the flag out to prune whole deltas."
            )
        if whole := model.whole_linears:
            raise CheckpointError(
                f"--lora_factors: {model.adapter.file} has {whole[0]} whole (modules_to_save), and no factors of it; "
                f"leave the flag out to prune whole deltas."
            )


def thinned(experts: Mapping[str, Any], config: MergeConfig) -> dict[str, Any]:
    """Return adapters whose factors are read as they are pruned: delta = scale · (m_B/q * B) · (m_A/q * A).

    The masks are independent, and kept with probability 1 − p. So the mean of the product is ((1−p)/q)² of the whole
    one: q = 1 − p, which is DARE, has no bias here either. Whether Deng et al. 2024 mask factors or products was not to
    be found; this choice is ours. A q below 1 − p is warned of.
    """
    for name in experts if SCALES[config.scale].takes_q else ():
        warn_of_q(name, config.q[name], 1.0 - config.rate, "the factors of its adapter")
    return {name: Thinned(model, _keep(config, name)) for name, model in experts.items()}


def factors_gone(experts: Mapping[str, Any], config: MergeConfig) -> dict[str, dict[str, Gone]]:
    """Count what is gone of the factors of each expert's linears: parameters, and bytes as they are stored."""
    found = {}
    for name, model in experts.items():
        keep, adapted, counts = _keep(config, name), unwrapped(model), np.zeros((2, 2), np.int64)
        for factor, (rows, columns) in adapted.factor_shapes.items():
            gone = rows * columns - np.count_nonzero(keep(factor, 0, rows, columns))
            size = adapted.adapter.itemsize
            counts += [[gone, rows * columns], [gone * size, rows * columns * size]]
        found[name] = dict(zip(("parameters", "bytes"), (Gone(*map(int, each)) for each in counts), strict=True))
    return found


def _keep(config: MergeConfig, expert: str) -> Keep:
    """Return what says by what the elements of a factor are multiplied: 0, or 1/q where a random number keeps them."""
    numbers = Numbers(q=config.q.get(expert, 1.0))
    weight = SCALES[config.scale].weights(np.array([config.rate]), numbers)[0] if config.rate < 1 else 0.0
    bound = random_bound(config.rate)

    def keep(factor: str, start: int, stop: int, columns: int) -> np.ndarray:
        words = row_words(config.seed, expert, factor, start, stop)
        kept = hashed(words, np.arange(columns, dtype=np.uint32)[None]) >= bound
        return np.where(kept, np.float32(weight), np.float32(0))

    return keep
