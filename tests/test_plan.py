"""--job=plan: what a merge will cost, from config.json files alone, for models that no test machine could hold.

The numbers are worked out by hand from the models' published sizes. A decoder layer of LLaMA-2-7B has
4·4096² + 3·4096·11008 + 2·4096 = 202 383 360 parameters; 32 of them, two embeddings of 32000·4096 and a norm of 4096
make 6 738 415 616. 13B: 40 layers of 4·5120² + 3·5120·13824 + 2·5120 = 317 204 480. 70B: 80 layers, grouped queries,
2·8192² + 2·1024·8192 + 3·8192·28672 + 2·8192 = 855 654 400.
"""

import dataclasses
import json

import pytest
from command import launch
from families import edit_json, read_json

from dppa_jax.config import MergeConfig
from dppa_jax.jobs import JobConfig, plan_of, run_plan

LLAMA_2 = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 32000,
}
SIZES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_hidden_layers": 40},
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
        "num_key_value_heads": 8,
    },
}
LAYER = {"7b": 202_383_360, "13b": 317_204_480, "70b": 855_654_400}
PARAMETERS = {"7b": 6_738_415_616, "13b": 13_015_864_320, "70b": 68_976_648_192}
EXPERTS = ("math", "fin", "law")


@pytest.fixture
def plan(tmp_path, capsys):
    """plan("7b", mesh=..., device_memory=...) prints and returns the plan of base + 3 experts."""

    def plan(size: str, merge: dict | None = None, **options):
        directory = tmp_path / size
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(LLAMA_2 | SIZES[size]))
        experts = dict.fromkeys(EXPERTS, str(directory))
        job = JobConfig(MergeConfig(EXPERTS, **(merge or {})), str(directory), experts, **options)
        return run_plan(job)

    return plan


@pytest.mark.parametrize("size", SIZES)
def test_bytes_of_a_streamed_merge(plan, size):
    """Four models in float16; DPPA reads the decoder layers twice and the rest once; one model is written."""
    found = plan(size, residency="streamed")
    layers = LAYER[size] * SIZES[size]["num_hidden_layers"]
    assert found.parameters == PARAMETERS[size]
    assert found.bytes_read == 4 * 2 * (PARAMETERS[size] + layers)
    assert found.bytes_written == 2 * PARAMETERS[size]
    assert (found.passes, found.resident) == (2, False)


@pytest.mark.parametrize("size", SIZES)
def test_a_laptop_streams_a_layer_at_a_time(plan, size):
    """In flight is one layer of four models read, four read ahead, and two of rows merged and written."""
    found = plan(size, residency="streamed", block_layers=1)
    assert found.block_layers == 1
    assert found.device_bytes == LAYER[size] * 2 * (2 * 4 + 2)
    assert found.host_bytes == LAYER[size] * 2 * 2 * 4
    vocabulary = 32000 * SIZES[size]["hidden_size"]
    chunks = 2 * -(-vocabulary // LAYER[size])
    assert found.blocks == SIZES[size]["num_hidden_layers"] + chunks + 1, "layers, embeddings and head in chunks, norm"


def test_one_pass_methods_read_once(plan):
    found = plan("7b", {"method": "dare"}, residency="streamed")
    assert (found.passes, found.bytes_read) == (1, 4 * 2 * PARAMETERS["7b"])


def test_output_dtype_is_what_is_written(plan):
    found = plan("7b", {"output_dtype": "float32"}, residency="streamed")
    assert found.bytes_written == 4 * PARAMETERS["7b"]


def test_large_accelerators_keep_everything(plan):
    """Eight imagined devices of 80 GB hold four 7B models, 54 GB together; each holds an eighth."""
    found = plan("7b", mesh="layer=2,row=4", device_memory=80_000_000_000)
    assert found.resident
    assert found.bytes_read == 4 * 2 * PARAMETERS["7b"], "read once"
    assert found.device_bytes < 0.8 * 80_000_000_000
    assert found.device_bytes > 4 * 2 * PARAMETERS["7b"] / 8
    assert found.block_layers % 2 == 0, "both hosts' devices have layers of every block"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("mesh", "gigabytes"), [("layer=1,row=8", 16), ("layer=4,row=8", 16), ("layer=8,row=8", 32)])
