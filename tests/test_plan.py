"""--job=plan: what a merge will cost, from config.json files alone, for models that no test machine could hold.

The numbers are worked out by hand from the models' published sizes. A decoder layer of LLaMA-2-7B has
4·4096² + 3·4096·11008 + 2·4096 = 202 383 360 parameters; 32 of them, two embeddings of 32000·4096 and a norm of 4096
make 6 738 415 616. 13B: 40 layers of 4·5120² + 3·5120·13824 + 2·5120 = 317 204 480. 70B: 80 layers, grouped queries,
2·8192² + 2·1024·8192 + 3·8192·28672 + 2·8192 = 855 654 400.
"""

import dataclasses
import json
import logging
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import launch
from families import edit_json, read_json, write_family
from jax.sharding import NamedSharding

from dppa_jax.checkpoint import SafetensorsDirectory, tensor_specs
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.run import JobConfig
from dppa_jax.jobs.plan import run_plan
from dppa_jax.merging import kernels, speed
from dppa_jax.merging.blocks import make_blocks
from dppa_jax.merging.elementwise import Elementwise
from dppa_jax.merging.kernels import Kernels
from dppa_jax.merging.plan import RUNTIME, plan_of
from dppa_jax.merging.rows import Matrix
from dppa_jax.merging.speed import Speeds
from dppa_jax.runtime.mesh import ROWS, make_mesh, over_rows, padded_rows

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
        job = JobConfig(
            MergeConfig(EXPERTS, **({"method": "dppa"} | (merge or {}))),
            str(directory),
            experts,
            workdir=str(tmp_path),
            **options,
        )
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
    """Held are a layer of four models, the next one, and a survey's sums or five matrices that wait, and counts."""
    found = plan(size, {"output_dtype": "bfloat16"}, residency="streamed", block_layers=1)
    hidden, inner = (SIZES[size][key] for key in ("hidden_size", "intermediate_size"))
    vocabulary = 32000 * hidden
    assert found.block_layers == 1
    values = LAYER[size] - hidden * hidden * 2 - 3 * hidden * inner  # k_proj and v_proj
    # The embeddings in three chunks, the norm and a chunk of the head, or v_proj to down_proj.
    waiting = 2 * max(vocabulary + inner * hidden, values // 2 + hidden * hidden + 3 * hidden * inner)
    counts = 2 * inner * hidden // 8 * 4
    sums = 2 * LAYER[size] // 8 * 8
    assert found.device_bytes == pytest.approx(LAYER[size] * 2 * 2 * 4 + max(sums, waiting + counts), rel=2e-3)
    assert found.host_bytes == pytest.approx(found.device_bytes + waiting + RUNTIME, rel=2e-3), "the heap keeps pieces"
    chunks = 2 * -(-32000 // inner)
    assert found.blocks == SIZES[size]["num_hidden_layers"] + chunks + 1, "layers, embeddings and head in chunks, norm"


def test_saved_deltas_are_written_and_held(plan):
    plain, saving = (plan("7b", residency="streamed", save_delta=where) for where in ("", "deltas"))
    assert saving.bytes_written == plain.bytes_written + 3 * 4 * PARAMETERS["7b"]
    assert saving.host_bytes == plain.host_bytes + 2 * 4 * 11008 * 4096, "one is computed while one is written"


def test_one_pass_methods_read_once(plan):
    found = plan("7b", {"method": "dare"}, residency="streamed")
    assert (found.passes, found.bytes_read) == (1, 4 * 2 * PARAMETERS["7b"])


def test_output_dtype_is_what_is_written(plan):
    found = plan("7b", {"output_dtype": "float32"}, residency="streamed")
    assert found.bytes_written == 4 * PARAMETERS["7b"]


def test_blocks_are_no_larger_than_a_host_can_hold_two_of(plan):
    """Also where a device has room for more: 80 GB for half the layers of 70 B."""
    found = plan("70b", mesh="row=8", device_memory=80 * 10**9)
    assert not found.resident
    assert found.block_layers == 1
    assert found.host_bytes < 17 * 10**9


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
    resident = plan(size, mesh=mesh, device_memory=gigabytes * 10**9, residency="resident", block_layers=layers)
    assert resident.device_bytes > 4 * 2 * PARAMETERS[size] / (8 * layers)
    assert found.resident == (resident.device_bytes < 0.8 * gigabytes * 1e9)
    assert found.block_layers >= min(layers, SIZES[size]["num_hidden_layers"])
    assert found.block_layers <= SIZES[size]["num_hidden_layers"]


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"residency": "resident"}, "--residency=streamed"),
        ({"block_layers": 40}, "--block_layers=1"),
        ({}, "more devices in --mesh"),
    ],
)
def test_what_does_not_fit_is_said_with_what_to_change(plan, options, change):
    found = plan("70b", mesh="row=2", device_memory=4_000_000_000, **options)
    assert dict(found.lines())["peak per device"].endswith(f" of 4.00 GB: too much; give {change}")
    assert not found.fits
    assert plan("70b", mesh="row=2", device_memory=80_000_000_000).fits


