"""--job=benchmark --peer=restart: what a candidate of a search costs, beside merging, saving and starting vLLM again.

The latter is the authors' way, here with this program's merge, which is faster than the one they have.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.table import Table

from dppa_jax.config import MergeConfig
from dppa_jax.evaluate.evaluation import make_evaluator
from dppa_jax.experiments import domains_of, opened
from dppa_jax.jobs import JobConfig
from dppa_jax.progress import console

CANDIDATES = 5
RESTARTS = 2


def run_restart_benchmark(job: JobConfig) -> dict[str, list[float]]:
    """Seconds of candidates of the first expert, printed as medians and written to WORKDIR/restart/restart.json."""
    tasks = domains_of(job)
    name = next(iter(tasks))
    expert, split = job.experts[name], "test"
    alone = MergeConfig(experts=(name,), method=job.merge.method, rate=job.merge.rate)
    factors = [tuple(1.0 + 0.1 * i for _ in alone.partitions) for i in range(1, CANDIDATES + 1)]
    root = Path(job.workdir) / "restart"
    shutil.rmtree(root, ignore_errors=True)  # nothing may be known
    seconds: dict[str, list[float]] = {"apply": [], "hand over": [], "responses": [], "merge and save": [], "start": []}
    with opened(replace(job, workdir=str(root))) as candidates:
        candidates.dense(name, tasks[name], split)  # the evaluator starts here
        merger = candidates.merger(alone)
        candidates.merged("first", merger, tasks[name], split)  # survey, thresholds and compilation
        for chosen in factors:
            candidates.merged(f"{chosen}", merger, tasks[name], split, factors={name: chosen})
            cost = candidates.cost(merger.merge_config({name: chosen}))
            seconds["apply"].append(cost.apply)
            seconds["hand over"].append(cost.hand_over)
            seconds["responses"].append(cost.generate)
    for chosen in factors[:RESTARTS]:
        output = root / "merged"
        flags = [f"--base={job.base}", f"--expert={name}={expert}", f"--output={output}", "--overwrite"]
        flags += [f"--method={job.merge.method}", f"--rate={job.merge.rate}", f"--factors={','.join(map(str, chosen))}"]
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "dppa_jax.launch", *flags], check=True, capture_output=True)
        seconds["merge and save"].append(time.perf_counter() - started)
        evaluator = make_evaluator(job.evaluation, root)
        started = time.perf_counter()
        evaluator.use(output)
        seconds["start"].append(time.perf_counter() - started)
        evaluator.close()
    (root / "restart.json").write_text(json.dumps(seconds, indent=1) + "\n")
    _print(seconds)
    return seconds


def _print(seconds: dict[str, list[float]]) -> None:
    def row(parts: Sequence[str]) -> float:
        return sum(float(np.median(seconds[part])) for part in parts)

    ways = {"in place": ("apply", "hand over"), "merge, save, start again": ("merge and save", "start")}
    table = Table("a candidate", "seconds before its responses", title="median seconds", caption="the same evaluator")
    for way, parts in ways.items():
        each = ", ".join(f"{part} {np.median(seconds[part]):.2f}" for part in parts)
        table.add_row(way, f"{row(parts):.2f} ({each})")
    table.add_row("responses, in both", f"{row(['responses']):.2f}")
    table.add_row("times as fast", f"{row(ways['merge, save, start again']) / row(ways['in place']):.1f}")
    console().print(table)
