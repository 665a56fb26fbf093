"""What config.json of base and experts say beyond shapes: the same in other words, or not the same."""

import pytest
from families import edit_json, fine_tuned, llama_config, random_weights, read_json, write_model
from hypothesis import given, settings
from hypothesis import strategies as st

from dppa_jax.architecture.specs import CheckpointError
from dppa_jax.merging.configs import SETTINGS, compare_configs, meaning

FAST = "--method=task_arithmetic"
PLAIN = {"rms_norm_eps": 1e-6, "rope_parameters": None}  # the defaults of transformers


def configured(**changes) -> dict:
    return llama_config(**PLAIN | changes)


# ---- the same in other words


@st.composite
def spelling(draw, theta: float = 10000.0, scaling: dict | None = None) -> dict:
    """Changes of a config.json that leave its meaning."""
    changes = {
        key: draw(st.sampled_from(values))
        for key, values in {
            "head_dim": (None, 8),
            "hidden_act": (None, "silu", "swish"),
            "rms_norm_eps": (None, 1e-6, 0.000001),
            "sliding_window": (None, 4096),
            "use_sliding_window": (False,),
            "partial_rotary_factor": (None, 1, 1.0),
            "transformers_version": (None, "4.31.0"),
            "use_cache": (None, True, False),
            "max_position_embeddings": (128, 4096),
        }.items()
    }
    given_theta = draw(st.sampled_from([theta, int(theta)] + [None] * (theta == 10000.0)))
    kind = draw(st.sampled_from(["type", "rope_type"]))
    found = dict(scaling or {})
    if found or draw(st.booleans()):
        found = {**found, kind: found.pop("rope_type", "default")}
    if draw(st.booleans()):  # transformers 5
        return changes | {"rope_parameters": found | ({"rope_theta": given_theta} if given_theta else {})}
    return changes | {"rope_parameters": None, "rope_scaling": found or None, "rope_theta": given_theta}


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    st.data(), st.sampled_from([10000.0, 5e5]), st.sampled_from([None, {"rope_type": "linear", "factor": 2}, LLAMA3])
)
def test_the_same_config_in_other_words(data, theta, scaling):
    ours, theirs = (configured(**data.draw(spelling(theta, scaling))) for _ in range(2))
    assert meaning(ours) == meaning(theirs)
    compare_configs(ours, theirs, "math")


@pytest.mark.parametrize(
    ("family", "window", "other"),
    [("mistral", {}, {"sliding_window": 4096}), ("qwen2", {}, {"sliding_window": 32768, "use_sliding_window": False})],
)
def test_a_default_of_the_family_is_no_difference(family, window, other):
    """Mistral's window is 4096 where config.json has none; Qwen2's counts only with use_sliding_window."""
    ours, theirs = (configured(architectures=None, model_type=family, **changes) for changes in (window, other))
    assert meaning(ours) == meaning(theirs)
    assert meaning(configured(architectures=None, model_type="mistral") | {"sliding_window": None}) != meaning(
        configured(architectures=None, model_type="mistral")
    )


def test_another_spelling_is_merged_without_a_word(merge):
    edit_json(
        merge.law / "config.json", rope_parameters=None, rope_theta=10000, dtype=None, torch_dtype="bfloat16",
        head_dim=8, use_cache=False, rms_norm_eps=9.999999747378752e-06,
    )  # fmt: skip
    assert merge.warnings(FAST) == []


# ---- not the same