def test_imagined_meshes_are_filled_and_not_overfilled(plan, size, mesh, gigabytes):
    found = plan(size, mesh=mesh, device_memory=gigabytes * 10**9)
    layers = int(mesh[6])
    assert found.mesh == (layers, 8)
    assert found.device_bytes <= 0.8 * gigabytes * 1e9
    fits = 4 * 2 * PARAMETERS[size] / (8 * layers) + LAYER[size] * 20 / 8 < 0.8 * gigabytes * 1e9
    assert found.resident == fits
    assert found.block_layers >= min(layers, SIZES[size]["num_hidden_layers"])
    assert found.block_layers <= SIZES[size]["num_hidden_layers"]


def test_what_does_not_fit_is_said(plan):
    found = plan("70b", mesh="row=2", device_memory=4_000_000_000)
    assert found.device_bytes == LAYER["70b"] * 20 // 2
    assert (
        dict(found.lines())["peak per device"]
        == "8.56 GB of 4.00 GB: too much; give more devices, or fewer --block_layers"
    )


def test_what_is_printed(plan, capsys):
    plan("7b", mesh="layer=2,row=4", device_memory=80_000_000_000)
    printed = capsys.readouterr().out
    for text in (
        "base + 3 experts of 6.738 B parameters",
        "layer=2, row=4: 8 devices",
        "53.91 GB",
        "13.48 GB",
        "80.00 GB",
    ):
        assert text in printed


# ---- from the command line


def test_plan_needs_config_files_only(merge, capsys):
    for directory in (merge.base, merge.math, merge.law):
        (directory / "model.safetensors").unlink()
    launch("--job=plan", *merge.flags()[:3])
    assert "base + 2 experts" in capsys.readouterr().out


def test_plan_checks_as_a_merge_would(merge):
    plan = ["--job=plan", *merge.flags()]
    edit_json(merge.law / "config.json", num_hidden_layers=5)
    assert "expert 'law' has 5 decoder layers, the base 3" in merge.refusal(of=plan)
    edit_json(merge.law / "config.json", num_hidden_layers=3, hidden_size=None)
    assert f"{merge.law}/config.json: has no 'hidden_size'" in merge.refusal(of=plan)
    (merge.law / "config.json").unlink()
    assert f"{merge.law}/config.json is missing" in merge.refusal(of=plan)


def test_dtype_that_is_none_of_ours(merge):
    edit_json(merge.law / "config.json", dtype="float8_e4m3fn")
    message = merge.refusal(of=["--job=plan", *merge.flags()])
    assert "dtype 'float8_e4m3fn' cannot be merged; it must be float32, float16, bfloat16" in message


@pytest.mark.parametrize("method", ["dppa", "task_arithmetic"])
@pytest.mark.parametrize("residency", ["resident", "streamed"])
def test_plan_is_what_the_merge_reads_and_writes(merge, method, residency):
    merge(f"--method={method}", f"--residency={residency}")
    cost = read_json(merge.output / "recipe.json")["cost"]
    models = {name: str(merge.root / name) for name in ("math", "law")}
    job = JobConfig(MergeConfig(tuple(models), method), str(merge.base), models, residency=residency)
    promised = plan_of(job, [read_json(merge.base / "config.json")] * 3, (1, 1))
    assert cost["bytes_read"] == promised.bytes_read
    header = cost["bytes_written"] - promised.bytes_written
    assert 0 < header < 8000
    assert dataclasses.asdict(promised)["resident"] == (residency == "resident")


def test_models_that_are_merged_again_stay_resident_where_they_fit(merge, monkeypatch):
    models = {name: str(merge.root / name) for name in ("math", "law")}
    job = JobConfig(MergeConfig(tuple(models), "dppa"), str(merge.base), models)
    configs = [read_json(merge.base / "config.json")] * 3
    layers = configs[0]["num_hidden_layers"]
    once, again = plan_of(job, configs, (1, 1)), plan_of(job, configs, (1, 1), again=True)
    assert (once.resident, once.block_layers) == (False, 1)
    assert (again.resident, again.block_layers) == (True, layers)
    monkeypatch.setattr("dppa_jax.jobs.device_memory", lambda given: (again.device_bytes // 10, "cpu"))
    little = plan_of(job, configs, (1, 1), again=True)
    assert not little.resident
