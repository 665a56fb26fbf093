"""Small random models of every family with a forward pass, as transformers makes them, and their stacked trees."""

import copy

import jax
import numpy as np
import torch
import transformers

from dppa_jax.model import DecoderConfig

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
WINDOW = 6
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": WINDOW}
MODELS = {  # model_type, and what differs from SIZES; every row with a forward pass at least once
    "Llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "Mistral": ("mistral", {"sliding_window": WINDOW, "head_dim": 16}),
    "Ministral": (
        "ministral",
        {"head_dim": 16, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "Qwen2": ("qwen2", {}),
    "Qwen2 with windows": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}),
    "Qwen3": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "Gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0}),
    "Gemma3": ("gemma3_text", GEMMA | {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}),
    "OLMo2": ("olmo2", {}),
    "OLMo3": ("olmo3", {"sliding_window": WINDOW}),
    "SmolLM3": ("smollm3", {"use_sliding_window": True, "sliding_window": WINDOW, "no_rope_layers": [1, 0, 0, 1]}),
    "Granite": (
        "granite",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2, "logits_scaling": 3.0},
    ),
    "Phi3": ("phi3", {"partial_rotary_factor": 0.5, "sliding_window": WINDOW}),
    "Mixtral": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": WINDOW}),
    "Qwen3-MoE": ("qwen3_moe", {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 16}),
    "Qwen3-MoE, renormed": (
        "qwen3_moe",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "norm_topk_prob": True},
    ),
}


def torch_model(model_type, changes, seed=0):
    """Weights wide enough that attention is far from uniform: errors in positions, masks or biases move the logits."""
    config = transformers.AutoConfig.for_model(model_type, **copy.deepcopy(SIZES | changes))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for weight in model.parameters():
        weight.data = (
            weight.data + 0.3 * torch.randn_like(weight) if weight.ndim == 1 else 0.2 * torch.randn_like(weight)
        )
    return model


def ours(model):
    """Return the config and the tree of a model of transformers: layers stacked, what is fused split."""
    config, tree = DecoderConfig.from_hf(model.config.to_dict()), {}
    widths = np.cumsum([config.num_attention_heads, config.num_key_value_heads]) * config.head_dim
    for name, weight in model.state_dict().items():
        _, *path = name.removesuffix(".weight").replace(".bias", "_bias").split(".") if "." in name else ("", name)
        array = weight.numpy()
        if "qkv_proj" in path:
            parts = zip(("q_proj", "k_proj", "v_proj"), np.split(array, widths), strict=True)
        elif "gate_up_proj" in path:
            parts = zip(("gate_proj", "up_proj"), np.split(array, 2, axis=-2), strict=True)
        else:
            parts = [(path[-1] if path else "lm_head", array)]
        for leaf, part in parts:
            node = tree
            for parent in (part for part in path[:-1] if not part.isdigit()):
                node = node.setdefault(parent, {})
            node.setdefault(leaf, []).append(part)
    tree = {
        name: jax.tree.map(np.stack, part, is_leaf=lambda x: isinstance(x, list)) if name == "layers" else part[0]
        for name, part in tree.items()
    }
    return config, {name: part for name, part in tree.items() if name != "lm_head" or not config.tie_word_embeddings}
