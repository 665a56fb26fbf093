"""One step of Adam on the coefficients, compiled, with the gradient of the entropy."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float

from dppa_jax.merging.kernels import ZERO
from dppa_jax.search.entropy import Batch, row_entropies
from dppa_jax.search.mixture import Mixture


class Step:
    """One step of Adam; compiled once for each width of batches.

    Args:
      of_tensor: the group of every tensor of `mixture.names`.
      fixed: (tensors,) coefficients of all experts that `--tensor_coefficient` rules decide, NaN elsewhere.
    """

    def __init__(self, mixture: Mixture, of_tensor: np.ndarray, fixed: np.ndarray, learning_rate: float):
        self.mixture, self.learning_rate, self.peak_bytes = mixture, np.float32(learning_rate), 0
        self._constants = np.asarray(of_tensor, np.int32), np.asarray(fixed, np.float32)
        self._compiled: dict[tuple, Callable] = {}

    def __call__(
        self, raw: np.ndarray, mean: np.ndarray, square: np.ndarray, done: int, batch: Batch
    ) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Σ weight · entropy of the batch's rows, and raw coefficients and moments after the step."""
        adam = optax.ScaleByAdamState(np.int32(done), mean, square)
        arguments = (self.learning_rate, raw, adam, self._constants, self.mixture.tree, batch, ZERO)
        shape = batch.tokens.shape, batch.chosen.shape
        if shape not in self._compiled:  # by a Step of the same models and shapes in this process, it is not done again
            compiled = self._compiled[shape] = _step.lower(self.mixture.arithmetic, *arguments).compile()
            self.peak_bytes = max(self.peak_bytes, sum(memory(compiled)))
        rows, raw, adam = jax.device_get(self._compiled[shape](*arguments))
        return rows, (raw, adam.mu, adam.nu)

    def gradient(self, raw: np.ndarray, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Σ weight · entropy of the batch's rows, and the derivative of their sum by every raw coefficient."""
        arguments = raw, self._constants, self.mixture.tree, batch, ZERO
        return jax.device_get(_gradient(self.mixture.arithmetic, *arguments))

    def entropies(self, raw: np.ndarray, batch: Batch) -> np.ndarray:
        """Σ weight · entropy of the batch's rows."""
        arguments = raw, self._constants, self.mixture.tree, batch, ZERO
        return jax.device_get(_entropies(self.mixture.arithmetic, *arguments))


@partial(jax.jit, static_argnums=0)
def _step(arithmetic, learning_rate, raw, adam, constants, tree, batch, zero):
    rows, gradient = _gradient(arithmetic, raw, constants, tree, batch, zero)
    update, adam = optax.scale_by_adam().update(gradient, adam)
    return arithmetic.everywhere((rows, raw - learning_rate * update, adam))


@partial(jax.jit, static_argnums=0)
def _gradient(arithmetic, raw, constants, tree, batch, zero):
    def total(raw):
        rows = _entropies(arithmetic, raw, constants, tree, batch, zero)
        return rows.sum(), rows

    (_, rows), gradient = jax.value_and_grad(total, has_aux=True)(raw)
    return arithmetic.everywhere((rows, gradient))


@partial(jax.jit, static_argnums=0)
def _entropies(arithmetic, raw, constants, tree, batch, zero):
    return arithmetic.everywhere(row_entropies(arithmetic, tree, coefficients_of(raw, *constants), batch, zero))


def coefficients_of(raw: Float[Array, "groups experts"], of_tensor: Array, fixed: Array) -> Array:
    """(tensors, experts): clipped, and the gradient passed inside [0, 1] and at its bounds, as torch.clamp does."""
    inside = (raw >= 0) & (raw <= 1)
    clipped = jnp.where(inside, raw, lax.stop_gradient(jnp.clip(raw, 0, 1)))
    return jnp.where(jnp.isnan(fixed)[:, None], clipped[of_tensor], fixed[:, None])


def memory(compiled) -> tuple[int, int]:
    """Return the bytes of arguments and of temporary arrays, per device."""
    analysis = compiled.memory_analysis()
    return analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
