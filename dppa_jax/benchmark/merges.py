"""--job=benchmark: time whole merges of synthetic checkpoints, as processes, beside mergekit and an I/O floor."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import psutil
from absl import logging
from rich.table import Table

from dppa_jax.benchmark.families import EXPERTS, SHAPES, make_family, model_config, parameters
from dppa_jax.checkpoint import SafetensorsDirectory, SafetensorsWriter
from dppa_jax.config.benchmark import BenchmarkConfig
from dppa_jax.config.merge import axis
from dppa_jax.config.option import choose
from dppa_jax.delta.presets import METHODS
from dppa_jax.runtime.directories import scratch_directory
from dppa_jax.runtime.files import write_whole
from dppa_jax.runtime.progress import console
from dppa_jax.runtime.reading import read_json

OURS = {
    "task_arithmetic": ["--method=task_arithmetic", "--coefficient=0.3"],
    "dare": ["--method=dare", "--rate=0.9", "--coefficient=0.3"],
    "ties": ["--method=ties", "--rate=0.9", "--coefficient=0.3"],
    "della": ["--method=della", "--rate=0.7", "--coefficient=0.3"],
    "dppa": ["--method=dppa", "--rate=0.8", "--factors=1.8,1.3", "--coefficient=0.3"],
    "linear": ["--method=linear"],
    "slerp": ["--method=slerp", "--coefficient=0.5"],
    "model_stock": ["--method=model_stock"],
}

EXPERTS_OF = {"7b": 2}  # other shapes have three experts; those of 7 B, the base and an output would be 67 GB
COMPARED_SIZE = ("dppa", 2)  # method and number of experts that are compared over shapes; every shape has as many


class Peer(NamedTuple):
    """A recipe of mergekit: parameters of every model, and of all; is the base one of the models?"""

    each: Mapping[str, float]
    parameters: Mapping[str, float] = {}
    lists_base: bool = False


PEERS = {
    "task_arithmetic": Peer({"weight": 0.3}),
    "dare_linear": Peer({"weight": 0.3, "density": 0.1}),
    "ties": Peer({"weight": 0.3, "density": 0.1}),
    "della": Peer({"weight": 0.3, "density": 0.3}),
    "linear": Peer({"weight": 1.0}, lists_base=True),
    "slerp": Peer({}, {"t": 0.5}),
    "model_stock": Peer({}),
}
COMPARED = (("task_arithmetic", "task_arithmetic"), ("dare", "dare_linear"), ("ties", "ties"), ("della", "della"))
COMPARED += (("dppa", "dare_linear"), ("dppa", "ties"))
COMPARED += (("linear", "linear"), ("slerp", "slerp"), ("model_stock", "model_stock"))
FLOOR = "I/O floor"
SCRATCH = ".dppa_jax-scratch"  # a directory for the output that is being timed


@dataclass(frozen=True)
class TimedRun:
    """The time and memory of one command: one process, or the processes of one merge.

    Attributes:
      seconds: from the start of the first process to the end of the last.
      peak_bytes: peak resident memory of the largest process, as our merges report it. For other programs the system
        tells it, and never less than the memory of the process that started them.
      cpu_seconds: processor time of all processes, in the program and in the system.
      moved_bytes: bytes read and written, as a merge of ours reports them; 0 for other programs.
      merge_seconds: seconds from the flags to the end, as a merge of ours reports them; without interpreter, imports
        and the meeting of the processes. 0 for other programs.
      planned_seconds, planned_bytes: what --job=plan predicted; 0 if it was not asked.
    """

    seconds: float
    peak_bytes: int
    cpu_seconds: float
    moved_bytes: int = 0
    merge_seconds: float = 0.0
    planned_seconds: float = 0.0
    planned_bytes: int = 0


class Planned(msgspec.Struct):
    """What is read of plan.json."""

    host_bytes: int
    seconds: float = 0.0


class Recipe(msgspec.Struct):
    """What is read of recipe.json."""

    cost: dict[str, Any] = {}


def run_merges(config: BenchmarkConfig) -> dict[str, dict]:
    """Time methods on every shape, print tables, and write the numbers to WORKDIR/benchmark/SHAPE/benchmark.json.

    Commands run in turn, ours and the peer's, `config.repeats` times; the fastest run of each counts.

    Returns:
      `TimedRun`s as dicts, by shape and method.

    Raises:
      ValueError: an unknown shape or method.
      OSError: the disk has no room, or a process failed.
    """
    for shape in config.shape:
        choose("--shape", shape, SHAPES)
    for method in config.methods:
        choose("--methods", method, OURS)
    root = Path(config.workdir) / "benchmark"
    peer = config.peer_python if config.peer else None
    methods = config.methods or tuple(OURS)
    results = {shape: _run_shape(shape, root / shape, peer, config.repeats, methods) for shape in config.shape}
    print_sizes(root)
    return results


def _run_shape(shape: str, root: Path, peer_python: str | None, repeats: int, methods: Sequence[str]) -> dict:
    """Time all commands on one shape; `peer_python` is None if there is no peer."""
    config, experts = model_config(shape), EXPERTS[: EXPERTS_OF.get(shape, len(EXPERTS))]
    models = make_family(root, config, experts)
    output = scratch_output(root)
    commands = {FLOOR: [sys.executable, "-m", "dppa_jax.benchmark.merges", *map(str, models.values()), str(output)]}
    commands |= {name: merge_command(_taken(name, models), output, OURS[name]) for name in methods}
    name, several = COMPARED_SIZE
    if name in methods and len(experts) > several:
        commands[size_row()] = merge_command(dict(list(models.items())[: 1 + several]), output, OURS[name])
    if peer_python is not None:
        peers = {peer: _taken(ours, models) for ours, peer in COMPARED if ours in methods}
        commands |= _peer_commands(root, peers, output, peer_python)
    if 2 * parameters(config) * len(models) < psutil.virtual_memory().available:
        timed([commands[FLOOR]], output)  # fills the page cache, if it can hold the models
    runs: dict[str, TimedRun] = {}
    for _ in range(repeats):
        for name, command in commands.items():
            planned = _plan(command, root) if name in OURS or name == size_row() else {}
            run = replace(timed([command], output), **planned)
            logging.info("%s, %s: %.1f s, peak %.2f GB", shape, name, run.seconds, run.peak_bytes / 1e9)
            runs[name] = min(runs.get(name, run), run, key=lambda r: r.seconds)
    result = {name: asdict(run) for name, run in runs.items()}
    write_whole(root / "benchmark.json", json.dumps(result, indent=1) + "\n")
    _print(shape, len(experts), runs)
    return result


def merge_command(models: Mapping[str, Path], output: Path, flags: Sequence[str]) -> list[str]:
    """Return the command that merges a family's experts."""
    base, *experts = models.items()
    where = [f"--base={base[1]}", *(f"--expert={name}={path}" for name, path in experts), f"--output={output}"]
    return [sys.executable, "-m", "dppa_jax.launch", *where, "--overwrite", *flags]


