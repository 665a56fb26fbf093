"""--job=benchmark on a shape small enough for a test."""

import json
import sys
from collections import namedtuple

import numpy as np
import pytest
from command import launch

from dppa_jax.benchmark import device, families, merges, scaling
from dppa_jax.benchmark.families import make_family, make_model, model_config, parameters
from dppa_jax.benchmark.merges import TimedRun
from dppa_jax.checkpoint import SafetensorsDirectory

UP_PROJ = "model.layers.1.mlp.up_proj.weight"
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    monkeypatch.setitem(families.SHAPES, "tiny", (64, 96, 2, 4, 2))
    monkeypatch.setattr(families, "VOCABULARY", 512)
    monkeypatch.setenv("DPPA_JAX_CACHE", str(tmp_path / "cache"))


def flags(tmp_path, *more: str) -> list[str]:
    return ["--job=benchmark", "--shape=tiny", f"--workdir={tmp_path}", *more]


def read(path) -> np.ndarray:
    return SafetensorsDirectory(path).read(UP_PROJ).astype(float)


# ---- models


def test_models_are_seeded_bf16_checkpoints_with_heavy_tailed_deltas(tmp_path):
    config = model_config("tiny")
    first, again = (make_family(tmp_path / where, config, ("expert0", "expert1")) for where in "ab")
    assert all((read(first[name]) == read(again[name])).all() for name in first)
    deltas = [read(first[name]) - read(first["base"]) for name in ("expert0", "expert1")]
    assert 0.01 < read(first["base"]).std() < 0.03
    for delta in deltas:
        assert 0 < abs(delta).mean() < 0.01
        assert (delta**4).mean() / (delta**2).mean() ** 2 > 3.5  # a normal number's is 3
    assert abs(np.corrcoef(*(delta.ravel() for delta in deltas))[0, 1]) < 0.05
    assert SafetensorsDirectory(first["base"]).dtype.name == "bfloat16"


def test_tensors_longer_than_the_noise_are_filled(tmp_path, monkeypatch):
    monkeypatch.setattr(families, "CHUNK", 1000)
    base = read(make_model(tmp_path / "base", model_config("tiny"), "base"))
    assert base.std(axis=1).min() > 0.01
    assert len({row.tobytes() for row in base}) == len(base)


def test_a_disk_too_small_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    needed = 5 * 2 * parameters(model_config("tiny"))  # base, three experts and an output
    monkeypatch.setattr(families.shutil, "disk_usage", lambda _: Usage(1e12, 0, needed - 1))
    with pytest.raises(SystemExit, match=r"error: --workdir: .* GB free; .* for 4 models .* and an output"):
        launch(*flags(tmp_path))
    assert not (tmp_path / "benchmark").exists()


def test_all_families_of_a_scaling_count_as_one(tmp_path, monkeypatch):
    sizes = [2 * parameters(model_config("tiny", layers)) for layers in (2, 4, 8)]
    monkeypatch.setattr(families.shutil, "disk_usage", lambda _: Usage(1e12, 0, 4 * sum(sizes) + sizes[-1] - 1))
    with pytest.raises(SystemExit, match="for 12 models"):
        launch(*flags(tmp_path, "--scaling"))


def test_models_that_are_there_need_no_room(tmp_path, monkeypatch):
    model = 2 * parameters(model_config("tiny"))
    make_family(tmp_path, model_config("tiny"), ())
    monkeypatch.setattr(families.shutil, "disk_usage", lambda _: Usage(1e12, 0, model))
    assert make_family(tmp_path, model_config("tiny"), ())["base"].is_dir()


# ---- merges


def test_methods_are_run_in_turn_after_the_floor_and_the_fastest_run_counts(tmp_path, monkeypatch, capsys):
    """The processes themselves are started by the next test; here they are stood in for."""
    ran = []

    def timed(commands, output, cores=()):
        ran.append(commands[0])
        return TimedRun(100.0 - len(ran), 10**9, 24.0, moved_bytes=10**9)

    monkeypatch.setattr(merges, "timed", timed)
    monkeypatch.setattr(merges, "_plan", lambda command, root: {"planned_seconds": 80.0, "planned_bytes": 2 * 10**9})
    launch(*flags(tmp_path, "--methods=dppa", "--repeats=2"))
    result = json.loads((tmp_path / "benchmark" / "tiny" / "benchmark.json").read_text())
    experts = [sum(argument.startswith("--expert=") for argument in command) for command in ran]
    assert experts == [0, 0, 3, 2, 0, 3, 2]  # the first only fills the page cache
    assert {name: run["seconds"] for name, run in result.items()} == {
        "I/O floor": 95.0,
        "dppa": 94.0,
        "dppa, 2 experts": 93.0,
    }
    assert result["dppa"]["planned_bytes"] == 2 * 10**9
    assert "dppa, 2 experts" in capsys.readouterr().out


