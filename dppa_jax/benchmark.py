"""--job=benchmark: whole merges of seeded checkpoints, as processes, beside a peer and the floor that I/O sets."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import logging
from rich.table import Table

from dppa_jax.checkpoint import SafetensorsDirectory, SafetensorsWriter, tensor_specs
from dppa_jax.config import choose
from dppa_jax.progress import console

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads
    "0.3b": (1024, 2816, 22, 16, 4),
    "1.1b": (2048, 5632, 22, 32, 4),
    "3b": (3200, 8640, 26, 32, 32),
    "7b": (4096, 11008, 32, 32, 32),
}
EXPERTS = ("expert0", "expert1", "expert2")
OURS = {
    "task_arithmetic": ["--method=task_arithmetic", "--coefficient=0.3"],
    "dare": ["--method=dare", "--rate=0.9", "--coefficient=0.3"],
    "ties": ["--method=ties", "--rate=0.9", "--coefficient=0.3"],
    "dppa": ["--method=dppa", "--rate=0.8", "--factors=1.8,1.3", "--coefficient=0.3"],
}
PEERS = {"task_arithmetic": {}, "dare_linear": {"density": 0.1}, "ties": {"density": 0.1}}
COMPARED = (("task_arithmetic", "task_arithmetic"), ("dare", "dare_linear"), ("ties", "ties"))
COMPARED += (("dppa", "dare_linear"), ("dppa", "ties"))


@dataclass(frozen=True)
class Run:
    seconds: float
    peak_bytes: int


def run_benchmark(shape: str, workdir: str, peer: str, peer_python: str, repeats: int) -> dict:
    """Time every method, the peer's methods in turn with ours; print the table and write it to WORKDIR/benchmark."""
    choose("--shape", shape, SHAPES)
    if peer:
        choose("--peer", peer, ("mergekit", "restart"))
    root = Path(workdir) / "benchmark" / shape
    models = {name: make_model(root / name, shape, name) for name in ("base", *EXPERTS)}
    commands = {
        "I/O floor": [sys.executable, "-m", "dppa_jax.benchmark", *map(str, models.values()), str(root / "out")]
    }
    for name, flags in OURS.items():
        experts = [f"--expert={e}={models[e]}" for e in EXPERTS]
        paths = [f"--base={models['base']}", *experts, f"--output={root / 'out'}", "--overwrite"]
        commands[name] = [sys.executable, "-m", "dppa_jax.launch", *paths, *flags]
    for name in PEERS if peer else ():
        recipe = root / f"{name}.json"
        recipe.write_text(json.dumps(_mergekit_recipe(name, models)))  # JSON is YAML
        mergekit = Path(peer_python or sys.executable).parent / "mergekit-yaml"
        commands[f"mergekit {name}"] = [str(mergekit), str(recipe), str(root / "out"), "--no-copy-tokenizer"]
    runs: dict[str, Run] = {}
    _timed(commands["I/O floor"], root / "warm.log")  # fills the page cache for all
    shutil.rmtree(root / "out")
    for _ in range(repeats):
        for name, command in commands.items():
            run = _timed(command, root / f"{name.replace(' ', '_').replace('/', '_')}.log")
            shutil.rmtree(root / "out")
            logging.info("%s: %.1f s, peak %.2f GB", name, run.seconds, run.peak_bytes / 1e9)
            runs[name] = min(runs.get(name, run), run, key=lambda r: r.seconds)
    result = {name: {"seconds": run.seconds, "peak_bytes": run.peak_bytes} for name, run in runs.items()}
    (root / "benchmark.json").write_text(json.dumps(result, indent=1))
    _print(shape, runs, bool(peer))
    return result


def make_model(directory: Path, shape: str, name: str) -> Path:
    """A bf16 checkpoint of seeded weights; an expert is the base plus Student-t deltas of a scale per tensor."""
    if directory.exists():
        return directory
    logging.info("making %s", directory)
    specs = tensor_specs(_config(shape))
    dtype = np.dtype(ml_dtypes.bfloat16)
    writer = SafetensorsWriter(directory, {n: (s.shape, dtype) for n, s in specs.items()}, 2_000_000_000)
    base = None if name == "base" else SafetensorsDirectory(directory.with_name("base"))
    for i, spec in enumerate(specs.values()):
        rng = np.random.default_rng([i, *name.encode()])
        noise = rng.standard_normal((spec.rows, spec.columns), np.float32)
        if base is None:
            values = noise * np.float32(0.02) if spec.layer is not None or len(spec.shape) == 2 else 1 + noise * 0
        else:
            tails = np.sqrt(rng.chisquare(4, (spec.rows, 1)).astype(np.float32) / 4)
            values = base.read(spec.name).reshape(noise.shape).astype(np.float32)
            values += noise / tails * np.float32(rng.uniform(0.0005, 0.002))
        writer.write_rows(spec.name, 0, values.astype(dtype))
    writer.commit(_config(shape))
    return directory


def _config(shape: str) -> dict:
    hidden, inner, layers, heads, kv_heads = SHAPES[shape]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def _mergekit_recipe(name: str, models: dict[str, Path]) -> dict:
    parameters = {"weight": 0.3, **PEERS[name]}
    experts = [{"model": str(models[e]), "parameters": parameters} for e in EXPERTS]
    return {"models": experts, "base_model": str(models["base"]), "merge_method": name, "dtype": "bfloat16"}


def _timed(command: list[str], log: Path) -> Run:
    """Wall time and peak resident memory of a process, its output in `log`."""
    with open(log, "w") as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
    if status:
        raise OSError(f"{command[0]} failed; see {log}:\n{log.read_text()[-2000:]}")
    return Run(seconds, usage.ru_maxrss * 1024)


def _print(shape: str, runs: dict[str, Run], peer: bool) -> None:
    floor = runs["I/O floor"].seconds
    table = Table("method", "seconds", "peak GB", "× I/O floor", title=f"{shape}, base + {len(EXPERTS)} experts, bf16")
    for name, run in runs.items():
        table.add_row(name, f"{run.seconds:.1f}", f"{run.peak_bytes / 1e9:.2f}", f"{run.seconds / floor:.1f}")
    console().print(table)
    if peer:
        table = Table("dppa_jax", "mergekit", "times as fast")
        for ours, theirs in COMPARED:
            speed = runs[f"mergekit {theirs}"].seconds / runs[ours].seconds
            table.add_row(ours, theirs, f"{speed:.1f}")
        console().print(table)


def _floor(paths: list[str]) -> None:
    """Read every input once and write the base's bytes, with nothing between: what no merge can beat."""
    *inputs, output = map(Path, paths)
    sources = [SafetensorsDirectory(path) for path in inputs]
    base = sources[0]
    writer = SafetensorsWriter(output, {n: (s.shape, base.dtype) for n, s in base.specs.items()}, 2_000_000_000)
    largest = max(tensor.nbytes for tensor in base.tensors.values())
    buffer = np.empty(largest, np.uint8)
    for spec in base.specs.values():
        for source in reversed(sources):
            source.read_rows(spec.name, 0, spec.rows, buffer)
        tensor = base.tensors[spec.name]
        writer.write_rows(spec.name, 0, buffer[: tensor.nbytes].view(tensor.dtype).reshape(spec.rows, spec.columns))
    writer.commit(base.config)


if __name__ == "__main__":
    _floor(sys.argv[1:])
