"""Merge single tensors and state dicts of NumPy, JAX or PyTorch as files are merged, for trainers and other tools."""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dppa_jax.architecture.row import Role
from dppa_jax.architecture.specs import Linears, TensorSpec, matrix_shape
from dppa_jax.checkpoint.state_dict import StateDict
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.numbers import rate_of_density
from dppa_jax.delta.scale import SCALES
from dppa_jax.delta.score import SCORES
from dppa_jax.delta.threshold import Thresholds
from dppa_jax.delta.tied import Pair, Placed, dropped, ranks_of
from dppa_jax.merging.bounds import Norms, Pruner
from dppa_jax.merging.kernels import Kernels
from dppa_jax.merging.merger import (
    Layout,
    Merger,
    check_finite,
    kernels_of,
    merge_matrix,
    output_tensors,
    tensors_of,
    with_arithmetic,
)
from dppa_jax.merging.rows import DeviceMatrix, Matrix, RowRange
from dppa_jax.runtime.mesh import make_mesh, put_rows

Tensor = Any  # of NumPy, JAX or PyTorch
ONE_DEVICE = "layer=1,row=1"


def merge_tensors(
    base: Tensor,
    experts: Mapping[str, Tensor],
    method: str,
    *,
    name: str = "tensor",
    pruned: bool = True,
    density: float | None = None,
    rates: Mapping[str, Sequence[float] | np.ndarray] | None = None,
    norms: Mapping[str, np.ndarray] | None = None,
    input_grams: Mapping[str, np.ndarray] | None = None,
    **options: Any,
) -> Tensor:
    """Merge one tensor: base + combine(λₖ · scaleₖ(keepₖ(expertₖ − base))), with the bits of a merge of files.

    May be called in `jax.jit`, where thresholds are found by sorting, if neither score nor scale adds up |δ|.

    Args:
      base, experts: arrays of one shape, of NumPy, JAX or PyTorch; a matrix's rows are outputs, a vector is one row.
      method: a preset, a key of `dppa_jax.methods`.
      name: of the tensor; random masks and the choice among ties are made of it, of `seed` and of the experts' names.
      pruned: is it pruned, as linears are, or does it keep its whole delta, as all other tensors do?
      density: the share of each delta that is kept, in place of rate = 1 − density.
      rates: per expert, the rates of its partitions, where an allocation looks at the whole model: `Outcome.rates`.
      norms: per expert, ‖x_j‖ of every input, (columns,), for scores that are calibrated.
      input_grams: per expert, XᵀX/n of the inputs X of n tokens, (columns, columns), for regmean.
      **options: fields of `MergeConfig`: rate, coefficients, factors, seed, compatible, ...

    Returns:
      The merged tensor, of the kind of `base` and, unless `output_dtype` says otherwise, of its dtype.

    Raises:
      ValueError: an option is unknown or out of bounds; shapes differ; NaN or Inf, outside of jit.

    >>> base, expert = np.zeros((1, 4), np.float32), np.array([[1.0, -4.0, 2.0, 3.0]], np.float32)
    >>> merge_tensors(base, {"math": expert}, "magnitude", density=0.5, ties="exact").tolist()
    [[0.0, -4.0, 0.0, 3.0]]
    """
    config = config_of(tuple(experts), method, density, options)
    if config.drops_units:
        raise ValueError(f"score={config.score}: heads and neurons lie in several tensors; see merge_state_dicts.")
    for expert, tensor in experts.items():
        if tuple(tensor.shape) != tuple(base.shape):
            raise ValueError(f"expert {expert!r}: shape {tuple(tensor.shape)}, the base has {tuple(base.shape)}.")
    own, *others = (as_jax(tensor) for tensor in (base, *experts.values()))
    merged = _Tensor(name, own.shape, config, pruned, rates or {}, norms or {}, input_grams)(own, others)
    return as_kind(merged.reshape(own.shape), base)


