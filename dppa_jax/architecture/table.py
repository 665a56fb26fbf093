"""The table of architectures: one row for each family of models.

A row says what the tensors are called, which of them are linears, and which sizes of config.json make their shapes.
That is all a merge needs. To add a family, write a row and a row in the tests' table.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

IGNORED = re.compile(r".*rotary_emb\.inv_freq$")  # a buffer that older exports carry
SIZES = {  # of a shape, by the key of config.json
    "hidden": "hidden_size",
    "inner": "intermediate_size",
    "vocabulary": "vocab_size",
}


class Linear(NamedTuple):
    """A matrix of every layer that is pruned, (rows, columns) as the file has it.

    Attributes:
      kind: its name within the layer, without ".weight".
      rows, columns: sizes by name, keys of `Architecture.sizes`.
      bias: has it a bias: always, never, or as this key of config.json says.
    """

    kind: str
    rows: str
    columns: str
    bias: bool | str = False

    def has_bias(self, config: Mapping) -> bool:
        """Has it a bias in the model of this config.json?"""
        return bool(config.get(self.bias)) if isinstance(self.bias, str) else self.bias


class Norm(NamedTuple):
    """A vector of every layer that is not pruned.

    Attributes:
      kind: its name within the layer, without ".weight".
      size: of the vector, a key of `Architecture.sizes`.
    """

    kind: str
    size: str = "hidden"


@dataclass(frozen=True)
class Architecture:
    """A row of the table.

    Attributes:
      classes: what config.json lists under "architectures".
      model_type: what config.json says where it lists none.
      linears: of every layer, in the order of the tables of a merge.
      norms: of every layer.
      layer: the prefix of a layer's tensors, with {} for its number.
      embeddings, final_norms, heads: tensors outside the layers, without ".weight"; heads only where they are not tied.
      defaults: keys of config.json that, left out, do not mean what they mean in most families.
      forward: has it a forward pass in JAX (evaluation in this process, AdaMerging, fine-tuning, activation norms)?
    """

    classes: tuple[str, ...]
    model_type: str
    linears: tuple[Linear, ...]
    norms: tuple[Norm, ...] = (Norm("input_layernorm"), Norm("post_attention_layernorm"))
    layer: str = "model.layers.{}."
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    final_norms: tuple[str, ...] = ("model.norm",)
    heads: tuple[str, ...] = ("lm_head",)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    forward: bool = False

    @property
    def required(self) -> tuple[str, ...]:
        """Keys of config.json without which the shapes are not known."""
        return (*SIZES.values(), "num_attention_heads", "num_hidden_layers")

    def said(self, config: Mapping) -> dict[str, Any]:
        """What a config.json says, with the family's own defaults for what it leaves out."""
        return {**self.defaults, **config}

    def sizes(self, config: Mapping) -> dict[str, int]:
        """The sizes that shapes are made of, by the names that rows use."""
        said = self.said(config)
        heads = said["num_attention_heads"]
        head = said.get("head_dim") or said["hidden_size"] // heads
        keys = said.get("num_key_value_heads") or heads
        named = {name: said[key] for name, key in SIZES.items()}
        return named | {"queries": heads * head, "keys": keys * head, "head": head}


LLAMA = Architecture(
    classes=("LlamaForCausalLM",),
    model_type="llama",
    linears=(  # in the order of the DPPA authors' tables
        Linear("self_attn.q_proj", "queries", "hidden", "attention_bias"),
        Linear("self_attn.k_proj", "keys", "hidden", "attention_bias"),
        Linear("self_attn.v_proj", "keys", "hidden", "attention_bias"),
        Linear("self_attn.o_proj", "hidden", "queries", "attention_bias"),
        Linear("mlp.gate_proj", "inner", "hidden", "mlp_bias"),
        Linear("mlp.up_proj", "inner", "hidden", "mlp_bias"),
        Linear("mlp.down_proj", "hidden", "inner", "mlp_bias"),
    ),
    forward=True,
)


def with_bias(linears: tuple[Linear, ...], *biased: str) -> tuple[Linear, ...]:
    """The same linears, of which these always have a bias and the others never."""
    return tuple(linear._replace(bias=linear.kind in biased) for linear in linears)


HEAD_NORMS = (Norm("self_attn.q_norm", "head"), Norm("self_attn.k_norm", "head"))
PROJECTION_NORMS = (Norm("self_attn.q_norm", "queries"), Norm("self_attn.k_norm", "keys"))
QWEN = {
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
}
GEMMA2 = replace(
    LLAMA,
    classes=("Gemma2ForCausalLM",),
    model_type="gemma2",
    norms=(*LLAMA.norms, Norm("pre_feedforward_layernorm"), Norm("post_feedforward_layernorm")),
    defaults={
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": 8192,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
)
OLMO2 = replace(
    LLAMA,
    classes=("Olmo2ForCausalLM",),
    model_type="olmo2",
    norms=(Norm("post_attention_layernorm"), Norm("post_feedforward_layernorm"), *PROJECTION_NORMS),
    defaults={"rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": 50279},
)

ARCHITECTURES = {
    "Llama": LLAMA,
    "Mistral": replace(
        LLAMA,
        classes=("MistralForCausalLM",),
        model_type="mistral",
        linears=with_bias(LLAMA.linears),
        defaults={"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    ),
    "Qwen2": replace(
        LLAMA,
        classes=("Qwen2ForCausalLM",),
        model_type="qwen2",
        linears=with_bias(LLAMA.linears, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        defaults=QWEN,
    ),
    "Qwen3": replace(
        LLAMA,
        classes=("Qwen3ForCausalLM",),
        model_type="qwen3",
        norms=(*LLAMA.norms, *HEAD_NORMS),
        defaults={**QWEN, "head_dim": 128},
    ),
    "Gemma2": GEMMA2,
    "Gemma3": replace(
        GEMMA2,
        classes=("Gemma3ForCausalLM",),
        model_type="gemma3_text",
        norms=(*GEMMA2.norms, *HEAD_NORMS),
        defaults={
            **GEMMA2.defaults,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "max_position_embeddings": 131072,
        },
    ),
    "OLMo2": OLMO2,
    "OLMo3": replace(
        OLMO2,
        classes=("Olmo3ForCausalLM",),
        model_type="olmo3",
        defaults={**OLMO2.defaults, "rope_theta": 5e5, "rope_local_base_freq": 5e5, "sliding_window": 4096},
    ),
    "SmolLM3": replace(
        LLAMA,
        classes=("SmolLM3ForCausalLM",),
        model_type="smollm3",
        defaults={
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "rope_theta": 2e6,
            "use_sliding_window": False,
            "max_position_embeddings": 32768,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
    ),
    "Granite": replace(LLAMA, classes=("GraniteForCausalLM",), model_type="granite"),
}


def architecture_of(config: Mapping) -> Architecture:
    """Return the row of a config.json.

    Raises:
      ValueError: no row has this architecture; names those that there are.
    """
    listed = config.get("architectures")
    listed = listed if isinstance(listed, list) else None
    named = listed[0] if listed else config.get("model_type", "unknown")
    for row in ARCHITECTURES.values():
        if named in (row.classes if listed else (row.model_type,)):
            return row
    supported = ", ".join(name for row in ARCHITECTURES.values() for name in row.classes)
    raise ValueError(f"architecture {named!r:.99} is not supported; supported: {supported}.")
