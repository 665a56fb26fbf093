"""What families of models compute beyond what the table of architectures says of their tensors: a row for each.

A row is a tuple of traits. A trait is a function that reads a config.json, with the family's defaults filled in, and
returns fields of a `DecoderConfig`.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import msgspec

from dppa_jax.model.rope import Rope
from dppa_jax.runtime.reading import convert

Count = Annotated[int, msgspec.Meta(gt=0, lt=2**31)]
Factor = Annotated[float, msgspec.Meta(gt=0)]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]


class Said(msgspec.Struct, frozen=True):
    """What families read of a config.json: types, and defaults where the table of architectures has none."""

    num_hidden_layers: Count
    max_position_embeddings: Count = 2048
    rope_theta: Factor = 10000.0
    rope_local_base_freq: Factor = 10000.0
    rope_scaling: dict[str, Any] = {}
    rope_parameters: dict[str, Any] = {}
    original_max_position_embeddings: Count | None = None
    partial_rotary_factor: Share = 1.0
    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: Count = 1
    layer_types: list[str] | None = None
    sliding_window: Count | None = None
    use_sliding_window: bool = True
    sliding_window_pattern: Count = 1
    max_window_layers: int = 28
    hidden_activation: str = "gelu_pytorch_tanh"
    query_pre_attn_scalar: Factor = 256.0
    attn_logit_softcapping: Factor | None = None
    final_logit_softcapping: Factor | None = None
    use_bidirectional_attention: bool = False
    embedding_multiplier: Factor = 1.0
    residual_multiplier: Factor = 1.0
    attention_multiplier: Factor = 1.0
    logits_scaling: Factor = 1.0
    num_local_experts: Count | None = None
    num_experts: Count | None = None
    num_experts_per_tok: Count | None = None
    moe_intermediate_size: Count = 768
    norm_topk_prob: bool = False
    mlp_only_layers: list[int] = []
    decoder_sparse_step: int = 1


Fields = dict[str, Any]
Trait = Callable[[Said], Fields]


def rope_of(said: Said) -> Rope:
    """Read how layers rotate queries and keys, those without a window where the two kinds differ."""
    rope, original = said.rope_scaling or said.rope_parameters, said.original_max_position_embeddings
    if "full_attention" in rope or "sliding_attention" in rope:
        rope, original = rope.get("full_attention") or {}, None
    return Rope.from_hf(rope, said.rope_theta, said.max_position_embeddings, original)


def layer_types(said: Said, default: Callable[[int], bool]) -> tuple[bool, ...]:
    """Return which layers have a window: as `layer_types` says, or else by a function of the layer's number.

    Raises:
      ValueError: a layer is of another type, or layers and types are not equally many.
    """
    layers, types = said.num_hidden_layers, said.layer_types
    if types is None:
        return tuple(default(layer) for layer in range(layers))
    if other := sorted(set(types) - {"full_attention", "sliding_attention"}):
        raise ValueError(f"config.json has layer_types {other[0]!r:.99}, which the model does not compute.")
    if len(types) != layers:
        raise ValueError(f"config.json has {len(types)} layer_types for {layers} layers; download it again.")
    return tuple(kind == "sliding_attention" for kind in types)


def window(said: Said, windowed: tuple[bool, ...] = ()) -> Fields:
    """These layers have a window, by default all; none where it is null or not used."""
    if said.sliding_window is None or not said.use_sliding_window:
        return {}
    return {"sliding_window": said.sliding_window, "windowed_layers": windowed}


def typed_windows(said: Said) -> Fields:
    """Layers have a window as layer_types says, by default all."""
    return window(said, layer_types(said, lambda layer: True))


def late_windows(said: Said) -> Fields:
    """Layers from max_window_layers on have a window, if use_sliding_window says so."""
    return window(said, layer_types(said, lambda layer: layer >= said.max_window_layers))


def full_every_so_often(said: Said) -> Fields:
    """Every layer has a window but the last one of each sliding_window_pattern."""
    each = said.sliding_window_pattern
    return window(said, layer_types(said, lambda layer: (layer + 1) % each > 0))


def full_with_own_rope(said: Said) -> Fields:
    """Layers have windows as in `full_every_so_often`, and those with one rotate by a table of their own."""
    fields = full_every_so_often(said)
    windowed = layer_types(said, lambda layer: (layer + 1) % said.sliding_window_pattern > 0)
    return fields | {"ropes": two_ropes(said), "rope_of_layer": tuple(map(int, windowed))}


def two_ropes(said: Said) -> tuple[Rope, Rope]:
    """Return how layers without a window rotate, and how those with one do."""
    local = said.rope_parameters.get("sliding_attention") or {}
    return rope_of(said), Rope.from_hf(local, said.rope_local_base_freq, said.max_position_embeddings)


def some_ropes(said: Said) -> Fields:
    """Some layers rotate nothing: every no_rope_layer_interval-th, or those that are 0 in no_rope_layers.

    These have a window, if there is one.
    """
    layers, rotated = said.num_hidden_layers, said.no_rope_layers
    if rotated is None:
        rotated = [(layer + 1) % said.no_rope_layer_interval for layer in range(layers)]
    if len(rotated) < layers:
        raise ValueError(f"config.json has {len(rotated)} no_rope_layers for {layers} layers; download it again.")
    tables = tuple(int(not rotated[layer]) for layer in range(layers))
    ropes = {"ropes": (rope_of(said), None), "rope_of_layer": tables}
    return window(said, layer_types(said, lambda layer: not rotated[layer])) | ropes


def partial_rope(said: Said) -> Fields:
    """Only the first elements of each head are rotated."""
    share = (said.rope_scaling or said.rope_parameters).get("partial_rotary_factor", said.partial_rotary_factor)
    return {"partial_rotary_factor": convert(share, "config.json: partial_rotary_factor", Share)}


def gemma(said: Said) -> Fields:
    """Norms multiply by 1 + weight, embeddings are multiplied by √hidden_size, and logits may be capped."""
    if said.use_bidirectional_attention:
        raise ValueError("config.json has use_bidirectional_attention; the model sees earlier tokens only.")
    return {
        "activation": said.hidden_activation,
        "attention_scale": said.query_pre_attn_scalar**-0.5,
        "logit_cap": said.final_logit_softcapping,
        "unit_norms": True,
        "scaled_embeddings": True,
    }


def attention_cap(said: Said) -> Fields:
    """Attention scores are capped. (Gemma3's config.json has the key, too, and its models do not read it.)"""
    return {"attention_cap": said.attn_logit_softcapping}


def multipliers(said: Said) -> Fields:
    """Embeddings, residual branches, attention scores and logits have factors of their own."""
    return {
        "embedding_multiplier": said.embedding_multiplier,
        "residual_multiplier": said.residual_multiplier,
        "attention_scale": said.attention_multiplier,
        "logits_scaling": said.logits_scaling,
    }


def mixtral_experts(said: Said) -> Fields:
    """A router picks a few of many MLPs for each token, and their shares add up to 1."""
    return experts(said.num_local_experts or said.num_experts or 8, said.num_experts_per_tok or 2, True)


def qwen_experts(said: Said) -> Fields:
    """A router picks a few of many MLPs, of another width than a dense one."""
    if said.mlp_only_layers or said.decoder_sparse_step != 1:
        raise ValueError(
            "config.json: mlp_only_layers or decoder_sparse_step makes some layers dense, and the forward pass here "
            "computes all layers alike. Such a model can be merged, and evaluated with --evaluator=vllm."
        )
    count, picked = said.num_experts or said.num_local_experts or 128, said.num_experts_per_tok or 8
    return {"intermediate_size": said.moe_intermediate_size, **experts(count, picked, said.norm_topk_prob)}


def experts(count: int, picked: int, normed: bool) -> Fields:
    """Return the fields of a mixture of `count` MLPs, of which each token takes `picked`."""
    if picked > count:
        raise ValueError(f"config.json: num_experts_per_tok {picked} is more than the {count} experts; correct it.")
    return {"num_experts": count, "num_experts_per_tok": picked, "norm_topk_prob": normed}


FAMILIES: dict[str, tuple[Trait, ...]] = {  # by model_type
    "llama": (),
    "mistral": (window,),
    "ministral": (typed_windows,),
    "qwen2": (late_windows,),
    "qwen3": (late_windows,),
    "gemma2": (gemma, attention_cap, full_every_so_often),
    "gemma3_text": (gemma, full_with_own_rope),
    "olmo2": (),
    "olmo3": (full_with_own_rope,),
    "smollm3": (some_ropes,),
    "granite": (multipliers,),
    "phi3": (window, partial_rope),
    "mixtral": (window, mixtral_experts),
    "qwen3_moe": (window, qwen_experts),
}


def fields_of(model_type: str, config: Mapping) -> Fields:
    """Return the fields of a `DecoderConfig` in which a model differs from LLaMA, apart from sizes and tensors.

    Args:
      model_type: of the family.
      config: what config.json says, with the family's defaults.

    Raises:
      ValueError: the family has no row, or its config.json asks for what is not computed.
    """
    if model_type not in FAMILIES:
        raise ValueError(
            f"config.json: {model_type!r} has no forward pass here, as {', '.join(FAMILIES)} have: such a model can be "
            f"merged, and evaluated with --evaluator=vllm."
        )
    said = convert(config, "config.json", Said, "Correct it, or download it again.")
    fields: Fields = {"ropes": (rope_of(said),)}
    for trait in FAMILIES[model_type]:
        fields |= trait(said)
    return fields
