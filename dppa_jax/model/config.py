"""The part of a checkpoint's config.json that the forward pass of a decoder or an encoder depends on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import msgspec

from dppa_jax.architecture.row import without_nulls
from dppa_jax.architecture.table import Architecture, architecture_of
from dppa_jax.model.families import Fields, fields_of
from dppa_jax.model.rope import Rope
from dppa_jax.runtime.reading import convert

ACTIVATIONS = {  # by the names of config.json
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
TokenId = Annotated[int, msgspec.Meta(ge=-1, lt=2**31)]  # some configs write -1 for none


def said_by(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config.json says, with the family's defaults for what it leaves out or calls null."""
    return architecture_of(config).said(without_nulls(config))


def end_ids(value: Any, where: str) -> tuple[int, ...]:
    """Return the ids that an eos_token_id names: one, several, or none for null.

    Raises:
      ValueError: it is of another form, such as the token's text; `where` names it.
    """
    ids = convert(value, where, TokenId | list[TokenId] | None, "Give the number of the token, or a list of numbers.")
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)


def ends_of(said: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the ids that end a text, from what `said_by` returns."""
    return end_ids(said.get("eos_token_id", 2), "config.json: eos_token_id")


class Norms(NamedTuple):
    """The names of a layer's norms by their place; None where there is none."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None

    @classmethod
    def of(cls, names: tuple[str, ...]) -> "Norms":
        """Tell the places of norms by their names.

        >>> Norms.of(("post_attention_layernorm", "post_feedforward_layernorm")).before_mlp is None
        True
        """
        after = "post_feedforward_layernorm" in names  # then post_attention_layernorm means what it says
        places = (
            "input_layernorm",
            "post_attention_layernorm" if after else None,
            "pre_feedforward_layernorm" if after else "post_attention_layernorm",
            "post_feedforward_layernorm",
        )
        return cls(*(name if name in names else None for name in places))


LLAMA_NORMS = Norms()


@dataclass(frozen=True)
class DecoderConfig:
    """What a config.json says of the forward pass. It is hashable: a static argument of `jax.jit`.

    Attributes:
      activation: "silu", "gelu" or "gelu_tanh".
      biases: the linears that have one.
      norms: of a layer.
      unit_norms: do norms multiply by 1 + weight?
      query_key_norm: are queries and keys normed: each "head", all of the "projection", or not at all?
      ropes: tables of rotary angles; None is a table that rotates nothing.
      rope_of_layer: the number of each layer's table; empty where all take the first.
      partial_rotary_factor: the share of each head that is rotated, its first elements.
      sliding_window: how many tokens, itself included, a token sees in layers with a window; None is no window.
      windowed_layers: which layers have a window; empty for all.
      attention_scale: of attention scores; None is 1/√head_dim.
      attention_cap, logit_cap: x becomes cap · tanh(x / cap).
      scaled_embeddings: are embeddings multiplied by √hidden_size, rounded to their dtype?
      embedding_multiplier, residual_multiplier: of embeddings, and of what attention and MLP add.
      logits_scaling: logits are divided by it.
      num_experts: MLPs of a layer, of which a router picks num_experts_per_tok for each token; 0 for one dense MLP.
      norm_topk_prob: do the shares of the picked add up to 1?
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    bos_token_id: int | None = 1
    eos_token_id: tuple[int, ...] = (2,)
    activation: str = "silu"
    biases: tuple[str, ...] = ()
    norms: Norms = LLAMA_NORMS
    unit_norms: bool = False
    query_key_norm: str | None = None
    ropes: tuple[Rope | None, ...] = (Rope(),)
    rope_of_layer: tuple[int, ...] = ()
    partial_rotary_factor: float = 1.0
    sliding_window: int | None = None
    windowed_layers: tuple[bool, ...] = ()
    attention_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    scaled_embeddings: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    num_experts: int = 0
    num_experts_per_tok: int = 0
    norm_topk_prob: bool = False

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        """Read a config.json as transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`) writes it.

        Absent keys take the defaults of transformers.

        Raises:
          ValueError: the config asks for what this model does not compute: a family without a forward pass, an unknown
            activation or rope type.
        """
        row, said = architecture_of(config), said_by(config)
        heads = said["num_attention_heads"]
        kv_heads = said.get("num_key_value_heads", heads)
        if heads % kv_heads:
            raise ValueError(
                f"config.json: {heads} attention heads cannot share {kv_heads} key/value heads evenly; "
                f"num_attention_heads must be a multiple of num_key_value_heads."
            )
        fields = {
            "vocab_size": said["vocab_size"],
            "hidden_size": said["hidden_size"],
            "intermediate_size": said["intermediate_size"],
            "num_hidden_layers": said["num_hidden_layers"],
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": said.get("head_dim") or said["hidden_size"] // heads,
            "rms_norm_eps": said.get("rms_norm_eps", 1e-6),
            "tie_word_embeddings": said.get("tie_word_embeddings", False),
            "max_position_embeddings": said.get("max_position_embeddings", 2048),
            "bos_token_id": said.get("bos_token_id", 1),
            "eos_token_id": ends_of(said),
            "activation": said.get("hidden_act", "silu"),
            **tensors_of(row, said),
            **fields_of(row.model_type, said),
        }
        if fields["activation"] not in ACTIVATIONS:
            raise ValueError(
                f"config.json: activation {fields['activation']!r} is not computed; {', '.join(ACTIVATIONS)} are."
            )
        return cls(**fields | {"activation": ACTIVATIONS[fields["activation"]]})

    def to_hf(self) -> dict[str, Any]:
        """Return a LLaMA's config.json in the style of transformers 4, which transformers 4 and 5 and vLLM read.

        Raises:
          ValueError: it is no LLaMA. Such a model keeps the config.json that it came with.
        """
        eos, (rope, *_) = self.eos_token_id, self.ropes
        kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        kept += ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings")
        written = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": "q_proj" in self.biases,
            "mlp_bias": "gate_proj" in self.biases,
            **{name: getattr(self, name) for name in kept},
            "rope_theta": rope and rope.rope_theta,
            "rope_scaling": rope and rope.to_hf(),
            "bos_token_id": self.bos_token_id,
            "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        }
        if DecoderConfig.from_hf(written) != self:
            raise ValueError("only a LLaMA's config.json can be made; keep the one that the model came with.")
        return written


@dataclass(frozen=True)
class EncoderConfig:
    """What a config.json says of the forward pass of BERT or RoBERTa. It is hashable, as `DecoderConfig`.

    Attributes:
      activation: as of `DecoderConfig`.
      first_position: the row of the position embeddings that the first token of a text has.
      pooled: is the classifier fed by a pooler (BERT)? If not, it has a dense layer of its own (RoBERTa).
      labels: the names of the classes, by their numbers; one name stands for a number that is predicted (regression);
        empty for a model without a classification head.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    activation: str = "gelu"
    first_position: int = 0
    pooled: bool = True
    labels: tuple[str, ...] = ()

    @property
    def positions(self) -> int:
        """The most tokens that a text can have."""
        return self.max_position_embeddings - self.first_position

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "EncoderConfig":
        """Read a config.json. Absent keys take the defaults of transformers.

        Raises:
          ValueError: the config asks for what this model does not compute.
        """
        row, said = architecture_of(config), said_by(config)
        kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        kept += ("max_position_embeddings", "type_vocab_size")
        activation, places = said["hidden_act"], said.get("position_embedding_type", "absolute")
        if activation not in ACTIVATIONS or places != "absolute" or said.get("is_decoder"):
            raise ValueError(
                f"config.json: an encoder with the activation {activation!r}, {places!r} positions and is_decoder "
                f"{said.get('is_decoder', False)} is not computed; activations {', '.join(ACTIVATIONS)} with absolute "
                f"positions are."
            )
        return cls(
            **{name: said[name] for name in kept},
            layer_norm_eps=said.get("layer_norm_eps", 1e-12),
            activation=ACTIVATIONS[activation],
            first_position=said.get("pad_token_id", 1) + 1 if row.skips_padding else 0,
            pooled=row.pooled,
            labels=labels_of(config) if row.classifies(config) else (),
        )


def labels_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the classes of a config.json, by their numbers; transformers' defaults are two."""
    names = convert(config.get("id2label"), "config.json: id2label", dict[str, str] | None, "Name classes by number.")
    if names is None:
        return ("LABEL_0", "LABEL_1")
    numbers = {str(i) for i in range(len(names))}
    if names.keys() != numbers:
        raise ValueError(f"config.json: id2label names the classes {', '.join(names)}; number them from 0.")
    return tuple(names[str(i)] for i in range(len(names)))


ModelConfig = DecoderConfig | EncoderConfig


def model_config(config: Mapping[str, Any]) -> ModelConfig:
    """Read a config.json as what the family's forward pass needs; see `from_hf` of either class."""
    return (EncoderConfig if architecture_of(config).own_heads else DecoderConfig).from_hf(config)


def tensors_of(row: Architecture, said: Mapping) -> Fields:
    """Return the fields that follow from which tensors a family has."""
    sizes = {norm.kind.split(".")[-1]: norm.size for norm in row.norms}
    normed = {"head": "head", "queries": "projection"}.get(sizes.get("q_norm", ""))
    biases = tuple(linear.kind.split(".")[-1] for linear in row.linears if linear.has_bias(said))
    return {"norms": Norms.of(tuple(sizes)), "query_key_norm": normed, "biases": biases}
