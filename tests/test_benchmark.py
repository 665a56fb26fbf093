"""--job=benchmark on a shape small enough for a test."""

import json

import pytest

from dppa_jax import benchmark
from dppa_jax.checkpoint import SafetensorsDirectory


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(benchmark.SHAPES, "tiny", (64, 96, 2, 4, 2))


def test_models_are_seeded_bf16_checkpoints_with_deltas(tiny, tmp_path):
    first, again = (benchmark.make_model(tmp_path / where / "base", "tiny", "base") for where in "ab")
    expert = benchmark.make_model(tmp_path / "a" / "expert0", "tiny", "expert0")
    name = "model.layers.1.mlp.up_proj.weight"
    weights = [SafetensorsDirectory(path).read(name).astype(float) for path in (first, again, expert)]
    assert (weights[0] == weights[1]).all()
    assert 0 < abs(weights[2] - weights[0]).mean() < 0.01
    assert SafetensorsDirectory(first).dtype.name == "bfloat16"


def test_every_method_is_timed_beside_the_floor(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DPPA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(benchmark, "OURS", {"task_arithmetic": benchmark.OURS["task_arithmetic"]})
    benchmark.run_benchmark("tiny", str(tmp_path), "", "", 1)
    result = json.loads((tmp_path / "benchmark" / "tiny" / "benchmark.json").read_text())
    assert set(result) == {"I/O floor", "task_arithmetic"}
    assert all(run["seconds"] > 0 and run["peak_bytes"] > 1e7 for run in result.values())
    assert "task_arithmetic" in capsys.readouterr().out
