"""Optimisers for fine-tuning, as optax transformations. The learning rate is applied by the step, as it changes.

`scale_by_adamr` needs nothing else of this package:

    optimizer = optax.chain(scale_by_adamr(weight_decay=0.03), optax.scale_by_learning_rate(1e-5))
    direction, state = optimizer.update(gradient, state, weights, anchor=base)
"""

from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dppa_jax.config.finetune import AdamW

WAYS = 8  # slices of an axis that are added at a time
PULLS: dict[str, Callable[[jax.Array], jax.Array]] = {"l2": lambda delta: delta, "l1": jnp.sign}


class PullError(ValueError):
    """A pull toward the base that takes a weight the whole way there, or further, in one step."""


class AdamRState(NamedTuple):
    """The state of AdamR.

    Attributes:
      adam: Adam's moments.
      vbar: the root of the mean of Adam's second moments, over all elements of all tensors, at the last step.
      largest_pull: the largest learning rate · weight decay / vbar of all steps so far.
    """

    adam: optax.ScaleByAdamState
    vbar: Float[Array, ""]
    largest_pull: Float[Array, ""]


def transformation(options: AdamW) -> optax.GradientTransformationExtraArgs:
    """Return AdamW, or AdamR, without its learning rate: clip the gradient's norm, scale by Adam's moments, add decay.

    All weights decay, norms and embeddings too. The update takes the arguments of `scale_by_adamr`; AdamW ignores them.

    Source: Loshchilov & Hutter 2019, algorithm 2. Clipping before AdamR is ours.
    """
    clip, betas = optax.clip_by_global_norm(options.max_gradient_norm), (options.beta1, options.beta2)
    if options.decays_toward_base:
        decay = options.weight_decay, options.decay_norm
        return optax.chain(clip, scale_by_adamr(*betas, weight_decay=decay[0], norm=decay[1]))
    decayed = optax.chain(clip, optax.scale_by_adam(*betas), optax.add_decayed_weights(options.weight_decay))
    return optax.with_extra_args_support(decayed)


def scale_by_adamr(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *, weight_decay: float = 1e-4, norm: str = "l2"
) -> optax.GradientTransformationExtraArgs:
    """Return AdamR: Adam's direction, plus a pull of every weight p toward its anchor p0, the pre-trained weight.

    direction = m̂ / (√v̂ + eps) + weight_decay / v̄ · (p − p0), and sign(p − p0) in place of p − p0 for the norm l1;
    v̄ = √(the mean of v̂ over all elements of all tensors), after this step's v; 1 where that is 0.

    The paper's: fine-tuning with decay toward the pre-trained weights, L1 or L2, so that deltas stay small enough for
    DARE (Deng et al. 2024, "DARE the Extreme", AdamR). The authors' code's: the formula, v̄, all tensors anchored, the
    defaults. It moves p by the pull before Adam's step; Adam does not look at p, so the sum is the same. Ours: the
    fixed order of the sum, and the record of the largest pull. A decay of 0 is Adam, bit for bit.

    The update takes `anchor`, a tree like the weights in any dtype, and may take `learning_rate`, by which the
    direction will be multiplied: the record of the largest pull needs it.

    With the norm l1 a weight overshoots its anchor by up to learning rate · weight_decay / v̄: no delta becomes exactly
    0.
    """
    adam, towards = optax.scale_by_adam(b1, b2, eps), PULLS[norm]

    def init(params: Any) -> AdamRState:
        return AdamRState(adam.init(params), jnp.ones(()), jnp.zeros(()))

    def update(gradient: Any, state: AdamRState, params: Any = None, *, anchor: Any, learning_rate=1.0, **_: Any):
        if params is None:
            raise ValueError(optax.NO_PARAMS_MSG)
        direction, moments = adam.update(gradient, state.adam)
        vbar = root_mean(moments.nu) / jnp.sqrt(1 - b2**moments.count)
        vbar = jnp.where(vbar > 0, vbar, 1)
        strength = weight_decay / vbar
        if weight_decay:  # a pull of 0 would turn the direction's −0 into +0
            pulled = lambda d, p, p0: d + strength.astype(d.dtype) * towards(p - p0.astype(p.dtype))  # noqa: E731
            direction = jax.tree.map(pulled, direction, params, anchor)
        largest = jnp.maximum(state.largest_pull, learning_rate * strength).astype(state.largest_pull.dtype)
        return direction, AdamRState(moments, vbar.astype(state.vbar.dtype), largest)

    return optax.GradientTransformationExtraArgs(init, update)


def pull_of(moments: Any) -> dict[str, float]:
    """Return `vbar` and `largest_pull` of an optimiser's state, for a log; nothing where the optimiser is not AdamR.

    Raises:
      PullError: the largest pull is 1 or more. The limit is ours: from 1 on a step overshoots, from 2 on it diverges.
    """
    found = {name: optax.tree.get(moments, name) for name in ("vbar", "largest_pull")}
    if found["vbar"] is None:
        return {}
    found = {name: float(value) for name, value in found.items()}
    if found["largest_pull"] >= 1:
        raise PullError(
            f"learning rate · weight decay / vbar has reached {found['largest_pull']:.3g}, and a pull of 1 takes every "
            f"weight to --base in one step: --weight_decay or --learning_rate is too high. vbar is {found['vbar']:.3g}."
        )
    return found


def root_mean(tree: Any) -> Float[Array, ""]:
    """Return the root of the mean of all elements of all arrays, each of which counts the same."""
    leaves = jax.tree.leaves(tree)
    return jnp.sqrt(reduce(add, map(ordered_sum, leaves)) / float(sum(leaf.size for leaf in leaves)))


def ordered_sum(array: jax.Array) -> Float[Array, ""]:
    """Return the sum of all elements, added in one order, however the array is divided over devices.

    Every addition is elementwise, and compilers do not reorder those. The longest axis, along which a mesh divides an
    array, comes last, when the other axes are gone and little is left to move.
    """
    for axis in sorted(range(array.ndim), key=lambda axis: (array.shape[axis], -axis)):
        while array.shape[axis] > 1:
            array = _folded(array, axis)
    return array.reshape(())


def _folded(array: jax.Array, axis: int) -> jax.Array:
    """Return the sum of eight slices of an axis, first to last. The last slices may be short or missing."""
    size, width = array.shape[axis], -(-array.shape[axis] // WAYS)
    total, *others = (jax.lax.slice_in_dim(array, at, min(at + width, size), axis=axis) for at in range(0, size, width))
    for part in others:
        short = [(0, total.shape[other] - part.shape[other]) for other in range(array.ndim)]
        total = total + (jnp.pad(part, short) if short[axis][1] else part)
    return total
