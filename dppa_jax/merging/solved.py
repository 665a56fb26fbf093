"""Linears that a method solves for, from what they read on a text; on the host, in float64, one linear at a time."""

from collections.abc import Callable, Mapping

import jax
import numpy as np

from dppa_jax.architecture.row import Role
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.method_options import option_of
from dppa_jax.merging.bounds import Pruner
from dppa_jax.merging.grams import Grams
from dppa_jax.merging.kernels import Kernels
from dppa_jax.merging.rows import DeviceMatrix
from dppa_jax.runtime.mesh import put_rows

InputGrams = Mapping[str, Callable[[str], np.ndarray]]
"""By expert, from a linear's name to the mean products of its inputs, (columns, columns); asked once a merge."""


class Solved(Grams):
    """Solves for linears; all other tensors are averaged as `Grams` does it.

    Raises:
      ValueError: nothing is known of the inputs.
    """

    def __init__(self, kernels: Kernels, config: MergeConfig, pruner: Pruner, input_grams: InputGrams | None):
        super().__init__(kernels, config, pruner)
        if input_grams is None:
            raise ValueError(
                f"--method={config.method} solves for linears from what they read, which is not known here: the "
                f"command line finds it with --calibration=FILE, merge_tensors and merge_state_dicts take input_grams."
            )
        self._input_grams = input_grams

    def merged(
        self, kernels: Kernels, x: DeviceMatrix, dtype: np.dtype | None, total: jax.Array | None = None
    ) -> jax.Array:
        """Merge a matrix, cast once to the dtype."""
        linears = [self._pruner.linears.specs[place] for place in x.matrix.linears]
        if not linears or linears[0].role is not Role.LINEAR:
            return super().merged(kernels, x, dtype, total)
        models = [np.asarray(model) for model in (x.base, *x.experts)]
        rows = [self._solved(linear.name, *(model[at] for model in models)) for linear, at in x.matrix.places()]
        return put_rows(kernels.mesh, np.concatenate(rows).astype(np.float32).astype(dtype))

    def _solved(self, tensor: str, base: np.ndarray, *experts: np.ndarray) -> np.ndarray:
        """Merge one linear, (rows, columns) float64.

        Raises:
          ValueError: names the tensor that cannot be solved for.
        """
        config = self._config
        if config.allow_nonfinite:
            experts = [np.where(np.isfinite(own), own, base) for own in experts]
        grams = [self._gram(name, tensor, base.shape[1]) for name in config.experts]
        coefficients = [self._pruner.coefficient(name, tensor) for name in config.experts]
        try:
            own = {name: option_of(config, name, tensor) for name in config.method_options}
            return self._whole.solve(experts, grams, coefficients, own)
        except ValueError as error:
            raise ValueError(f"{tensor}: --method={config.method}: {error}") from error

    def _gram(self, expert: str, tensor: str, columns: int) -> np.ndarray:
        gram = self._input_grams[expert](tensor)
        if gram.shape != (columns, columns):
            raise ValueError(
                f"input_grams of {expert!r}: {tensor} has {columns} inputs, so that products are {(columns, columns)}; "
                f"these are {gram.shape}."
            )
        return gram