def _plan(command: Sequence[str], root: Path) -> dict:
    """Return what --job=plan predicts for a merge, as fields of `TimedRun`."""
    timed([[*command, "--job=plan", f"--workdir={root}"]], scratch_output(root))
    plan = read_json(root / "plan.json", Planned)
    return {"planned_seconds": plan.seconds, "planned_bytes": plan.host_bytes}


def scratch_output(root: Path) -> Path:
    """Return where the merges of a family are written to be timed."""
    return root / SCRATCH / "out"


def timed(commands: Sequence[Sequence[str]], output: Path, cores: Sequence[int] = ()) -> TimedRun:
    """Run the processes of one merge at the same time, in a scratch directory that is removed before and after.

    Args:
      commands: a command line for each process.
      output: the directory that they write, in the scratch directory. What they print is kept beside the latter.
      cores: the core that each process is pinned to; none by default.

    Raises:
      OSError: a process failed; the message has its last lines.
    """
    with scratch_directory(output.parent):
        return _timed(commands, output, cores)


def _timed(commands: Sequence[Sequence[str]], output: Path, cores: Sequence[int]) -> TimedRun:
    logs = [output.parent.with_name(f"process{i}.log") for i in range(len(commands))]
    started = time.perf_counter()
    processes = [
        _start(command, log, cores[i : i + 1]) for i, (command, log) in enumerate(zip(commands, logs, strict=True))
    ]
    ended = [os.wait4(process.pid, 0) for process in processes]
    seconds = time.perf_counter() - started
    for command, log, (_, status, _) in zip(commands, logs, ended, strict=True):
        if status:
            raise OSError(f"{' '.join(command[:3])} failed; see {log}:\n{_last_lines(log)}")
    usages = [usage for *_, usage in ended]
    recipe = output / "recipe.json"
    cost = read_json(recipe, Recipe).cost if recipe.exists() else {}
    moved = cost.get("bytes_read", 0) + cost.get("bytes_written", 0)
    cpu = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    peak = cost.get("peak_memory") or max(usage.ru_maxrss for usage in usages) * 1024
    return TimedRun(seconds, peak, cpu, moved, cost.get("seconds", 0.0))


