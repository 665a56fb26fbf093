"""What the linears of several experts read on calibration text: the mean products of their inputs, layer by layer."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int

from dppa_jax.checkpoint import Checkpoint
from dppa_jax.config.run import JobConfig
from dppa_jax.merging.activations import PADDING, LayerSeen, layers_seen, tokens_of, tokens_that_fit
from dppa_jax.model.config import model_config


class LayerwiseGrams:
    """Gives G = XᵀX/n of every linear of a model, X its inputs on a text of n tokens.

    A layer is computed when one of its linears is first asked for, after those before it. Every G is given out once and
    not kept, so that a merge, which goes through the layers in their order, holds those of a layer. Asked again, as
    another merge does, the model reads the text again.

    Of an expert of a mixture, X has the tokens that the router sends to it, and n are all.

    Args:
      name: the model's, for messages.
      model: an open checkpoint.
      tokens: rows of equal length; PADDING is not looked at.

    Raises:
      ValueError: the model is not one that is computed here.
    """

    def __init__(self, name: str, model: Checkpoint, tokens: Int[np.ndarray, "rows tokens"]):
        read = tokens_that_fit(model_config(model.config), tokens)
        self._name, self._model, self._tokens = name, model, tokens
        self._count = int((read != PADDING).sum())
        self._layers: Iterator[LayerSeen] = iter(())
        self._next: int | None = None  # the layer that comes next; None before the first
        self._held: dict[str, np.ndarray] = {}

    def __call__(self, tensor: str) -> Float[np.ndarray, "columns columns"]:
        """Return G of a linear.

        Raises:
          ValueError: its inputs are NaN or Inf.
        """
        if tensor not in self._held:
            self._compute(self._model.specs[tensor].layer)
        found = self._held.pop(tensor)
        if not np.isfinite(found).all():
            raise ValueError(
                f"expert {self._name!r}, {self._model.directory}: the inputs of {tensor} on --calibration text are NaN "
                f"or Inf: a tensor before it holds NaN or Inf, or is too large; fetch or train the expert again."
            )
        return found

    def _compute(self, layer: int) -> None:
        """Compute the layers until this one; those that are not asked for before it are not kept."""
        if self._next is None or layer < self._next:
            self._layers = layers_seen(self._model, self._tokens, partial(mean_products, self._count))
            self._next, self._held = 0, {}
        while self._next <= layer:
            seen = next(self._layers)
            if self._held or self._next == layer:
                self._held |= seen.measured
            self._next += 1


def mean_products(
    count: int, inputs: Float[Array, "B T columns"], counted: Float[Array, "B T"] | None, delta: Array | None
) -> Float[Array, "columns columns"]:
    """Compute XᵀX/count, X the inputs of all tokens or of those that count, in float32."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    kept = rows if counted is None else rows * counted.reshape(-1, 1)
    return jnp.einsum("ti,tj->ij", kept, rows, precision="highest") / count


def grams_of_experts(job: JobConfig, experts: Mapping[str, Checkpoint]) -> dict[str, LayerwiseGrams]:
    """Read the --calibration text of every expert; nothing is computed yet.

    Raises:
      ValueError: there is no text, or an expert is not computed here; the message names the flag.
    """
    found, needs = {}, f"--combine={job.merge.combine}"
    for name, expert in experts.items():
        own = replace(job, calibration=job.text_of(name))
        tokens = tokens_of(own, expert, needs)
        try:
            found[name] = LayerwiseGrams(name, expert, tokens)
        except ValueError as error:
            raise ValueError(f"{expert.directory}: {needs} runs the experts on text: {error}") from error
        logging.info("products of inputs of %s on %s", name, own.calibration)
    return found
