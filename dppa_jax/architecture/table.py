"""The table of architectures: one row for each family of models.

A row says what the tensors are called, which of them are linears, and which sizes of config.json make their shapes.
That is all a merge needs. To add a family, write a row and a row in the tests' table.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from dppa_jax.architecture.row import WRAPPED, Architecture, Fused, Linear, Norm, Other, Role, wrapped

IGNORED = re.compile(  # buffers that older exports carry, and no loader reads
    r".*rotary_emb\.inv_freq$|.*gpt_neox\.layers\.\d+\.attention\.(masked_)?bias$|.*embeddings\.position_ids$"
)

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
    vllm=True,
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
        "sliding_window_pattern": 2,
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
EXPERTS = ("num_local_experts", "num_experts")  # keys of config.json
FUSED_EXPERTS = (  # transformers 5 can write those of a layer as one array (experts, rows, columns)
    Fused("mlp.experts.gate_up_proj", ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"), always=False),
    Fused("mlp.experts.down_proj", ("mlp.experts.{}.down_proj",), always=False),
)


def _qwen3_sparse(said: Mapping, layer: int) -> bool:
    """Is the MLP of a layer a mixture of experts?"""
    return layer not in (said["mlp_only_layers"] or ()) and (layer + 1) % said["decoder_sparse_step"] == 0


TASKS = (  # in the names of classes of encoders
    *("MaskedLM", "PreTraining", "SequenceClassification", "TokenClassification", "MultipleChoice"),
    *("QuestionAnswering", "NextSentencePrediction", "CausalLM"),
)


def encoder(family: str, name: str, **more: bool) -> Architecture:
    """The row of BERT and what is built like it; models differ in their heads, which belong to their tasks.

    Args:
      family: the first part of the names of its classes.
      name: what the names of its tensors begin with, and its model_type.
      more: further fields of the row.
    """
    root = f"{name}.embeddings."
    return Architecture(
        classes=(f"{family}Model", *(f"{family}For{task}" for task in TASKS)),
        model_type=name,
        linears=(
            Linear("attention.self.query", "queries", "hidden", True),
            Linear("attention.self.key", "queries", "hidden", True),
            Linear("attention.self.value", "queries", "hidden", True),
            Linear("attention.output.dense", "hidden", "queries", True),
            Linear("intermediate.dense", "inner", "hidden", True),
            Linear("output.dense", "hidden", "inner", True),
        ),
        norms=(Norm("attention.output.LayerNorm", bias=True), Norm("output.LayerNorm", bias=True)),
        root=f"{name}.",
        layer=f"{name}.encoder.layer.{{}}.",
        embeddings=(f"{root}word_embeddings",),
        heads=(),
        outside=(
            Other(f"{root}position_embeddings.weight", ("positions", "hidden"), Role.DENSE),
            Other(f"{root}token_type_embeddings.weight", ("types", "hidden"), Role.DENSE),
            Other(f"{root}LayerNorm.weight", ("hidden",), Role.NORM),
            Other(f"{root}LayerNorm.bias", ("hidden",), Role.BIAS),
        ),
        final_norms=(),
        own_heads=True,
        keys={"positions": ("max_position_embeddings",), "types": ("type_vocab_size",)},
        defaults={"hidden_act": "gelu", "type_vocab_size": 2, "max_position_embeddings": 512},
        forward=True,
        **more,
    )


MISTRAL = replace(
    LLAMA,
    classes=("MistralForCausalLM",),
    model_type="mistral",
    linears=with_bias(LLAMA.linears),
    defaults={"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072},
)

ARCHITECTURES = {
    "Llama": LLAMA,
    "Mistral": MISTRAL,
    "Ministral": replace(MISTRAL, classes=("MinistralForCausalLM",), model_type="ministral"),
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
            "sliding_window_pattern": 6,
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
        defaults={
            **OLMO2.defaults,
            "rope_theta": 5e5,
            "rope_local_base_freq": 5e5,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
        },
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
            "no_rope_layer_interval": 4,
            "max_position_embeddings": 32768,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
    ),
    "Granite": replace(LLAMA, classes=("GraniteForCausalLM",), model_type="granite"),
    "Phi3": replace(
        LLAMA,
        classes=("Phi3ForCausalLM",),
        model_type="phi3",
        linears=with_bias(LLAMA.linears),
        fused=(
            Fused("self_attn.qkv_proj.weight", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            Fused("mlp.gate_up_proj.weight", ("mlp.gate_proj", "mlp.up_proj")),
        ),
        defaults={
            "rms_norm_eps": 1e-5,
            "original_max_position_embeddings": 4096,
            "max_position_embeddings": 4096,
            "eos_token_id": 32000,
        },
    ),
    "Mixtral": replace(
        LLAMA,
        classes=("MixtralForCausalLM",),
        model_type="mixtral",
        linears=(
            *with_bias(LLAMA.linears[:4]),
            Linear("mlp.gate", "experts", "hidden", stored="block_sparse_moe.gate", role=Role.ROUTER),
            Linear("mlp.experts.{}.gate_proj", "inner", "hidden", stored="block_sparse_moe.experts.{}.w1"),
            Linear("mlp.experts.{}.up_proj", "inner", "hidden", stored="block_sparse_moe.experts.{}.w3"),
            Linear("mlp.experts.{}.down_proj", "hidden", "inner", stored="block_sparse_moe.experts.{}.w2"),
        ),
        fused=FUSED_EXPERTS,
        keys={"experts": EXPERTS},
        defaults={
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "max_position_embeddings": 131072,
        },
    ),
    "Qwen3-MoE": replace(
        LLAMA,
        classes=("Qwen3MoeForCausalLM",),
        model_type="qwen3_moe",
        linears=(
            *LLAMA.linears[:4],
            *(linear._replace(bias=False, mlp="dense") for linear in LLAMA.linears[4:]),
            Linear("mlp.gate", "experts", "hidden", mlp="sparse", role=Role.ROUTER),
            Linear("mlp.experts.{}.gate_proj", "expert_inner", "hidden", mlp="sparse"),
            Linear("mlp.experts.{}.up_proj", "expert_inner", "hidden", mlp="sparse"),
            Linear("mlp.experts.{}.down_proj", "hidden", "expert_inner", mlp="sparse"),
        ),
        norms=(*LLAMA.norms, *HEAD_NORMS),
        fused=FUSED_EXPERTS,
        keys={"experts": EXPERTS, "expert_inner": ("moe_intermediate_size",)},
        sparse=_qwen3_sparse,
        defaults={
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "use_sliding_window": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": False,
            "max_position_embeddings": 32768,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    ),
    "Ministral3": replace(
        MISTRAL,
        classes=("Ministral3ForCausalLM",),
        model_type="ministral3",
        defaults={"num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5, "max_position_embeddings": 262144},
        forward=False,
        vllm=False,
    ),
    "GLM-4": replace(
        LLAMA,
        classes=("Glm4ForCausalLM",),
        model_type="glm4",
        linears=(*LLAMA.linears[:3], *with_bias(LLAMA.linears[3:])),
        norms=(*LLAMA.norms, Norm("post_self_attn_layernorm"), Norm("post_mlp_layernorm")),
        fused=(Fused("mlp.gate_up_proj.weight", ("mlp.gate_proj", "mlp.up_proj")),),
        defaults={"attention_bias": True, "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-7},
        forward=False,
        vllm=False,
    ),
    "GPT-NeoX": Architecture(
        classes=("GPTNeoXForCausalLM",),
        model_type="gpt_neox",
        linears=(
            Linear("attention.query", "queries", "hidden"),
            Linear("attention.key", "queries", "hidden"),
            Linear("attention.value", "queries", "hidden"),
            Linear("attention.dense", "hidden", "queries", "attention_bias"),
            Linear("mlp.dense_h_to_4h", "inner", "hidden", True),
            Linear("mlp.dense_4h_to_h", "hidden", "inner", True),
        ),
        norms=(Norm("input_layernorm", bias=True), Norm("post_attention_layernorm", bias=True)),
        fused=(
            Fused(
                "attention.query_key_value.weight",
                ("attention.query", "attention.key", "attention.value"),
                alternate="num_attention_heads",
            ),
        ),
        others=(Other("attention.query_key_value.bias", ("three queries",), Role.BIAS, "attention_bias"),),
        root="gpt_neox.",
        layer="gpt_neox.layers.{}.",
        embeddings=("gpt_neox.embed_in",),
        heads=("embed_out",),
        final_norms=(Norm("gpt_neox.final_layer_norm", bias=True),),
        defaults={"hidden_act": "gelu", "attention_bias": True, "rotary_pct": 0.25, "use_parallel_residual": True},
    ),
    "BERT": encoder("Bert", "bert", pooled=True),
    "RoBERTa": encoder("Roberta", "roberta", skips_padding=True),
}


def support_matrix() -> list[str]:
    """Return the lines of a Markdown table of what works for which rows."""
    groups: dict[tuple[bool, ...], list[str]] = {}
    for name, row in ARCHITECTURES.items():
        groups.setdefault((True, row.forward, row.adamerging, row.vllm), []).append(name)
    lines = [
        "| architecture | merge | evaluate in JAX, fine-tune | AdaMerging | vLLM checked |",
        "|---|---|---|---|---|",
    ]
    for able, names in groups.items():
        lines.append(f"| {', '.join(names)} | {' | '.join('yes' if can else 'no' for can in able)} |")
    return lines


def known(config: Mapping) -> Architecture | None:
    """Return the row of a config.json, or None where no row has this architecture.

    A model of images and text has the row of its text model.
    """
    listed = config.get("architectures")
    listed = listed if isinstance(listed, list) else None
    named = listed[0] if listed else config.get("model_type")
    by_class = {name: row for row in ARCHITECTURES.values() for name in (row.classes if listed else (row.model_type,))}
    if isinstance(named, str) and named in by_class:
        return by_class[named]
    model_type = wrapped(config).get("model_type")
    return next((row for row in ARCHITECTURES.values() if row.model_type == model_type), None)


def vocabulary_size(config: Mapping) -> int | None:
    """How many tokens a config.json says there are; None where it does not."""
    row = known(config)
    said = row.said(config) if row else {**config, **wrapped(config)}
    return said["vocab_size"] if type(said.get("vocab_size")) is int else None


def grown(config: Mapping, size: int) -> dict:
    """Return the content of config.json with another number of rows, in its text_config as well."""
    found = {**config, "vocab_size": size} if "vocab_size" in config else dict(config)
    if "vocab_size" in (inner := wrapped(config)):
        found[WRAPPED] = {**inner, "vocab_size": size}
    return found


def architecture_of(config: Mapping) -> Architecture:
    """Return the row of a config.json.

    Raises:
      ValueError: no row has this architecture; names those that there are.
    """
    if row := known(config):
        return row
    listed = config.get("architectures")
    named = listed[0] if isinstance(listed, list) and listed else config.get("model_type", "unknown")
    supported = ", ".join(row.classes[0] for row in ARCHITECTURES.values())
    raise ValueError(f"architecture {named!r:.99} is not supported; supported: {supported}.")