def test_merge_beyond_the_memory_of_the_host_is_warned_of(merge, monkeypatch, caplog):
    monkeypatch.setattr("dppa_jax.merging.plan.psutil.virtual_memory", lambda: SimpleNamespace(available=RUNTIME))
    with caplog.at_level(logging.WARNING):
        merge("--method=dare", "--rate=0.7", "--residency=resident")
    assert "too much; give --residency=streamed" in caplog.text


def test_processes_share_the_layers(plan):
    """Eight of ten layers each; of 32 the first 16 have three, the others two; the last one has norm and head."""
    alone = plan("70b", mesh="row=8", device_memory=80 * 10**9)
    eight, many = (plan("70b", mesh="row=8", device_memory=80 * 10**9, num_processes=count) for count in (8, 32))
    head = 32000 * 8192
    for found, layers, outside in ((eight, 10, head + 8192), (many, 3, head)):
        assert found.bytes_read == (alone.bytes_read if not found.resident else 4 * 2 * PARAMETERS["70b"])
        assert found.bytes_written == alone.bytes_written
        assert found.process_read == 4 * 2 * (layers * LAYER["70b"] + outside)
        assert found.process_written == 2 * (layers * LAYER["70b"] + outside)
        assert found.resident
    assert (alone.resident, alone.passes) == (False, 2)
    assert eight.device_bytes > many.device_bytes
    lines = dict(eight.lines())
    assert lines["mesh"] == "layer=1, row=8, in each of 8 processes: 64 devices"
    assert lines["read"] == "551.81 GB, at most 70.55 GB by a process"


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
    launch("--job=plan", *merge.flags()[:3], "--method=dppa", f"--workdir={merge.root / 'runs'}")
    assert "base + 2 experts" in capsys.readouterr().out
    found = read_json(merge.root / "runs" / "plan.json")
    assert found["models"] == 3
    assert "seconds" not in found, "it depends on the disk of --output"


def test_plan_checks_as_a_merge_would(merge):
    plan = ["--job=plan", *merge.flags()]
    edit_json(merge.law / "config.json", num_hidden_layers=5)
    assert f"{merge.law}: 18 tensors are missing" in merge.refusal(of=plan), "headers are read where they are"
    (merge.law / "model.safetensors").unlink()
    assert "expert 'law' has 5 decoder layers, the base 3" in merge.refusal(of=plan)
    edit_json(merge.law / "config.json", num_hidden_layers=3, hidden_size=None)
    assert f"{merge.law}/config.json: has no 'hidden_size'" in merge.refusal(of=plan)
    (merge.law / "config.json").unlink()
    assert f"{merge.law}/config.json is missing" in merge.refusal(of=plan)