def merge_state_dicts(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    method: str,
    *,
    config: Mapping | None = None,
    density: float | None = None,
    norms: Norms | None = None,
    input_grams: Norms | None = None,
    mesh: str = ONE_DEVICE,
    **options: Any,
) -> dict[str, Tensor]:
    """Merge state dicts: what a merge of directories with these tensors writes, of the kind of the base's tensors.

    Args:
      base, experts: tensors by the names that files have; the experts by their own names.
      config: the content of config.json, which says what the tensors are; else their names and shapes say it.
      method, density, norms, input_grams, **options: as for `merge_tensors`; norms and products by expert and tensor.
      mesh: devices as --mesh takes them.

    Returns:
      The names of the base with merged tensors; what is not merged, such as buffers of integers, is the base's.

    Raises:
      ValueError: an option is out of bounds, or the models do not fit together.
    """
    chosen = config_of(tuple(experts), method, density, options)
    models = {
        label: StateDict({n: np.asarray(as_jax(x)) for n, x in tensors.items()}, config)
        for label, tensors in {"": base, **experts}.items()
    }
    first = models.pop("")
    grams = None if input_grams is None else {e: partial(_gram_of, e, own) for e, own in input_grams.items()}
    merger = Merger(first, models, chosen, make_mesh(mesh), Layout(), norms, quiet=True, input_grams=grams)
    merged = first.like({name: dtype for name, (_, dtype) in output_tensors(first, merger.config).items()})
    merger(merged)
    found = merged.finished()
    return {name: x if found[name] is first.arrays[name] else as_kind(found[name], x) for name, x in base.items()}


def config_of(experts: tuple[str, ...], method: str, density: float | None, options: Mapping[str, Any]) -> MergeConfig:
    """Make the config of a merge in memory.

    Raises:
      ValueError: rate and density are both given, or an option is out of bounds.
    """
    rate = {}
    if density is not None:
        if "rate" in options:
            raise ValueError("rate and density are both given, and rate = 1 − density: give one of them.")
        rate = {"rate": rate_of_density("density", density)}
    config = MergeConfig(experts=experts, method=method, **options, **rate)
    if config.lora_factors:
        raise ValueError(
            "lora_factors: models in memory are whole, without factors; the command line has --lora_factors."
        )
    return config


def _gram_of(expert: str, own: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Return the products of the inputs of a linear of an expert."""
    if name not in own:
        raise ValueError(f"input_grams of {expert!r}: none for the linear {name}; give those of all linears.")
    return np.asarray(own[name])


def as_jax(tensor: Tensor) -> jax.Array:
    """Return a tensor as JAX's; of PyTorch by DLPack, without its graph of gradients."""
    if hasattr(tensor, "detach"):
        return jnp.from_dlpack(tensor.detach().contiguous())
    return jnp.asarray(tensor)


def as_kind(array: jax.Array | np.ndarray, like: Tensor) -> Tensor:
    """Return an array as the kind that a tensor has."""
    if hasattr(like, "detach"):
        return sys.modules["torch"].from_dlpack(jnp.asarray(array)).to(like.device)
    return np.array(array) if isinstance(like, np.ndarray) else jnp.asarray(array)


class _Tensor:
    """The merge of one tensor, as if a model had no other."""

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        config: MergeConfig,
        pruned: bool,
        rates: Mapping,
        norms: Mapping,
        input_grams: Mapping[str, np.ndarray] | None,
    ):
        self.config, self.pruned, self.rates, rows_columns = config, pruned, rates, matrix_shape(shape)
        self.norms = {expert: {name: own} for expert, own in norms.items()}
        given = {e: partial(_gram_of, e, {name: own}) for e, own in (input_grams or {}).items()}
        self.input_grams = None if input_grams is None and pruned else given
        self.spec = TensorSpec(name, tuple(shape), Role.LINEAR, "linear", 0, 0)
        rows, columns = rows_columns
        self.matrix = Matrix((RowRange(name, 0, rows),), columns, (0,) if pruned else ())

    def __call__(self, base: jax.Array, experts: Sequence[jax.Array]) -> jax.Array:
        arrays = [array.reshape(self.matrix.rows, self.matrix.columns) for array in (base, *experts)]
        traced = any(isinstance(array, jax.core.Tracer) for array in arrays)
        mesh = make_mesh(ONE_DEVICE)
        source = _Headers(self.spec, base.dtype)
        config = with_arithmetic(self.config, [source, *(_Headers(self.spec, e.dtype) for e in experts)])
        linear, dense = kernels_of(mesh, config)
        kernels = linear if self.pruned else dense
        kernels = _InGraph(mesh, kernels.elementwise) if traced else kernels
        pruner = (_Traced if traced else Pruner)(kernels, config, Linears((self.spec,)), self.norms)
        pruner.allocate(None)
        for e, expert in enumerate(config.experts):
            if expert in self.rates:
                pruner.rates[e] = np.reshape(self.rates[expert], (-1, 1))
        pruner.weigh(config)
        own, *others = arrays if traced else (put_rows(mesh, array) for array in arrays)
        x = DeviceMatrix(self.matrix, own, tuple(others))
        per_expert = [pruner.bounds_and_weights(x, e) for e in range(len(others))]
        tensors = None if traced else tensors_of(dense, config, pruner, self.input_grams)
        merged = merge_matrix(x, per_expert, kernels, pruner, source, config, None, tensors)
        if not traced:
            check_finite(x, merged, kernels, config)
        return merged