REFUSED = [
    (
        {"num_attention_heads": 8, "num_key_value_heads": 4},
        ["num_attention_heads 8 (the base 4)", "heads 4 (the base 2"],
    ),
    ({"hidden_act": "gelu"}, ["hidden_act 'gelu' (the base 'silu')"]),
    ({"head_dim": 4, "num_attention_heads": 8, "num_key_value_heads": 4}, ["head_dim 4 (the base 8)"]),
]
WARNED = [
    ({"rope_theta": 1e6, "rope_parameters": None}, "rope_theta 1000000.0 (the base 10000.0)"),
    (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        "rope_scaling {'rope_type': 'linear', 'factor': 2.0}",
    ),
    ({"rms_norm_eps": 1e-6}, "rms_norm_eps 1e-06 (the base 1e-05)"),
    ({"sliding_window": 4096}, "sliding_window 4096 (the base None)"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_other_heads_or_activation_are_refused(merge, changes, said):
    edit_json(merge.law / "config.json", **changes)
    message = merge.refusal(FAST)
    assert "expert 'law': its config.json says" in message
    assert all(text in message for text in said)


@pytest.mark.parametrize(("changes", "said"), WARNED)
def test_what_a_fine_tune_may_change_is_told(merge, changes, said):
    edit_json(merge.law / "config.json", **changes)
    told = merge.warnings(FAST)
    assert len(told) == 1
    assert told[0].startswith("expert 'law': its config.json says ")
    assert said in told[0]


def test_a_plan_says_the_same(merge):
    """It needs no weights."""
    plan = ("--job=plan", FAST, f"--workdir={merge.root / 'runs'}")
    edit_json(merge.law / "config.json", rms_norm_eps=1e-6)
    (merge.law / "model.safetensors").unlink()
    assert any("rms_norm_eps" in told for told in merge.warnings(*plan))
    edit_json(merge.math / "config.json", hidden_act="gelu")
    with pytest.raises(SystemExit, match="hidden_act 'gelu'"):
        merge(*plan)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(list(SETTINGS)), st.data())
def test_every_setting_is_compared(key, data):
    ours = configured(**data.draw(spelling()))
    theirs = {**ours, key: 16, "use_sliding_window": True}
    if key in ("rope_theta", "rope_scaling", "partial_rotary_factor"):
        rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
        changed = {"factor": 4.0} if key == "rope_scaling" else {key: 0.5}
        ours, theirs = ({**ours, "rope_scaling": None, "rope_parameters": rope | more} for more in ({}, changed))
    if not SETTINGS[key].fixed:
        assert meaning(ours)[key] != meaning(theirs)[key]
        return
    with pytest.raises(CheckpointError, match=f"{key} "):
        compare_configs(ours, theirs, "math")


# ---- tensors that only one of them has


@pytest.mark.parametrize("tied", ["base", "law"])
def test_one_is_tied_and_the_other_is_not(merge, tied):
    """A base whose expert was untied by peft, and the opposite."""
    config = llama_config(tie_word_embeddings=True)
    setattr(merge, tied, write_model(merge.root / "tied", config, random_weights(config)))
    message = merge.refusal(FAST)
    this, other = ("the base", "expert 'math'") if tied == "base" else ("expert 'law'", "the base")
    assert (
        f"{this} has no lm_head.weight, {other} has; tie_word_embeddings is True in {this} and False in {other}"
        in message
    )
    assert f"untie {this}: write its model.embed_tokens.weight as lm_head.weight, too" in message


def test_fewer_rows_than_the_base(merge):
    config = llama_config(vocab_size=60)
    merge.law = write_model(merge.root / "fewer", config, fine_tuned(random_weights(config), 1))
    message = merge.refusal(FAST)
    assert "expert 'law': model.embed_tokens.weight has 60 rows, and the base 64, which are 4 tokens more" in message
    assert "resize_token_embeddings(60)" in message


# ---- code that config.json names


@pytest.mark.parametrize("job", ["merge", "convert"])
def test_code_is_not_copied_and_not_named(merge, job):
    edit_json(merge.base / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    (merge.base / "modeling_x.py").write_text("")
    told = merge.warnings(FAST, f"--job={job}")
    assert any("modeling_x.X" in said and str(merge.base) in said for said in told)
    assert "auto_map" not in read_json(merge.output / "config.json")
    assert not (merge.output / "modeling_x.py").exists()


def test_rotary_embeddings_of_layers_with_and_without_a_window_in_both_spellings():
    """As Gemma 3 has them."""
    common = {"architectures": ["Gemma3ForCausalLM"], "hidden_size": 64, "num_attention_heads": 4}
    four = {
        **common,
        "rope_theta": 1e6,
        "rope_local_base_freq": 2e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    whole = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    windowed = {"rope_type": "default", "rope_theta": 2e4}
    five = {**common, "rope_parameters": {"full_attention": whole, "sliding_attention": windowed}}
    assert meaning(four) == meaning(five)
    assert meaning(four) != meaning({**four, "rope_local_base_freq": 1e4})
