"""Compare what config.json says of base and experts beyond shapes, as models of one shape can compute different things.

One thing can be said in several ways. A default is written out or left out, and transformers 4 and 5 spell rotary
embeddings differently. So both configs are brought into one form first.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from absl import logging

from dppa_jax.architecture.row import without_nulls, wrapped
from dppa_jax.architecture.specs import CheckpointError
from dppa_jax.architecture.table import known


class Setting(NamedTuple):
    """A key of config.json that says what the weights mean.

    Attributes:
      default: what a config.json without the key means; a row of the table of architectures may have its own.
      fixed: does no fine-tune change it? Models that differ in it are refused. Others may differ, with a warning.
    """

    default: Any = None
    fixed: bool = False


SETTINGS = {
    "hidden_act": Setting("silu", fixed=True),
    "hidden_activation": Setting(fixed=True),
    "num_attention_heads": Setting(fixed=True),
    "num_key_value_heads": Setting(fixed=True),
    "head_dim": Setting(fixed=True),
    "rms_norm_eps": Setting(1e-6),
    "query_pre_attn_scalar": Setting(fixed=True),
    "attn_logit_softcapping": Setting(),
    "final_logit_softcapping": Setting(),
    "embedding_multiplier": Setting(1.0),
    "attention_multiplier": Setting(1.0),
    "residual_multiplier": Setting(1.0),
    "logits_scaling": Setting(1.0),
    "rope_theta": Setting(10000.0),
    "rope_local_base_freq": Setting(),
    "rope_scaling": Setting(),
    "partial_rotary_factor": Setting(1.0),
    "sliding_window": Setting(),
    "layer_norm_eps": Setting(),
    "use_parallel_residual": Setting(fixed=True),
    "rotary_pct": Setting(),
    "num_experts_per_tok": Setting(),
    "norm_topk_prob": Setting(),
}
SCALED_FROM = ("llama3", "longrope", "yarn")  # rope types that depend on the context length of pre-training


def compare_configs(base: Mapping, expert: Mapping, name: str, quiet: bool = False) -> None:
    """Refuse an expert whose weights mean something else than the base's; warn where a fine-tune may differ.

    Args:
      base, expert: the contents of config.json.
      name: of the expert.
      quiet: no warning.

    Raises:
      CheckpointError: a setting differs that no fine-tune changes; names the key and both values.
    """
    ours, theirs = meaning(base), meaning(expert)
    different = [key for key in SETTINGS if not _same(ours[key], theirs[key])]
    said = ", ".join(f"{key} {theirs[key]!r} (the base {ours[key]!r})" for key in different)
    if any(SETTINGS[key].fixed for key in different):
        raise CheckpointError(
            f"expert {name!r}: its config.json says {said}; equal shapes then mean different things. Give the base "
            f"that it was fine-tuned from, or correct the config.json that does not belong to its weights."
        )
    if different and not quiet:
        logging.warning("expert %r: its config.json says %s; the merged model gets the base's", name, said)


def meaning(config: Mapping) -> dict[str, Any]:
    """Return every setting of a config.json, in one form: defaults filled in, the spellings of transformers 4.

    >>> four = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "rope_theta": 5e5}
    >>> five = {**four, "head_dim": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 500000}}
    >>> del five["rope_theta"]
    >>> meaning(four) == meaning(five)
    True
    """
    defaults = {key: setting.default for key, setting in SETTINGS.items()}
    row, said = known(config), without_nulls({**config, **wrapped(config)})
    given = {**defaults, **(row.defaults if row else {}), **said}
    heads = given["num_attention_heads"]
    found = {key: given[key] for key in SETTINGS} | _rope(given)
    if row:
        found["num_key_value_heads"] = given["num_key_value_heads"] or heads
        found["head_dim"] = given["head_dim"] or given["hidden_size"] // heads
    if not given.get("use_sliding_window", True):
        found["sliding_window"] = None
    if given["hidden_act"] == "swish":  # another name of it
        found["hidden_act"] = "silu"
    return found


def _same(one: Any, other: Any) -> bool:
    """Compare two values; some programs write a number as float32 has it: 9.999999747378752e-06 for 1e-05."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other


def _rope(config: Mapping) -> dict[str, Any]:
    """Return the settings of rotary embeddings, from the top level and from either of the two dictionaries.

    Where layers with and without a window have settings of their own, transformers 5 has a dictionary for either, and
    transformers 4 says the base of those with a window as rope_local_base_freq.
    """
    rope = config["rope_scaling"] or config.get("rope_parameters") or {}  # transformers' own precedence
    local = {}
    if isinstance(rope.get("full_attention"), Mapping):
        windowed = rope.get("sliding_attention") or {}
        local = {"rope_local_base_freq": windowed.get("rope_theta", config["rope_local_base_freq"])}
        rope = rope["full_attention"]
    scaling = {key: value for key, value in rope.items() if value is not None}
    scaling.setdefault("rope_type", scaling.pop("type", "default"))
    found = {key: scaling.pop(key, config[key]) for key in ("rope_theta", "partial_rotary_factor")}
    if scaling["rope_type"] in SCALED_FROM:
        original = config.get("original_max_position_embeddings") or config.get("max_position_embeddings")
        scaling.setdefault("original_max_position_embeddings", original)
    return {**found, **local, "rope_scaling": None if scaling["rope_type"] == "default" else scaling}