class _Headers:
    """What a merge asks of a model with one tensor, but for the weights."""

    def __init__(self, spec: TensorSpec, dtype: np.dtype):
        self.config, self.specs = {}, {spec.name: spec}
        self.tensors = {spec.name: np.empty(0, dtype)}


class _InGraph(Kernels):
    """Kernels whose merge is part of the graph that is being compiled."""

    def ranked(self, base, expert, inputs):
        """Leave ranks to the graph."""
        return inputs

    def merge(self, output_dtype, base, experts, inputs, bounds, weights, numbers=None, total=None):
        """Merge as `Kernels` does."""
        first = lax.bitcast_convert_type(base[0, 0].astype(jnp.float32), jnp.uint32) & 0xFFFF
        zero = (first * first % 7 == 3).astype(jnp.int32)  # no square is 3 modulo 7, which no compiler knows
        return self.merge_rows(output_dtype, zero, base, experts, inputs, bounds, weights, numbers, total)


class _Traced(Pruner):
    """Finds bounds of one tensor whose weights are not known yet, inside of jit: by sorting, not by counting."""

    def bounds_and_weights(self, x: DeviceMatrix, e: int) -> tuple:
        """Find what `Pruner` finds; bounds are pairs, as ties may have to be told apart."""
        config, matrix = self.config, x.matrix
        if not config.combination.prunes:
            raise ValueError(
                f"merge_tensors in jit: --combine={config.combine} asks for sums of whole tensors on the host; call it "
                f"outside of jit."
            )
        if not matrix.linears or config.score is None:
            return super().bounds_and_weights(x, e)
        wanted = SCORES[config.score].inputs
        if SCALES[config.scale].keeps_norm or (wanted and wanted.sees_weights and not config.is_calibrated):
            raise ValueError(
                f"merge_tensors in jit: --score={config.score} with --scale={config.scale} adds up the delta in double "
                f"precision on the host; call it outside of jit."
            )
        if not config.is_counted:
            return super().bounds_and_weights(x, e)
        inputs = Placed(self.placed_inputs(x, e), put_rows(self.kernels.mesh, self._place_words(matrix, e)))
        elementwise, column = self.kernels.elementwise, lax.broadcasted_iota(jnp.int32, (1, matrix.columns), 1)
        pair = elementwise.keys(elementwise.delta(x.base, x.experts[e]), inputs, column)
        bounds = self._sorted_bounds(pair, matrix.elements, self.rates[e].T)
        return inputs, bounds[None], self.weights[e].T

    def on_rows(self, x: DeviceMatrix, per_range: Any) -> jax.Array:
        """One value per range for each of its rows."""
        return jnp.repeat(jnp.asarray(per_range), x.matrix.rows, axis=0)

    def _sorted_bounds(self, pair: Pair, numel: int, rates: np.ndarray) -> jax.Array:
        """Bounds (partitions, 2) of the pairs (key, place)."""
        rule, key = self.config.ties_rule, pair.key.reshape(-1)
        ordered = jnp.sort(key)
        t = ordered[ranks_of(rule, numel, rates)[0]]
        below, through = (jnp.searchsorted(ordered, t, side) for side in ("left", "right"))
        gone = dropped(rule, numel, rates, Thresholds(t[None], below[None], through[None]))[0]
        last = np.uint32(0xFFFFFFFF)
        places = jnp.sort(jnp.where(key == t[:, None], pair.place.reshape(1, -1), last), axis=1)
        cut = jnp.take_along_axis(places, jnp.clip(gone - below, 0, numel - 1)[:, None], axis=1)[:, 0]
        inside = (below < gone) & (gone < through)
        return jnp.stack([jnp.where(gone < through, t, t + np.uint32(1)), jnp.where(inside, cut, 0)], axis=1)
