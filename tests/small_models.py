"""Small random models of every family, as transformers itself makes and saves them, and what their files hold."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
QWEN3_MOE = {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "head_dim": 16}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
FAMILIES = {  # the row, transformers' name of the config, what differs from SIZES; each row of the table at least once
    "Llama": ("llama", {}),
    "Llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "Mistral": ("mistral", {"head_dim": 16, "sliding_window": None}),
    "Ministral": ("ministral", {"head_dim": 16}),
    "Ministral3": ("ministral3", {"head_dim": 16}),
    "Qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "Qwen3": ("qwen3", {"head_dim": 16}),
    "Gemma2": ("gemma2", GEMMA),
    "Gemma3": ("gemma3_text", GEMMA),
    "Gemma3 with images": ("gemma3", {}),
    "OLMo2": ("olmo2", {}),
    "OLMo3": ("olmo3", {"sliding_window": 8}),
    "SmolLM3": ("smollm3", {}),
    "Granite": ("granite", {"embedding_multiplier": 2.0, "logits_scaling": 3.0}),
    "GLM-4": ("glm4", {"head_dim": 16}),
    "Phi3": ("phi3", {}),
    "Mixtral": ("mixtral", {"num_local_experts": 4}),
    "Mixtral in three axes": ("mixtral", {"num_local_experts": 4}),
    "Qwen3-MoE": ("qwen3_moe", QWEN3_MOE),
    "Qwen3-MoE in three axes": ("qwen3_moe", {**QWEN3_MOE, "mlp_only_layers": [1]}),
    "GPT-NeoX": ("gpt_neox", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    "BERT": ("bert", {"type_vocab_size": 2}),
    "RoBERTa": ("roberta", {"type_vocab_size": 2}),
}
ROWS = {name: name.split(" with ")[0].split(" in ")[0] for name in FAMILIES}
ENCODERS = ("BERT", "RoBERTa")
FACTORS = (1.5, 1.2)
HEADS = SIZES["num_attention_heads"]
QUERIES, KEYS = "queries", "keys"


def model_of(family: str, seed: int) -> torch.nn.Module:
    """A model of random weights, biases and norms included."""
    model_type, more = FAMILIES[family]
    if family == "Gemma3 with images":
        text = {**SIZES, **GEMMA}
        config = transformers.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
    else:
        config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **more})
    torch.manual_seed(seed)
    if family in ENCODERS:
        model = transformers.AutoModelForMaskedLM.from_config(config)
    elif family == "Gemma3 with images":
        model = transformers.Gemma3ForConditionalGeneration(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def tune(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Add a delta of a tenth of the weights' size, of which some elements and layers have more than others."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "vision" not in name and "multi_modal" not in name:
            scale = 0.01 * (1 + len(name) % 5)
            parameter.data += scale * torch.randn_like(parameter) * torch.randn_like(parameter).abs()
    model.tie_weights()
    return model


def save(family: str, model: torch.nn.Module, directory: Path, **options) -> None:
    """Save as transformers does; of a model in three axes as it is in memory."""
    model.save_pretrained(directory, save_original_format=not family.endswith("three axes"), **options)


def tensors(directory: Path) -> dict[str, np.ndarray]:
    """The tensors of a directory's files, by the names there."""
    return {name: array for file in directory.glob("*.safetensors") for name, array in load_file(file).items()}


def load(family: str, directory: Path) -> torch.nn.Module:
    """The model of a directory, as transformers loads it."""
    if family in ENCODERS:
        return transformers.AutoModelForMaskedLM.from_pretrained(directory).eval()
    if family == "Gemma3 with images":
        return transformers.Gemma3ForConditionalGeneration.from_pretrained(directory).eval()
    return transformers.AutoModelForCausalLM.from_pretrained(directory).eval()


def linears_of(name: str, array: np.ndarray, config: Mapping) -> list[np.ndarray]:
    """The rows of the linears that a tensor of a file holds; none where it is not pruned. Written out by hand."""
    if array.ndim < 2 or not re.search(r"layers?\.\d+\.", name) or "vision" in name:
        return []
    if re.search(r"(mlp|block_sparse_moe)\.gate\.weight$", name):
        return []
    rows = np.arange(array[..., 0].size)
    if array.ndim == 3:
        each = rows.reshape(array.shape[:2])
        return [half for of_expert in each for half in (np.split(of_expert, 2) if "gate_up" in name else [of_expert])]
    if "gate_up_proj" in name:
        return np.split(rows, 2)
    if "qkv_proj" in name:
        head = config["hidden_size"] // HEADS
        return np.split(rows, [HEADS * head, (HEADS + config["num_key_value_heads"]) * head])
    if "query_key_value" in name:
        of_head = rows.reshape(HEADS, 3, -1)
        return [of_head[:, part].reshape(-1) for part in range(3)]
    return [rows]


def layer_of(name: str) -> int:
    """The number of the layer of a tensor."""
    return int(re.search(r"layers?\.(\d+)\.", name)[1])
