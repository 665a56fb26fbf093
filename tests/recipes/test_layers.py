"""Models made of layers of others, `layers:A[0:2],B[1:3]`: tensors by hand, config.json, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from command import launch
from families import edit_json, llama_config, random_weights, read_json, write_model
from small_models import load, model_of, save, tune

from dppa_jax.checkpoint import CheckpointError, SafetensorsDirectory
from dppa_jax.checkpoint.spliced import Run, spliced_config
from dppa_jax.where import hub_ids, look, open_checkpoint, runs_of

LLAMA = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 16, "vocab_size": 10}
LLAMA |= {"num_attention_heads": 2, "num_hidden_layers": 4}


def layers_of(where: str) -> list[np.ndarray]:
    """The norm of every layer, which is enough to tell layers apart."""
    model = open_checkpoint(where)
    names = [name for name in model.specs if name.endswith("input_layernorm.weight")]
    return [model.read(name) for name in names]


def test_layers_are_repeated_left_out_and_taken_in_turn(pristine):
    base, math = str(pristine / "base"), str(pristine / "math")
    found = layers_of(f"layers:{base}[0:2],{math}[1:3],{base}[2:3]")
    own, other = layers_of(base), layers_of(math)
    assert all(map(np.array_equal, found, [own[0], own[1], other[1], other[2], own[2]]))


def test_what_is_before_the_layers_is_the_first_models_and_what_is_after_them_the_last(pristine):
    base, math = (SafetensorsDirectory(pristine / name) for name in ("base", "math"))
    whole = open_checkpoint(f"layers:{pristine / 'base'}[0:1],{pristine / 'math'}[0:1]")
    for name, model in {"model.embed_tokens": base, "model.norm": math, "lm_head": math}.items():
        assert np.array_equal(whole.read(f"{name}.weight"), model.read(f"{name}.weight"))
    assert whole.config == {**base.config, "num_hidden_layers": 2}


def test_all_layers_of_a_model_are_that_model(pristine):
    where = str(pristine / "base")
    assert isinstance(look(f"layers:{where}[0:3]"), SafetensorsDirectory)
    assert layers_of(f"layers:{where}[0:2],{where}[2:3]")[2].tolist() == layers_of(where)[2].tolist()


def test_a_converted_model_holds_its_layers(merge):
    launch("--job=convert", f"--base=layers:{merge.base}[0:3],{merge.math}[1:3]", f"--output={merge.output}")
    assert read_json(merge.output / "config.json")["num_hidden_layers"] == 5
    assert np.array_equal(layers_of(str(merge.output))[3], layers_of(str(merge.math))[1])


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("layers:{base}[0:2],", "MODEL[FIRST:END]"),
        ("layers:{base}", "MODEL[FIRST:END]"),
        ("layers:{base}[2:4]", "[2:4]"),
        ("layers:{base}[2:2]", "[2:2]"),
        ("layers:{base}[0:1],nowhere[0:1]", "nowhere"),
    ],
)
def test_layers_that_are_not_there(where, said, pristine):
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(where.format(base=pristine / "base"))
    assert said in str(error.value)


def test_layers_that_mean_something_else_are_refused(merge):
    edit_json(merge.math / "config.json", hidden_act="gelu")
    with pytest.raises(CheckpointError, match="hidden_act"):
        open_checkpoint(f"layers:{merge.base}[0:1],{merge.math}[0:1]")


def test_layers_of_another_size_are_refused(tmp_path):
    for name, size in (("a", 16), ("b", 24)):
        config = llama_config(intermediate_size=size)
        write_model(tmp_path / name, config, random_weights(config))
    with pytest.raises(CheckpointError, match=r"mlp.gate_proj.weight of .* has the shape \(24, "):
        open_checkpoint(f"layers:{tmp_path / 'a'}[0:1],{tmp_path / 'b'}[0:1]")


def test_lists_for_each_layer_follow_the_layers():
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = {**LLAMA, "layer_types": kinds, "eos_token_id": [1, 2]}
    found = spliced_config([config], [Run(0, 0, 2), Run(0, 1, 4)], "layers")
    assert found["layer_types"] == [*kinds[:2], *kinds[1:4]]
    assert (found["num_hidden_layers"], found["eos_token_id"]) == (5, [1, 2])


@pytest.mark.parametrize(
    ("changes", "runs", "refused"),
    [
        ({"architectures": ["Gemma2ForCausalLM"]}, [(0, 2), (2, 4)], False),
        ({"architectures": ["Gemma2ForCausalLM"]}, [(0, 2), (1, 4)], True),
        ({"architectures": ["Gemma2ForCausalLM"], "sliding_window": None}, [(0, 2), (1, 4)], False),
        ({"architectures": ["Gemma2ForCausalLM"], "layer_types": ["full_attention"] * 4}, [(1, 4)], False),
        ({"architectures": ["Qwen2ForCausalLM"], "max_window_layers": 2}, [(0, 3), (1, 4)], False),
        (
            {"architectures": ["Qwen2ForCausalLM"], "max_window_layers": 2, "use_sliding_window": True},
            [(0, 3), (1, 4)],
            True,
        ),
        ({"architectures": ["SmolLM3ForCausalLM"]}, [(1, 4)], True),
    ],
)
def test_layers_that_would_compute_something_else_are_refused(changes, runs, refused):
    taken = [Run(0, *run) for run in runs]
    if not refused:
        assert spliced_config([LLAMA | changes], taken, "layers")["num_hidden_layers"] == sum(b - a for a, b in runs)
        return
    with pytest.raises(CheckpointError, match="would become layer"):
        spliced_config([LLAMA | changes], taken, "layers")


def test_places_within_layers(tmp_path):
    assert runs_of("layers:owner/a@main+b[3:4]") == {"owner/a@main+b": [(0, 3, 4)]}
    assert hub_ids([f"layers:owner/a@main+{tmp_path}[3:4],owner/c[0:1]"]) == ["owner/a", "owner/c"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Qwen3", "Mixtral", "Phi3", "Gemma3"])
def test_families_load_in_transformers(family, tmp_path):
    """Fused tensors, mixtures of experts and lists by layer are written as transformers reads them."""
    first = model_of(family, 0)
    count = first.config.num_hidden_layers
    for name, model in {"a": first, "b": tune(model_of(family, 0), 1)}.items():
        save(family, model, tmp_path / name)
    output = tmp_path / "out"
    where = f"layers:{tmp_path / 'a'}[0:{count}],{tmp_path / 'b'}[0:{count}]"
    launch("--job=convert", f"--base={where}", f"--output={output}")
    found = load(family, output)
    assert found.config.num_hidden_layers == 2 * count
    assert json.loads((output / "config.json").read_text())["num_hidden_layers"] == 2 * count
    assert sum(1 for _ in Path(output).glob("*.safetensors")) == 1
