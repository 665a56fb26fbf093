"""Rotary position embeddings: what a config.json says of them, and the angles that follow."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dppa_jax.runtime.reading import convert

NEEDS = {  # the keys that each type of rope needs
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
}
SCALED_FROM = ("llama3", "yarn", "longrope")  # which depend on the context length of pre-training
TAKES = {  # and those that it takes
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor"),
}


@dataclass(frozen=True)
class Rope:
    """How queries and keys are rotated by their positions. Fields have the names of config.json.

    With `default`, pair i of n turns by rope_theta^(−i/n) radians a token. The other types serve contexts longer than
    those of pre-training. `linear` divides every frequency by `factor`. `dynamic` raises rope_theta for sequences
    beyond the original length. `llama3` and `yarn` divide low frequencies by `factor`, keep high ones, and interpolate
    between them. `longrope` divides each frequency by a number of its own, one for short and one for long sequences.

    Attributes:
      original_max_position_embeddings: the context length of pre-training.
      attention_factor: `yarn` and `longrope` multiply cosines and sines by it; None follows from `factor`.
    """

    rope_theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @classmethod
    def from_hf(cls, rope: Mapping[str, Any], theta: float, length: int, original: int | None = None) -> "Rope":
        """Read `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5).

        Args:
          rope: what config.json says.
          theta: of the config.json or of its family, where `rope` has none.
          length: max_position_embeddings.
          original: original_max_position_embeddings as the config.json itself says it, which goes before that of rope.

        Raises:
          ValueError: the type is not supported, or a number that it needs is missing.
        """
        said = {key: value for key, value in rope.items() if value is not None}
        kind = "longrope" if "short_factor" in said else said.get("rope_type", said.get("type", "default"))
        if str(kind) not in NEEDS:  # Phi-3 has called longrope "su" and "yarn"
            raise ValueError(f"config.json: rope type {kind!r} is not supported; supported are {', '.join(NEEDS)}.")
        if missing := [name for name in NEEDS[kind] if name not in said]:
            raise ValueError(
                f"config.json: rope type {kind!r} needs {', '.join(missing)}, but only {dict(rope)} is there; "
                f"download config.json again."
            )
        read = {key: said[key] for key in ("rope_theta", *NEEDS[kind], *TAKES.get(kind, ())) if key in said}
        read = {"rope_theta": theta, **read, "rope_type": kind}
        if kind in SCALED_FROM:
            read["original_max_position_embeddings"] = (
                original or said.get("original_max_position_embeddings") or length
            )
            read.setdefault("factor", length / read["original_max_position_embeddings"])
        if kind == "dynamic":
            read["original_max_position_embeddings"] = length
        return convert(read, "config.json: rope", cls, "Correct it, or download it again.")

    def to_hf(self) -> dict[str, Any] | None:
        """Return the `rope_scaling` of a config.json; None when nothing is scaled."""
        if self.rope_type == "default":
            return None
        names = [*NEEDS[self.rope_type], *TAKES.get(self.rope_type, ())]
        names += ["original_max_position_embeddings"] * (self.rope_type in SCALED_FROM)
        said = asdict(self)
        return {"rope_type": self.rope_type, **{name: said[name] for name in names if said[name] is not None}}

    @property
    def varies(self) -> bool:
        """Do the frequencies depend on the length of the sequence?"""
        return self.rope_type in ("dynamic", "longrope")

    @property
    def switches(self) -> bool:
        """Are there other frequencies for sequences beyond the original length? Then all their tokens take these."""
        return self.rope_type == "longrope"

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.rope_type not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        if self.rope_type == "longrope":
            return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position_embeddings))
        grown = lambda scale: 0.1 * scale * math.log(self.factor) + 1  # noqa: E731
        return grown(self.mscale) / grown(self.mscale_all_dim) if self.mscale and self.mscale_all_dim else grown(1.0)


def angles(
    rope: Rope, positions: Int[Array | np.ndarray, "#B T"], length: Int[Array | np.ndarray, "#B"] | None, width: int
) -> Float[Array, "2 #B 1 T half"]:
    """Return the cosines and sines by which positions are rotated, in float32.

    Args:
      rope: how.
      positions: of the tokens.
      length: of their sequences, where the frequencies vary with it.
      width: how many elements of a head are rotated.
    """
    turned = positions[:, None, :, None].astype(jnp.float32) * frequencies(rope, width, length)
    turned = jnp.stack([jnp.cos(turned), jnp.sin(turned)])
    return turned if rope.magnitude == 1 else turned * jnp.float32(rope.magnitude)


def frequencies(rope: Rope, width: int, length: Int[Array | np.ndarray, "#B"] | None = None) -> np.ndarray | Array:
    """Return the radians per position of each pair of elements, float32: (half,), or (B, 1, 1, half) if they vary.

    Sources: the papers' own code, as in transformers' `modeling_rope_utils`.
    """
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    powers = np.float32(rope.rope_theta) ** exponents
    plain = (1.0 / powers).astype(np.float32)
    match rope.rope_type:
        case "linear":
            return plain / np.float32(rope.factor)
        case "llama3":
            turns = rope.original_max_position_embeddings * plain / (2 * math.pi)  # within the original context
            low, high = rope.low_freq_factor, rope.high_freq_factor
            kept = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 1: as it was, 0: divided by the factor
            return ((1 - kept) * plain / rope.factor + kept * plain).astype(np.float32)
        case "yarn":
            kept = 1 - yarn_ramp(rope, width)
            return (kept * plain + (1 - kept) * (1.0 / (np.float32(rope.factor) * powers))).astype(np.float32)
        case "longrope":
            long, short = (np.float32(1) / (np.float32(f) * powers) for f in (rope.long_factor, rope.short_factor))
            beyond = length > rope.original_max_position_embeddings
            return jnp.where(beyond[:, None, None, None], long, short)
        case "dynamic":
            most = rope.original_max_position_embeddings
            grown = rope.factor * jnp.maximum(length, most) / most - (rope.factor - 1)
            theta = rope.rope_theta * grown.astype(jnp.float32) ** (width / (width - 2))
            return 1.0 / theta[:, None, None, None] ** exponents
    return plain


def yarn_ramp(rope: Rope, width: int) -> np.ndarray:
    """Return how far each pair is interpolated, from 0 for the fastest to 1 for the slowest, (half,) float32.

    Source: Peng et al. 2023. The ramp begins at the pair that turns `beta_fast` times in the original context, and ends
    at the one that turns `beta_slow` times.
    """

    def pair(turns: float) -> float:
        circles = rope.original_max_position_embeddings / (2 * math.pi * turns)
        return width * math.log(circles) / (2 * math.log(rope.rope_theta))

    first, last = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    steps = np.arange(width // 2, dtype=np.float32) - np.float32(first)
    return np.clip(steps / np.float32(last - first or 0.001), 0, 1)


def rotate(heads: Float[Array, "B N T H"], rope: Float[Array, "2 #B 1 T half"]) -> Float[Array, "B N T H"]:
    """Rotate element i of the first half of each head with element i of the second; what `rope` leaves out stays."""
    width = 2 * rope.shape[-1]
    if width < heads.shape[-1]:
        return jnp.concatenate([rotate(heads[..., :width], rope), heads[..., width:]], axis=-1)
    cos, sin = rope
    first, second = jnp.split(heads, 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(heads.dtype)
