"""What families of models compute beyond what the table of architectures says of their tensors: a row for each.

A row is a tuple of traits. A trait is a function that reads a config.json, with the family's defaults filled in, and
returns fields of a `DecoderConfig`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from dppa_jax.model.rope import Rope

Fields = dict[str, Any]
Trait = Callable[[Mapping], Fields]


def rope_of(said: Mapping) -> Rope:
    """Read how layers rotate queries and keys, those without a window where the two kinds differ."""
    rope = said.get("rope_scaling") or said.get("rope_parameters") or {}  # transformers 5's own precedence
    nested = "full_attention" in rope or "sliding_attention" in rope
    rope = (rope.get("full_attention") or {}) if nested else rope
    length = said.get("max_position_embeddings", 2048)
    original = None if nested else said.get("original_max_position_embeddings")
    return Rope.from_hf(rope, said.get("rope_theta", 10000.0), length, original)


def layer_types(said: Mapping, default: Callable[[int], bool]) -> tuple[bool, ...]:
    """Return which layers have a window: as `layer_types` says, or else by a function of the layer's number.

    Raises:
      ValueError: a layer is of another type, or layers and types are not equally many.
    """
    layers, types = said["num_hidden_layers"], said.get("layer_types")
    if types is None:
        return tuple(default(layer) for layer in range(layers))
    if other := sorted({str(kind) for kind in types} - {"full_attention", "sliding_attention"}):
        raise ValueError(f"config.json has layer_types {other[0]!r}, which the model does not compute.")
    if len(types) != layers:
        raise ValueError(f"config.json has {len(types)} layer_types for {layers} layers; download it again.")
    return tuple(kind == "sliding_attention" for kind in types)


def window(said: Mapping, windowed: tuple[bool, ...] = ()) -> Fields:
    """These layers have a window, by default all; none where it is null or not used."""
    if said.get("sliding_window") is None or not said.get("use_sliding_window", True):
        return {}
    return {"sliding_window": said["sliding_window"], "windowed_layers": windowed}


def late_windows(said: Mapping) -> Fields:
    """Layers from max_window_layers on have a window, if use_sliding_window says so."""
    first = said.get("max_window_layers", 28)
    return window(said, layer_types(said, lambda layer: layer >= first))


def full_every(interval: int, own_rope: bool = False) -> Trait:
    """Every layer has a window but each one after `interval` − 1 others; config.json may say another interval.

    Args:
      interval: the family's own.
      own_rope: do layers with a window rotate by a table of their own?
    """

    def trait(said: Mapping) -> Fields:
        each = said.get("sliding_window_pattern", interval)
        windowed = layer_types(said, lambda layer: (layer + 1) % each > 0)
        ropes = {"ropes": two_ropes(said), "rope_of_layer": tuple(map(int, windowed))} if own_rope else {}
        return window(said, windowed) | ropes

    return trait


def two_ropes(said: Mapping) -> tuple[Rope, Rope]:
    """Return how layers without a window rotate, and how those with one do."""
    local = (said.get("rope_parameters") or {}).get("sliding_attention") or {}
    theta, length = said.get("rope_local_base_freq", 10000.0), said.get("max_position_embeddings", 2048)
    return rope_of(said), Rope.from_hf(local, theta, length)


def some_ropes(said: Mapping) -> Fields:
    """Some layers rotate nothing: every no_rope_layer_interval-th, or those that are 0 in no_rope_layers."""
    layers, interval = said["num_hidden_layers"], said.get("no_rope_layer_interval", 4)
    rotated = said.get("no_rope_layers") or [(layer + 1) % interval for layer in range(layers)]
    if len(rotated) < layers:
        raise ValueError(f"config.json has {len(rotated)} no_rope_layers for {layers} layers; download it again.")
    windows = layer_types(said, lambda layer: bool(said.get("use_sliding_window")) and not rotated[layer])
    tables = tuple(int(not rotated[layer]) for layer in range(layers))
    ropes = {"ropes": (rope_of(said), None), "rope_of_layer": tables}
    return window(said, windows) | ropes


def partial_rope(said: Mapping) -> Fields:
    """Only the first elements of each head are rotated."""
    rope = said.get("rope_scaling") or said.get("rope_parameters") or {}
    return {"partial_rotary_factor": rope.get("partial_rotary_factor", said.get("partial_rotary_factor", 1.0))}


def gemma(said: Mapping) -> Fields:
    """Norms multiply by 1 + weight, embeddings are multiplied by √hidden_size, and logits may be capped."""
    if said.get("use_bidirectional_attention"):
        raise ValueError("config.json has use_bidirectional_attention; the model sees earlier tokens only.")
    return {
        "activation": said["hidden_activation"],
        "attention_scale": said["query_pre_attn_scalar"] ** -0.5,
        "logit_cap": said["final_logit_softcapping"],
        "unit_norms": True,
        "scaled_embeddings": True,
    }


def attention_cap(said: Mapping) -> Fields:
    """Attention scores are capped."""
    return {"attention_cap": said["attn_logit_softcapping"]}


def multipliers(said: Mapping) -> Fields:
    """Embeddings, residual branches, attention scores and logits have factors of their own."""
    return {
        "embedding_multiplier": said.get("embedding_multiplier", 1.0),
        "residual_multiplier": said.get("residual_multiplier", 1.0),
        "attention_scale": said.get("attention_multiplier", 1.0),
        "logits_scaling": said.get("logits_scaling", 1.0),
    }


def mixtral_experts(said: Mapping) -> Fields:
    """A router picks a few of many MLPs for each token, and their shares add up to 1."""
    return {
        "num_experts": said.get("num_local_experts", said.get("num_experts", 8)),
        "num_experts_per_tok": said.get("num_experts_per_tok", 2),
        "norm_topk_prob": True,
    }


def qwen_experts(said: Mapping) -> Fields:
    """A router picks a few of many MLPs, of another width than a dense one."""
    if said.get("mlp_only_layers") or said.get("decoder_sparse_step", 1) != 1:
        raise ValueError(
            "config.json: mlp_only_layers or decoder_sparse_step makes some layers dense, and the model computes all "
            "layers alike. Such a model can be merged, and evaluated with --evaluator=vllm."
        )
    return {
        "intermediate_size": said.get("moe_intermediate_size", 768),
        "num_experts": said.get("num_experts", said.get("num_local_experts", 128)),
        "num_experts_per_tok": said.get("num_experts_per_tok", 8),
        "norm_topk_prob": said.get("norm_topk_prob", False),
    }


FAMILIES: dict[str, tuple[Trait, ...]] = {  # by model_type
    "llama": (),
    "mistral": (window,),
    "qwen2": (late_windows,),
    "qwen3": (late_windows,),
    "gemma2": (gemma, attention_cap, full_every(2)),
    "gemma3_text": (gemma, full_every(6, own_rope=True)),
    "olmo2": (),
    "olmo3": (full_every(4, own_rope=True),),
    "smollm3": (some_ropes,),
    "granite": (multipliers,),
    "phi3": (window, partial_rope),
    "mixtral": (window, mixtral_experts),
    "qwen3_moe": (window, qwen_experts),
}


def fields_of(model_type: str, said: Mapping) -> Fields:
    """Return the fields of a `DecoderConfig` in which a model differs from LLaMA, apart from sizes and tensors.

    Raises:
      ValueError: the family has no row, or its config.json asks for what is not computed.
    """
    if model_type not in FAMILIES:
        raise ValueError(
            f"config.json: {model_type!r} has no forward pass here, as {', '.join(FAMILIES)} have: such a model can be "
            f"merged, and evaluated with --evaluator=vllm."
        )
    fields: Fields = {"ropes": (rope_of(said),)}
    for trait in FAMILIES[model_type]:
        fields |= trait(said)
    return fields