def test_dtype_that_is_none_of_ours(merge):
    edit_json(merge.law / "config.json", dtype="float8_e4m3fn")
    (merge.law / "model.safetensors").unlink()
    message = merge.refusal(of=["--job=plan", *merge.flags()])
    assert "dtype 'float8_e4m3fn' cannot be merged; it must be float32, float16, bfloat16" in message


@pytest.mark.parametrize(
    ("residency", "method"),
    [
        pytest.param("resident", "dppa", marks=pytest.mark.slow),
        ("resident", "task_arithmetic"),
        ("streamed", "dppa"),
        pytest.param("streamed", "task_arithmetic", marks=pytest.mark.slow),
    ],
)
def test_plan_is_what_the_merge_reads_and_writes(merge, method, residency):
    merge(f"--method={method}", f"--residency={residency}")
    cost = read_json(merge.output / "recipe.json")["cost"]
    models = {name: str(merge.root / name) for name in ("math", "law")}
    job = JobConfig(MergeConfig(tuple(models), method), str(merge.base), models, residency=residency)
    promised = plan_of(job, tensor_specs(read_json(merge.base / "config.json")), ["bfloat16"] * 3, (1, 1))
    assert cost["bytes_read"] == promised.bytes_read
    header = cost["bytes_written"] - promised.bytes_written
    assert 0 < header < 8000
    assert dataclasses.asdict(promised)["resident"] == (residency == "resident")


def test_models_that_are_merged_again_stay_resident_where_they_fit(merge, monkeypatch):
    models = {name: str(merge.root / name) for name in ("math", "law")}
    job = JobConfig(MergeConfig(tuple(models), "dppa"), str(merge.base), models)
    config = read_json(merge.base / "config.json")
    models, layers = (tensor_specs(config), ["bfloat16"] * 3), config["num_hidden_layers"]
    once, again = plan_of(job, *models, (1, 1)), plan_of(job, *models, (1, 1), repeated=True)
    assert (once.resident, once.block_layers) == (False, 1)
    assert (again.resident, again.block_layers) == (True, layers)
    monkeypatch.setattr("dppa_jax.merging.plan.device_memory", lambda given: (again.device_bytes // 10, "cpu"))
    little = plan_of(job, *models, (1, 1), repeated=True)
    assert not little.resident


# ---- compiled steps


class Compiler:
    """In place of `over_rows`: compiles what a kernel is called with, without weights, and notes what it needs."""

    def __init__(self):
        self.needs: list = []

    def __call__(self, mesh, function, replicated=(), donated=()):
        rows = NamedSharding(mesh, ROWS)

        def run(*arguments):
            place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) if x.ndim else x  # noqa: E731
            lowered = over_rows(mesh, function, replicated, donated).lower(*jax.tree.map(place, arguments))
            self.needs.append(lowered.compile().memory_analysis())
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), lowered.out_info)

        return run

    def first(self, call, *shapes) -> tuple[int, int, int]:
        """Bytes of arguments, outputs and temporaries of the first function that a call compiles; per device."""
        self.needs.clear()
        jax.eval_shape(call, *shapes)  # the arrays are traced, so nothing is computed
        need = self.needs[0]
        return need.argument_size_in_bytes, need.output_size_in_bytes, need.temp_size_in_bytes