def _last_lines(log: Path) -> str:
    with log.open("rb") as content:
        content.seek(max(0, log.stat().st_size - 2000))
        return content.read().decode(errors="replace")


def _start(command: Sequence[str], log: Path, cores: Sequence[int]) -> subprocess.Popen:
    pin = partial(os.sched_setaffinity, 0, cores) if cores else None
    log.unlink(missing_ok=True)
    with log.open("xb") as output:  # never through a link
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, preexec_fn=pin)


def _taken(method: str, models: Mapping[str, Path]) -> dict[str, Path]:
    """Return the base and as many experts as a method takes."""
    most = axis("combine")[METHODS[method].combine].experts[1]
    return dict(list(models.items())[: most and 1 + most])


def _peer_commands(
    root: Path, peers: Mapping[str, Mapping[str, Path]], output: Path, peer_python: str
) -> dict[str, list[str]]:
    """Write mergekit's recipes of these models, and return the commands that run them."""
    commands = {}
    mergekit = Path(peer_python or sys.executable).parent / "mergekit-yaml"
    for name, models in peers.items():
        recipe = root / f"{name}.json"
        write_whole(recipe, json.dumps(_mergekit_recipe(name, models)))  # JSON is YAML
        commands[f"mergekit {name}"] = [str(mergekit), str(recipe), str(output), "--no-copy-tokenizer"]
    return commands


def _mergekit_recipe(name: str, models: Mapping[str, Path]) -> dict:
    peer, (base, *experts) = PEERS[name], models.values()
    listed = [base, *experts] if peer.lists_base else experts
    entries = [{"model": str(model), "parameters": dict(peer.each)} for model in listed]
    recipe = {"models": entries, "parameters": dict(peer.parameters), "merge_method": name, "dtype": "bfloat16"}
    return recipe if peer.lists_base else {**recipe, "base_model": str(base)}


def size_row() -> str:
    """Return the name of the run that is compared over shapes."""
    method, experts = COMPARED_SIZE
    return f"{method}, {experts} experts"


def _print(shape: str, experts: int, runs: Mapping[str, TimedRun]) -> None:
    """Print the runs of one shape, and how many times as fast as the peer ours are."""
    floor = runs[FLOOR].seconds
    columns = ("method", "seconds", "planned", "peak GB", "planned", "× I/O floor")
    table = Table(*columns, title=f"{shape}, base + {experts} experts, bf16")
    for name, run in runs.items():
        table.add_row(name, *_beside_plan(run), f"{run.seconds / floor:.1f}")
    console().print(table)
    compared = [(ours, peer) for ours, peer in COMPARED if ours in runs and f"mergekit {peer}" in runs]
    if compared:
        table = Table("dppa_jax", "mergekit", "times as fast")
        for ours, theirs in compared:
            speed = runs[f"mergekit {theirs}"].seconds / runs[ours].seconds
            table.add_row(ours, theirs, f"{speed:.1f}")
        console().print(table)


def _beside_plan(run: TimedRun) -> tuple[str, str, str, str]:
    """Return seconds, planned seconds, peak memory and planned memory as a table shows them."""
    seconds = f"{run.planned_seconds:.1f}" if run.planned_seconds else ""
    peak = f"{run.planned_bytes / 1e9:.2f}" if run.planned_bytes else ""
    return f"{run.seconds:.1f}", seconds, f"{run.peak_bytes / 1e9:.2f}", peak


def print_sizes(root: Path) -> None:
    """Print the same merge of all shapes that have been timed in this directory, now or earlier."""
    runs: dict[str, TimedRun] = {}
    for shape in SHAPES:
        file = root / shape / "benchmark.json"
        rows = read_json(file, dict[str, TimedRun], fix="Remove it, and time the shape again.") if file.exists() else {}
        row = rows.get(COMPARED_SIZE[0] if EXPERTS_OF.get(shape) == COMPARED_SIZE[1] else size_row())
        if row and row.moved_bytes:
            runs[shape] = row
    if not runs:
        return
    columns = ("shape", "parameters", "seconds", "planned", "peak GB", "planned", "ns a parameter", "GB/s")
    table = Table(*columns, title=f"{size_row()}, bf16")
    for shape, run in runs.items():
        count = parameters(model_config(shape))
        each, speed = run.seconds / count * 1e9, run.moved_bytes / run.seconds / 1e9
        table.add_row(shape, f"{count / 1e9:.2f} B", *_beside_plan(run), f"{each:.2f}", f"{speed:.2f}")
    console().print(table)


def _floor(paths: list[str]) -> None:
    """Read every input once and write as many bytes as the base has, and do nothing else. No merge can be faster."""
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