@pytest.mark.slow
def test_chosen_methods_are_timed_beside_the_floor_and_sizes_compared(tmp_path, capsys):
    launch(*flags(tmp_path, "--methods=dppa"))
    result = json.loads((tmp_path / "benchmark" / "tiny" / "benchmark.json").read_text())
    assert set(result) == {"I/O floor", "dppa", "dppa, 2 experts"}
    assert all(run["seconds"] > 0 and run["peak_bytes"] > 1e7 for run in result.values())
    model = 2 * parameters(model_config("tiny"))
    read_and_written = {name: result[name]["moved_bytes"] for name in ("dppa", "dppa, 2 experts")}
    assert 4 * model < read_and_written["dppa, 2 experts"] < read_and_written["dppa"] < 9 * model
    planned = [run for name, run in result.items() if name != "I/O floor"]
    assert all(0.5 < run["planned_bytes"] / run["peak_bytes"] < 2 and run["planned_seconds"] > 0 for run in planned)
    assert "dppa, 2 experts" in capsys.readouterr().out
    assert not (tmp_path / "benchmark" / "tiny" / "out").exists()


def test_shapes_timed_at_different_times_share_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(families, "VOCABULARY", 32000)
    for i, shape in enumerate(("0.3b", "7b"), 1):
        (tmp_path / shape).mkdir()
        row = "dppa" if shape == "7b" else "dppa, 2 experts"
        run = {"seconds": 10.0 * i, "peak_bytes": i * 10**9, "cpu_seconds": 1.0, "moved_bytes": 10**10 * i}
        (tmp_path / shape / "benchmark.json").write_text(json.dumps({row: run}))
    merges.print_sizes(tmp_path)
    printed = capsys.readouterr().out
    for_each = [line.replace("│", " ").split() for line in printed.splitlines() if "b " in line and "B" in line]
    assert ["7b", "6.74", "B", "20.0", "2.00", "2.97", "1.00"] in for_each
    assert any(line[:3] == ["0.3b", "0.31", "B"] for line in for_each)


def test_a_timed_merge_writes_into_a_scratch_directory_and_touches_nothing_else(tmp_path):
    for mine in ("out", "out.incomplete"):
        (tmp_path / mine).mkdir()
        (tmp_path / mine / "file").write_text("precious")
    (tmp_path / "process0.log").symlink_to("out/file")
    output = merges.scratch_output(tmp_path)
    (output.parent / "left by a killed run").mkdir(parents=True)
    script = "import sys; from pathlib import Path; Path(sys.argv[1]).mkdir(); print('made')"
    merges.timed([[sys.executable, "-c", script, str(output)]], output)
    assert not output.parent.exists()
    assert (tmp_path / "process0.log").read_text() == "made\n"
    assert [(tmp_path / mine / "file").read_text() for mine in ("out", "out.incomplete")] == ["precious"] * 2
    with pytest.raises(OSError, match=r"failed; see .*process0.log:\nTraceback"):
        merges.timed([[sys.executable, "-c", "raise ValueError"]], output)
    assert not output.parent.exists()
    output.parent.symlink_to("out")
    with pytest.raises(ValueError, match="is a link to out in place of a directory"):
        merges.timed([["true"]], output)


