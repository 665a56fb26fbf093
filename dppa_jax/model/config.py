"""The part of a checkpoint's config.json that the forward pass depends on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from dppa_jax.runtime.reading import convert

ROPE_TYPES = ("default", "linear", "llama3")
COMPUTED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}  # nothing else
TokenId = Annotated[int, msgspec.Meta(ge=-1, lt=2**31)]  # some configs write -1 for none


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed for contexts longer than those of pre-training.

    `linear` divides every frequency by `factor`. `llama3` divides low frequencies by `factor`, keeps high ones, and
    interpolates between them; only `llama3` reads the last three fields.
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    @classmethod
    def from_hf(cls, rope: Mapping[str, Any]) -> "RopeScaling | None":
        """Read `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5); None when nothing is scaled.

        Raises:
          ValueError: the type of scaling is not supported, or a number that it needs is missing.
        """
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ROPE_TYPES:
            raise ValueError(
                f"config.json: rope type {rope_type!r} is not supported; supported are {', '.join(ROPE_TYPES)}."
            )
        if rope_type == "default":
            return None
        names = ["factor"]
        if rope_type == "llama3":
            names += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
        if missing := [name for name in names if rope.get(name) is None]:
            raise ValueError(
                f"config.json: rope type {rope_type!r} needs {', '.join(missing)}, but only {dict(rope)} is there; "
                f"download config.json again."
            )
        return cls(rope_type, **{name: rope[name] for name in names})

    def to_hf(self) -> dict[str, Any]:
        """Return the `rope_scaling` of a config.json."""
        if self.rope_type == "linear":
            return {"rope_type": "linear", "factor": self.factor}
        return dict(vars(self))


def end_ids(value: Any, where: str) -> tuple[int, ...]:
    """Return the ids that an eos_token_id names: one, several, or none for null.

    Raises:
      ValueError: it is of another form, such as the token's text; `where` names it.
    """
    ids = convert(value, where, TokenId | list[TokenId] | None, "Give the number of the token, or a list of numbers.")
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)


@dataclass(frozen=True)
class LlamaConfig:
    """The numbers of a config.json that the forward pass depends on. It is hashable: a static argument of `jax.jit`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    bos_token_id: int | None = 1
    eos_token_id: tuple[int, ...] = (2,)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Read a config.json as transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`) writes it.

        Absent keys take the defaults of transformers' LlamaConfig.

        Raises:
          ValueError: the config asks for what this model does not compute: another architecture, biases, another
            activation, an unknown rope type.
        """
        for name, supported in COMPUTED.items():
            if config.get(name, supported) != supported:
                raise ValueError(f"config.json has {name}={config[name]!r}; the model supports only {supported!r}.")
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise ValueError(
                f"config.json: {heads} attention heads cannot share {kv_heads} key/value heads evenly; "
                f"num_attention_heads must be a multiple of num_key_value_heads."
            )
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}  # transformers 5's own precedence
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
            rope_scaling=RopeScaling.from_hf(rope),
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            bos_token_id=config.get("bos_token_id", 1),
            eos_token_id=end_ids(config.get("eos_token_id", 2), "config.json: eos_token_id"),
        )

    def to_hf(self) -> dict[str, Any]:
        """Return a config.json in the style of transformers 4, which transformers 4 and 5 and vLLM read."""
        eos = self.eos_token_id
        return {
            "architectures": ["LlamaForCausalLM"],
            **COMPUTED,
            **vars(self),
            "rope_scaling": self.rope_scaling and self.rope_scaling.to_hf(),
            "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        }