@dataclasses.dataclass
class Step:
    """The kernels of a merge of three experts in float16, for the rows of a matrix."""

    compiler: Compiler
    kernels: Kernels

    def array(self, matrix: Matrix, dtype, columns: int = 0) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((padded_rows(self.kernels.mesh, matrix.rows), columns or matrix.columns), dtype)

    def merge(self, matrix: Matrix) -> tuple[int, int, int]:
        weights, nothing = self.array(matrix, np.float16), (None,) * 3
        bounds, factors = (self.array(matrix, dtype, 1) for dtype in (np.uint32, np.float32))

        def merge(base, experts, bounds, factors):
            return self.kernels.merge(np.dtype(np.float16), base, experts, nothing, bounds, factors)

        return self.compiler.first(merge, weights, (weights,) * 3, (bounds,) * 3, (factors,) * 3)

    def check(self, matrix: Matrix) -> tuple[int, int, int]:
        return self.compiler.first(self.compiler(self.kernels.mesh, kernels.zeros), self.array(matrix, np.float16))

    def survey(self, matrix: Matrix) -> tuple[int, int, int]:
        weights, thresholds = self.array(matrix, np.float16), self.array(matrix, np.float32, 2)
        return self.compiler.first(partial(self.kernels.row_sums, "above"), weights, weights, thresholds)

    def count(self, matrix: Matrix) -> tuple[int, int, int]:
        weights, bounds = self.array(matrix, np.float16), self.array(matrix, np.uint32, 4)
        return self.compiler.first(lambda b, e, x: self.kernels.counts(b, e, None, x), weights, weights, bounds)


@pytest.mark.parametrize(
    ("size", "mesh"), [("7b", "row=2"), pytest.param("70b", "layer=2,row=4", marks=pytest.mark.slow)]
)
def test_compiled_steps_need_what_the_plan_says(plan, size, mesh, monkeypatch):
    """What XLA says that the kernels of a block of that shape take, put together as a streamed merge holds it."""
    compiler = Compiler()
    monkeypatch.setattr(kernels, "over_rows", compiler)
    step = Step(compiler, Kernels(make_mesh(mesh), Elementwise("magnitude", "sum", "float32")))
    found = plan(size, {"rate": 0.9}, mesh=mesh, device_memory=80 * 10**9, residency="streamed", block_layers=2)
    blocks = make_blocks(tensor_specs(LLAMA_2 | SIZES[size]), 2)
    different = {(matrix.rows, matrix.columns): matrix for block in blocks for matrix in block.matrices}
    merges = {shape: step.merge(matrix) for shape, matrix in different.items()}
    needs = {matrix: merges[matrix.rows, matrix.columns] for block in blocks for matrix in block.matrices}

    read = max(sum(needs[matrix][0] for matrix in block.matrices) for block in blocks)
    outputs = [needs[matrix][1] for block in blocks for matrix in block.matrices]
    waiting = max(sum(outputs[i : i + 5]) for i in range(len(outputs)))
    temporaries = max(step.check(different[shape])[2] for shape in different)
    counts = max(step.count(matrix)[1] for matrix in blocks[0].matrices if matrix.linears)
    sums = sum(step.survey(matrix)[1] for matrix in blocks[0].matrices if matrix.linears)
    merging, surveying = waiting + temporaries + 2 * counts, 2 * sums
    assert found.device_bytes == pytest.approx(2 * read + max(merging, surveying), rel=0.03)
    assert all(temporary < 0.001 * read for _, _, temporary in merges.values()), "fused"


# ---- what was measured