def test_rows_of_an_earlier_run_that_are_none_are_told_with_their_file(tmp_path):
    (tmp_path / "7b").mkdir()
    (tmp_path / "7b" / "benchmark.json").write_text('{"dppa": {"seconds": "5"}}')
    with pytest.raises(ValueError, match=r"7b/benchmark.json: Expected `float`, got `str`.* Remove it, and time"):
        merges.print_sizes(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--shape=8b"], "--shape=8b: not one of"),
        (["--methods=dpa"], "Did you mean 'dppa'"),
        (["--repeats=0"], "--repeats=0"),
        (["--scaling", "--device=cpu"], "give one of them"),
        (["--scaling", "--shape=0.3b,1.1b"], "give one shape"),
        (["--device=npu"], "--device=npu: not one of"),
    ],
)
def test_wrong_flags_are_refused(wrong, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        launch("--job=benchmark", f"--workdir={tmp_path}", *wrong)
    assert not (tmp_path / "benchmark").exists()


# ---- the arithmetic on a device


@pytest.mark.slow
def test_device_benchmark_times_the_stages_of_a_merge(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setattr(device, "COPIED", 1 << 20)
    monkeypatch.setitem(families.SHAPES, "tiny", (64, 96, 6, 4, 2))
    monkeypatch.setattr(device, "_from_disk", lambda *_: {"shape": "tiny", "seconds": 1.0})
    (tmp_path / "benchmark").mkdir()
    launch(*flags(tmp_path, "--device=cpu"))
    result = json.loads((tmp_path / "benchmark" / "device-cpu-tiny.json").read_text())
    moved = {name: stage["moved_bytes"] for name, stage in result["stages"].items()}
    config = model_config("tiny")
    assert moved["apply"] == 5 * 2 * parameters(config)  # base and three experts are read, the merge is written
    assert moved["tables, apply, check for NaN"] == 6 * 2 * parameters(config)
    linears = 6 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
    assert moved["survey"] == 2 * 3 * 2 * 2 * linears  # two reads, of three experts and the base with each
    assert moved["thresholds"] >= moved["survey"] / 2
    assert all(stage["seconds"] > 0 for stage in result["stages"].values())
    assert result["copy_bandwidth"] > 0
    assert "goal" in capsys.readouterr().out


def test_a_device_that_is_not_there_is_an_error_that_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setattr(device.jax.config, "update", lambda *_: None)
    monkeypatch.setattr(device.jax, "devices", absent)
    with pytest.raises(SystemExit, match=r"--device=gpu: JAX finds none here .*jax\[cuda12\]"):
        launch(*flags(tmp_path, "--device=gpu"))


def absent():
    raise RuntimeError("Unknown backend cuda")


# ---- several processes


def test_scaling_runs_every_number_of_processes_on_the_family_and_on_larger_ones(tmp_path, monkeypatch, capsys):
    """The processes themselves are tested with merges; here they are stood in for."""
    ran = []

    def timed(commands, output, cores=()):
        ran.append((commands, output, cores))
        return TimedRun(12.0 / len(commands), 10**9, 24.0, merge_seconds=5.0)

    monkeypatch.setattr(scaling, "timed", timed)
    launch(*flags(tmp_path, "--scaling"))
    warm, *runs = ran
    assert len(warm[0]) == 1
    layers = [model_config_of(output) for _, output, _ in runs]
    assert [(len(commands), count) for (commands, *_), count in zip(runs, layers, strict=True)] == [
        (1, 2),
        (2, 2),
        (4, 2),
        (2, 4),
        (4, 8),
    ]
    commands, _, cores = runs[2]
    assert [command[-2:] for command in commands] == [["--num_processes=4", f"--process_id={i}"] for i in range(4)]
    assert len({command[-3] for command in commands}) == 1
    assert commands[0][-3].startswith("--coordinator=127.0.0.1:")
    assert len(cores) == 4
    printed = capsys.readouterr().out
    assert printed.count("strong") == 3
    assert printed.count("weak") == 3
    lines = [line.replace("│", " ").split() for line in printed.splitlines()]
    assert ["strong", "4", "2", "3.0", "100%", "5.0", "25%"] in [line[:2] + line[3:8] for line in lines]
    assert ["weak", "4", "8", "3.0", "400%", "5.0", "100%"] in [line[:2] + line[3:8] for line in lines]
    assert "take turns" in printed.replace("\n", " ")
    result = json.loads((tmp_path / "benchmark" / "scaling-tiny.json").read_text())
    assert result["strong"]["4"]["seconds"] == 3.0


def model_config_of(output) -> int:
    return json.loads((output.parent.parent / "base" / "config.json").read_text())["num_hidden_layers"]
