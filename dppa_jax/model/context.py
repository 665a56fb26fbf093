"""What positions mean to the layers of a model: which key slots a token sees, and how queries and keys are rotated.

Layers differ in it: some see a window, some rotate by another table. So there is one array for each kind of layer, and
each layer says by a number which it takes. These numbers are scanned along with the layers' weights. A model whose
layers are all alike has no such numbers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dppa_jax.model.config import DecoderConfig
from dppa_jax.model.rope import Rope, angles

Slots = Int[Array | np.ndarray, "#B T"]


class LayerKind(NamedTuple):
    """Which arrays of a `Context` a layer takes; None where there is one for all. (L,) for all layers, () for one."""

    rope: Int[Array | np.ndarray, "*L"] | None = None
    visible: Int[Array | np.ndarray, "*L"] | None = None


class LayerContext(NamedTuple):
    """What one layer takes of a `Context`."""

    rope: Float[Array, "2 #B 1 T half"]
    visible: Bool[Array, "#B T S"]


class Context(NamedTuple):
    """The arrays of every kind of layer.

    Attributes:
      rope: cosines and sines for the tokens of this call.
      visible: which key slots each of them sees.
    """

    rope: tuple[Float[Array, "2 #B 1 T half"], ...]
    visible: tuple[Bool[Array, "#B T S"], ...]

    def of(self, kind: LayerKind) -> LayerContext:
        """Return the arrays of one layer."""
        return LayerContext(choose(kind.rope, self.rope), choose(kind.visible, self.visible))


def choose(number: Int[Array, ""] | None, arrays: tuple[Array, ...]) -> Array:
    """Return the array of this number; the only one where there is no number."""
    return arrays[0] if number is None else jax.lax.select_n(number, *arrays)


def context_of(config: DecoderConfig, slots: Slots, positions: Slots, cached: int | None = None) -> Context:
    """Return the context of all layers.

    Args:
      config: sizes and constants.
      slots: where the keys of these tokens go, counted from 0.
      positions: of the tokens in their sequences.
      cached: how many slots the cache has; None without a cache.
    """
    keys = slots.shape[1] if cached is None else cached
    rope = rotary(config, positions)
    windows = [config.sliding_window if windowed else None for windowed in mask_kinds(config)]
    return Context(rope, tuple(visibility(slots, positions, keys, window) for window in windows))


def layer_kinds(config: DecoderConfig) -> LayerKind:
    """Return the kind of every layer, to be scanned along with them."""
    rope = np.array(config.rope_of_layer, np.int32) if len(config.ropes) > 1 else None
    visible = np.array(config.windowed_layers, np.int32) if len(mask_kinds(config)) > 1 else None
    return LayerKind(rope, visible)


def mask_kinds(config: DecoderConfig) -> tuple[bool, ...]:
    """Return which masks the layers need: without a window, with one, or both."""
    if config.sliding_window is None:
        return (False,)
    return tuple(sorted(set(config.windowed_layers))) or (True,)


def visibility(slots: Slots, positions: Slots, keys: int, window: int | None = None) -> Bool[Array, "#B T keys"]:
    """Return which key slots each token sees: from the slot of position 0 of its sequence to its own slot.

    With a window, these are at most that many slots, its own included.
    """
    slot = jnp.arange(keys)
    visible = ((slots - positions)[..., None] <= slot) & (slot <= slots[..., None])
    return visible if window is None else visible & (slot > slots[..., None] - window)


def rotary(config: DecoderConfig, positions: Slots) -> tuple[Float[Array, "2 #B 1 T half"], ...]:
    """Return the cosines and sines of every table, in float32.

    With the rope types `dynamic` and `longrope` they depend on the length of a row, which its largest position says, so
    padding to the right counts.
    """
    width = int(config.head_dim * config.partial_rotary_factor)
    length = positions.max(axis=1) + 1 if any(rope and rope.varies for rope in config.ropes) else None

    def table(rope: Rope | None) -> Array:
        if rope is None:  # angles of 0
            still = jnp.ones((positions.shape[0], 1, positions.shape[1], width // 2), jnp.float32)
            return jnp.stack([still, jnp.zeros_like(still)])
        return angles(rope, positions, length, width)

    return tuple(table(rope) for rope in config.ropes)
