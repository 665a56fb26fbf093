"""--job=benchmark --peer=restart: time a search's candidate in place, and by merging, saving and starting vLLM.

The second way is the authors'. It is timed with this program's merge, warm and in this process. That is faster than the
authors' own, which starts a process for each of three steps and holds whole models in float32.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.table import Table

from dppa_jax.config.benchmark import BenchmarkConfig
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.run import JobConfig
from dppa_jax.evaluate.evaluation import make_evaluator
from dppa_jax.jobs.evaluated import check_search, domains_of, evaluated_candidates
from dppa_jax.jobs.models import open_job
from dppa_jax.jobs.write_merge import write_merge
from dppa_jax.runtime.files import write_whole
from dppa_jax.runtime.progress import console

CANDIDATES = 5
RESTARTS = 2
WAYS = {"in place": ("apply", "hand over"), "merge, save, start again": ("merge and save", "start")}


def run_restart_benchmark(config: BenchmarkConfig) -> dict[str, list[float]]:
    """Time candidates of the first expert; print medians, and write all seconds to WORKDIR/restart/restart.json."""
    job = config.restart
    domains = domains_of(job)
    check_search(job)
    name, tasks = next(iter(domains.items()))
    alone = alone_of(job.merge, name)
    factors = [tuple(1.0 + 0.1 * i for _ in alone.partitions) for i in range(1, CANDIDATES + 1)]
    root = Path(job.workdir) / "restart"
    anew = replace(job.evaluation, resume=False)  # no stored responses may be reused
    job = replace(job, merge=alone, experts={name: job.experts[name]}, workdir=str(root), search=None, evaluation=anew)
    seconds: dict[str, list[float]] = {part: [] for part in ("apply", "hand over", "responses")}
    with evaluated_candidates(job) as candidates:
        candidates.dense(name, tasks)  # starts the evaluator
        merger = candidates.opened.merger(alone)
        candidates.merged("first", merger, tasks)  # pays for survey, thresholds and compilation
        for chosen in factors:
            candidates.merged(f"factors {chosen}", merger, tasks, factors={name: chosen})
            cost = candidates.cost(merger.merge_config({name: chosen}))
            for part, value in zip(seconds, (cost.apply, cost.hand_over, cost.generate), strict=True):
                seconds[part].append(value)
    seconds |= _restarts(replace(job, output=str(root / "merged"), overwrite=True), name, factors[: RESTARTS + 1])
    write_whole(root / "restart.json", json.dumps(seconds, indent=1) + "\n")
    _print(seconds)
    return seconds


def alone_of(merge: MergeConfig, expert: str) -> MergeConfig:
    """Return the merge of one expert, with coefficient 1 and plain factors, as a search of its factors begins."""
    return replace(merge, experts=(expert,), factors={}, coefficients={}, q={})


def _restarts(job: JobConfig, name: str, factors: Sequence[tuple[float, ...]]) -> dict[str, list[float]]:
    """Time merging and starting the evaluator with each candidate; leave out the first, which compiles."""
    merge_seconds, start_seconds = [], []
    for chosen in factors:
        started = time.perf_counter()
        with open_job(replace(job, merge=replace(job.merge, factors={name: chosen})), writes=True) as opened:
            write_merge(opened)
        merge_seconds.append(time.perf_counter() - started)
        evaluator = make_evaluator(job.evaluation, Path(job.workdir))
        started = time.perf_counter()
        evaluator.use(Path(job.output))
        start_seconds.append(time.perf_counter() - started)
        evaluator.close()
    return {"merge and save": merge_seconds[1:], "start": start_seconds[1:]}


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