@pytest.mark.slow
def test_peak_of_a_merge_is_what_was_planned(tmp_path):
    """Peak resident memory of a process, within a fifth, where the weights are a good part of it."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 4000, "num_hidden_layers": 4}
    write_family(tmp_path, ("math",), "float32", **sizes)
    experts = {name: str(tmp_path / "math") for name in ("one", "two", "three")}
    flags = ["--method=dare", "--residency=resident", "--block_layers=4", f"--output={tmp_path / 'out'}"]
    flags += [f"--base={tmp_path / 'base'}", *(f"--expert={name}={where}" for name, where in experts.items())]
    environment = {**os.environ, "DPPA_JAX_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "dppa_jax.launch", f"--workdir={tmp_path}", *flags]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    measured = read_json(tmp_path / "out" / "recipe.json")["cost"]["peak_memory"]
    config = MergeConfig(tuple(experts), "dare")
    job = JobConfig(config, str(tmp_path / "base"), experts, residency="resident", block_layers=4)
    planned = plan_of(job, tensor_specs(read_json(tmp_path / "base" / "config.json")), ["float32"] * 4, (1, 1))
    assert planned.host_bytes > 1.5 * RUNTIME
    assert planned.host_bytes == pytest.approx(measured, rel=0.2)


def test_time_is_that_of_what_takes_longest(plan):
    found = plan("7b", residency="streamed")
    speeds = Speeds(read=1e9, write=1e10, merge=1e9, start=2.0)
    reading = found.bytes_read / 1e9
    assert found.time(speeds).startswith(f"{2 + reading:.1f} s: ")
    slow = dataclasses.replace(speeds, merge=1e6)
    assert found.time(slow).startswith(f"{2 + PARAMETERS['7b'] / 1e6:.1f} s: ")


def test_time_comes_from_speeds_measured_here(merge, monkeypatch, capsys):
    monkeypatch.setattr(speed, "WRITTEN", 1 << 20)
    monkeypatch.setattr(speed, "PIECE", 1 << 18)
    monkeypatch.setenv("COLUMNS", "300")
    workdir = merge.root / "runs"
    workdir.mkdir()
    before = sorted(merge.root.iterdir())
    launch("--job=plan", *merge.flags(), "--method=dppa", f"--workdir={workdir}")
    printed = capsys.readouterr().out
    for text in (" s: start ", "compute ", " parameters/s", "read ", "write ", "B/s"):
        assert text in printed
    assert sorted(merge.root.iterdir()) == before
    found = read_json(workdir / "plan.json")
    assert f"{found['seconds']:.1f} s: start {found['speeds']['start']:.1f} s" in printed


def test_a_killed_plan_leaves_no_file(tmp_path, monkeypatch):
    """The file that is written to time the disk has no name while it is written."""

    class Watched(speed.DirectFile):
        def sync(self):
            super().sync()
            assert list(tmp_path.iterdir()) == []
            sizes.append(os.fstat(self._cached).st_size)

    sizes = []
    monkeypatch.setattr(speed, "WRITTEN", 2 * speed.PIECE)
    monkeypatch.setattr(speed, "DirectFile", Watched)
    assert speed.write_speed(tmp_path / "out") > 0
    assert sizes == [speed.WRITTEN]


@pytest.mark.parametrize("memory", [0, 10**9])
def test_models_larger_than_memory_are_read_from_the_disk(merge, monkeypatch, memory):
    evicted, evict = [], SafetensorsDirectory.evict_rows
    monkeypatch.setattr(SafetensorsDirectory, "evict_rows", lambda *given: evicted.append(given[1]) or evict(*given))
    monkeypatch.setattr(speed.psutil, "virtual_memory", lambda: SimpleNamespace(available=memory))
    assert speed.read_speed([SafetensorsDirectory(merge.base), SafetensorsDirectory(merge.law)]) > 0
    assert bool(evicted) == (memory == 0)


@pytest.mark.parametrize("size", ["13b", "70b"])
def test_layers_that_are_timed_have_the_proportions_of_the_model(size):
    config = LLAMA_2 | SIZES[size]
    synthetic = speed.synthetic(tensor_specs(config), np.dtype(np.float16), EXPERTS)[0]
    elements = [np.prod(spec.shape) for spec in synthetic.specs.values()]
    assert 20e6 < sum(elements) < 70e6
    layer = sum(np.prod(spec.shape) for spec in synthetic.specs.values() if spec.layer is not None)
    whole = LAYER[size] * config["num_hidden_layers"] / PARAMETERS[size]
    assert layer / sum(elements) == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"device_memory": 10**10}, "devices of --device_memory"),
        ({}, "give --output"),
        ({"output": "o"}, "the weights of base are not here"),
    ],
)
def test_why_no_time_is_predicted(plan, options, reason, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    plan("7b", **options)
    assert "not predicted: " in (printed := capsys.readouterr().out)
    assert reason in printed
