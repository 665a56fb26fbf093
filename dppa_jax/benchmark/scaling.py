"""--job=benchmark --scaling: time DPPA with 1, 2 and 4 processes, on one family and on families that grow with them."""

import json
import os
import socket
from dataclasses import asdict
from pathlib import Path

from absl import logging
from rich.table import Table

from dppa_jax.benchmark.families import EXPERTS, SHAPES, check_scratch, family_sizes, make_family, model_config
from dppa_jax.benchmark.merges import OURS, TimedRun, merge_command, scratch_output, timed
from dppa_jax.config.benchmark import BenchmarkConfig
from dppa_jax.config.option import choose
from dppa_jax.runtime.files import write_whole
from dppa_jax.runtime.progress import console

PROCESSES = (1, 2, 4)
NOTE = (
    "Merging is without the start of the processes (interpreter, imports, finding each other). "
    "Each process has one core, so that a process is what scales; more processes than the {cores} cores take turns. "
    "Up to {cores} processes the seconds are those of as many hosts that share disk, page cache and memory bandwidth, "
    "and whose network costs nothing. Beyond that only processor seconds say something: what more processes cost in "
    "all (start, compilation, statistics told to each other). What a network, or a disk for each host, would do is not "
    "seen here."
)


def run_scaling(config: BenchmarkConfig) -> dict[str, dict[int, dict]]:
    """Time strong scaling (the shape's layers) and weak scaling (N times as many layers with N processes).

    Print a table and write the numbers to WORKDIR/benchmark/scaling-SHAPE.json.

    Returns:
      `TimedRun`s as dicts, by "strong" or "weak" and the number of processes.
    """
    (shape,) = config.shape
    choose("--shape", shape, SHAPES)
    root = Path(config.workdir) / "benchmark"
    layers = model_config(shape)["num_hidden_layers"]
    places = {n: root / (shape if n == 1 else f"{shape}-{n * layers}layers") for n in PROCESSES}
    families = [family_sizes(places[n], model_config(shape, n * layers), EXPERTS) for n in PROCESSES]
    check_scratch(root, {place: size for family in families for place, size in family.items()})
    models = {n: make_family(places[n], model_config(shape, n * layers), EXPERTS) for n in PROCESSES}
    cores = sorted(os.sched_getaffinity(0))
    outputs = {n: scratch_output(places[n]) for n in PROCESSES}
    timed([merge_command(models[1], outputs[1], OURS["dppa"])], outputs[1])  # fills caches
    strong = {n: _run(models[1], outputs[1], n, cores) for n in PROCESSES}
    weak = {n: strong[1] if n == 1 else _run(models[n], outputs[n], n, cores) for n in PROCESSES}
    _print(shape, layers, strong, weak, len(cores))
    result = {name: {n: asdict(run) for n, run in runs.items()} for name, runs in (("strong", strong), ("weak", weak))}
    write_whole(root / f"scaling-{shape}.json", json.dumps(result, indent=1) + "\n")
    return result


def _run(models: dict[str, Path], output: Path, processes: int, cores: list[int]) -> TimedRun:
    """Time one merge by this number of processes, each on a core of its own as far as there are cores."""
    command = merge_command(models, output, OURS["dppa"])
    if processes > 1:
        joined = [*command, f"--coordinator=127.0.0.1:{_free_port()}", f"--num_processes={processes}"]
        commands = [[*joined, f"--process_id={i}"] for i in range(processes)]
    else:
        commands = [command]
    run = timed(commands, output, [cores[i % len(cores)] for i in range(processes)])
    logging.info("%s by %d processes: %.1f s", models["base"].parent.name, processes, run.seconds)
    return run


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _print(shape: str, layers: int, strong: dict[int, TimedRun], weak: dict[int, TimedRun], cores: int) -> None:
    columns = ("scaling", "processes", "cores", "layers", "seconds", "efficiency", "merging", "efficiency")
    title = f"{shape}, base + {len(EXPERTS)} experts, DPPA"
    table = Table(*columns, "processor seconds", "peak GB of one", title=title)
    for name, runs in (("strong", strong), ("weak", weak)):
        for n, run in runs.items():
            faster, larger = (n, 1) if name == "strong" else (1, n)
            numbers = [str(n), str(min(n, cores)), str(layers * larger)]
            for alone, seconds in ((runs[1].seconds, run.seconds), (runs[1].merge_seconds, run.merge_seconds)):
                numbers += [f"{seconds:.1f}", f"{alone / faster / seconds:.0%}"]
            table.add_row(name, *numbers, f"{run.cpu_seconds:.1f}", f"{run.peak_bytes / 1e9:.2f}")
    console().print(table)
    console().print(NOTE.format(cores=cores))
