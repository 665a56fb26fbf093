"""--job=benchmark --peer=restart: what a candidate of a search costs, beside merging, saving and starting vLLM again.

The latter is the authors' way, but with this program's merge, warm and in this process: faster than theirs, which
starts a process for each of three steps and holds whole models in float32.
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.table import Table

from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.run import JobConfig
from dppa_jax.evaluate.evaluation import make_evaluator
from dppa_jax.jobs.evaluated import check_search, domains_of, opened
from dppa_jax.jobs.merge import run_merge
from dppa_jax.runtime.progress import console

CANDIDATES = 5
RESTARTS = 2
WAYS = {"in place": ("apply", "hand over"), "merge, save, start again": ("merge and save", "start")}


def run_restart_benchmark(job: JobConfig) -> dict[str, list[float]]:
    """Seconds of candidates of the first expert, printed as medians and written to WORKDIR/restart/restart.json."""
    domains = domains_of(job)
    check_search(job)
    name, tasks = next(iter(domains.items()))
    alone = MergeConfig(experts=(name,), method=job.merge.method, rate=job.merge.rate)
    factors = [tuple(1.0 + 0.1 * i for _ in alone.partitions) for i in range(1, CANDIDATES + 1)]
    root = Path(job.workdir) / "restart"
    shutil.rmtree(root, ignore_errors=True)  # nothing may be known
    job = replace(job, merge=alone, experts={name: job.experts[name]}, workdir=str(root), search=None)
    seconds: dict[str, list[float]] = {part: [] for part in ("apply", "hand over", "responses")}
    with opened(job) as candidates:
        candidates.dense(name, tasks)  # starts the evaluator
        merger = candidates.merger(alone)
        candidates.merged("first", merger, tasks)  # survey, thresholds and compilation
        for chosen in factors:
            candidates.merged(f"factors {chosen}", merger, tasks, factors={name: chosen})
            cost = candidates.cost(merger.merge_config({name: chosen}))
            for part, value in zip(seconds, (cost.apply, cost.hand_over, cost.generate), strict=True):
                seconds[part].append(value)
    seconds |= _restarts(replace(job, output=str(root / "merged"), overwrite=True), name, factors[: RESTARTS + 1])
    (root / "restart.json").write_text(json.dumps(seconds, indent=1) + "\n")
    _print(seconds)
    return seconds


def _restarts(job: JobConfig, name: str, factors: Sequence[tuple[float, ...]]) -> dict[str, list[float]]:
    """Of all but the first, which compiles."""
    merged, started = [], []
    for chosen in factors:
        began = time.perf_counter()
        run_merge(replace(job, merge=replace(job.merge, factors={name: chosen})))
        merged.append(time.perf_counter() - began)
        evaluator = make_evaluator(job.evaluation, Path(job.workdir))
        began = time.perf_counter()
        evaluator.use(Path(job.output))
        started.append(time.perf_counter() - began)
        evaluator.close()
    return {"merge and save": merged[1:], "start": started[1:]}


def _print(seconds: dict[str, list[float]]) -> None:
    median = {part: float(np.median(values)) for part, values in seconds.items()}
    table = Table("a candidate", "seconds before its responses", title="median seconds")
    totals = {way: sum(median[part] for part in parts) for way, parts in WAYS.items()}
    for way, parts in WAYS.items():
        table.add_row(way, f"{totals[way]:.2f} ({', '.join(f'{part} {median[part]:.2f}' for part in parts)})")
    table.add_row("its responses, either way", f"{median['responses']:.2f}")
    slow, fast = totals["merge, save, start again"], totals["in place"]
    table.add_row("times as fast", f"{slow / fast:.1f}")
    console().print(table)
