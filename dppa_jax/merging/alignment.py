"""How deltas meet the inputs of their linears on calibration text: the noise of DARE as it is, not as norms say."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dppa_jax.checkpoint import Checkpoint
from dppa_jax.merging.activations import layers_seen
from dppa_jax.model.decoder import project


class Alignment(NamedTuple):
    """Sums over calibration tokens and outputs of a linear, or over linears.

    Attributes:
      change: Σ S², S being what the delta adds to an output.
      separate: Σ Q, Q being the sum of squares of what it adds element by element.
      output: Σ |y|², y being the expert's outputs.
    """

    change: float
    separate: float
    output: float

    @property
    def ratio(self) -> float:
        """Q/S²: 1 where the elements of a delta act as if by chance, less where they add up; 0 where nothing does."""
        return self.separate / self.change if self.change else 0.0

    def noise(self, rate: float) -> float:
        """N_x = sqrt(p/(1−p) · ΣQ / Σ|y|²): DARE's noise beside the outputs. Ours, after Deng et al. 2024.

        >>> round(Alignment(1.0, 0.25, 100.0).noise(0.8), 12)
        0.1
        """
        share = self.separate / self.output if self.output else 0.0
        return math.sqrt(rate / (1.0 - rate) * share) if rate < 1 else math.inf


def alignments(
    base: Checkpoint, expert: Checkpoint, tokens: Int[np.ndarray, "rows tokens"], delta: Callable[..., Array]
) -> dict[str, Alignment]:
    """Compute the sums of every linear of an expert, by the linears' names, a decoder layer at a time.

    Args:
      base, expert: open checkpoints.
      tokens: what the expert reads.
      delta: from (base's weights, expert's weights) to the delta.
    """

    def stacked(name: str, weights: np.ndarray) -> Array:
        tuned = jnp.asarray(weights)
        return jnp.concatenate([delta(jnp.asarray(base.read(name)), tuned), tuned.astype(jnp.float32)])

    return {
        name: Alignment(*map(float, sums))
        for seen in layers_seen(expert, tokens, _sums, stacked)
        for name, sums in seen.measured.items()
    }


def total(found: dict[str, Alignment]) -> Alignment:
    """Add up the sums of all linears."""
    return Alignment(*map(math.fsum, zip(*found.values(), strict=True)))


def _sums(
    inputs: Float[Array, "B T columns"],
    counted: Float[Array, "B T"] | None,
    stacked: Float[Array, "two_rows columns"],
) -> Float[Array, " three"]:
    """Return the sums of one linear, of which `stacked` has the delta's rows and then the expert's."""
    counts = jnp.ones(inputs.shape[:2], jnp.float32) if counted is None else counted
    rows = stacked.shape[0] // 2
    outputs = jnp.square(project(inputs, stacked))
    squares = jnp.einsum("bt,btj->j", counts, jnp.square(inputs))
    change, output = ((counts[..., None] * part).sum() for part in jnp.split(outputs, 2, axis=-1))
    return jnp.stack([change, (squares * jnp.square(stacked[:rows]).sum(axis=0)).sum(), output])
