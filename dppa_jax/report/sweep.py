"""--job=report: methods against rates, single experts and merges, as the paper's tables 1 and 5."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from absl import logging
from transformers import AutoTokenizer

from dppa_jax.config import MergeConfig, choose, default_partitions
from dppa_jax.delta.methods import METHODS
from dppa_jax.demo import families
from dppa_jax.evaluate.local import evaluate
from dppa_jax.evaluate.ratios import domain_ratio
from dppa_jax.evaluate.tasks import Task, by_domain
from dppa_jax.jobs import JobConfig, run_merge
from dppa_jax.memory import Model, load, merge
from dppa_jax.model import LlamaConfig
from dppa_jax.progress import console, steps
from dppa_jax.report.tables import Cell, ResultTable

Accuracies = dict[str, float]  # by task


@dataclass(frozen=True)
class Sweep:
    """What the report compares.

    Attributes:
      tasks: names; their domains must be names of experts.
      methods: of the table of single experts.
      merge_methods: of the table of merges of all experts.
      rates: of both; methods that prune nothing appear once.
      factors: DPA's, of the partitions from 0.9 down; a rate takes as many as it has partitions.
      seeds: of the demo family and of random scores; cells are means over them.
    """

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    merge_methods: tuple[str, ...]
    rates: tuple[float, ...]
    factors: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0,)
    limit: int | None = None

    def __post_init__(self):
        for flag, names in (("--methods", self.methods), ("--merge_methods", self.merge_methods)):
            for name in names:
                choose(flag, name, METHODS)
        for rate in self.rates:
            if not 0.0 <= rate <= 1.0:
                raise ValueError(f"--rates: {rate} is outside [0, 1]; it is the share that is removed.")
        if not self.tasks:
            raise ValueError("--evaluate is empty: name the tasks, for example --evaluate=addition,sentiment.")
        if not self.seeds or not (self.methods or self.merge_methods):
            raise ValueError("--job=report needs --methods or --merge_methods, and at least one of --seeds.")


class Measured(NamedTuple):
    """Accuracies with one seed: of the dense models, and of every pruned expert and merge."""

    base: Accuracies
    experts: Accuracies
    single: dict[tuple[str, float, str], Accuracies]  # (method, rate, expert)
    merged: dict[tuple[str, float], Accuracies]


def run_report(job: JobConfig, sweep: Sweep) -> list[ResultTable]:
    """Measure, print and write the tables to --workdir; with --output also the merge that the flags describe."""
    domains = by_domain(sweep.tasks)
    for domain in domains:
        choose("--evaluate: expert of the domain", domain, job.experts)
    if any(where.startswith("demo:") for where in (job.base, *job.experts.values())):
        families(sweep.seeds)  # trained side by side where they are missing
    if job.output:
        run_merge(job)
    total = len(sweep.seeds) * sum(1 for _ in _candidates(sweep, domains))
    with steps("evaluate", total) as advance:
        measured = {seed: _measure(job, sweep, domains, seed, advance) for seed in sweep.seeds}
    tables = [_dense(measured, domains)]
    tables += [_singles(measured, sweep, domains)] if sweep.methods else []
    tables += [_merges(measured, sweep, domains)] if sweep.merge_methods else []
    _write(Path(job.workdir), tables, measured)
    for table in tables:
        console().print(table.printed())
    logging.info("tables as JSON, CSV and markdown: %s", job.workdir)
    return tables


def _measure(job: JobConfig, sweep: Sweep, domains: Mapping[str, list[Task]], seed: int, advance) -> Measured:
    base = load(job.base, seed)
    experts = {name: load(where, seed) for name, where in job.experts.items()}
    tokenizer = AutoTokenizer.from_pretrained(base.directory)
    config = LlamaConfig.from_hf(base.config)
    every = [task for tasks in domains.values() for task in tasks]

    def accuracies(model: Model, tasks: Sequence[Task]) -> Accuracies:
        found = evaluate(config, model.tree, tokenizer, tasks, limit=sweep.limit)
        return {name: result.accuracy for name, result in found.items()}

    measured = Measured(accuracies(base, every), {}, {}, {})
    for domain, tasks in domains.items():
        measured.experts.update(accuracies(experts[domain], tasks))
    for method, rate, expert in _candidates(sweep, domains):
        chosen = experts if expert is None else {expert: experts[expert]}
        options = _options(method, rate, tuple(chosen), sweep, job.merge if expert is None else None, seed)
        merged = merge(base, chosen, method, mesh=job.mesh, **options)
        if expert is None:
            measured.merged[method, rate] = accuracies(merged, every)
        else:
            measured.single[method, rate, expert] = accuracies(merged, domains[expert])
        advance()
    return measured


def _candidates(sweep: Sweep, domains: Mapping) -> Iterator[tuple[str, float, str | None]]:
    """(method, rate, expert) of every model to measure; expert None is the merge of all."""
    for method, rate in _rows(sweep.methods, sweep.rates):
        for expert in domains:
            yield method, rate, expert
    for method, rate in _rows(sweep.merge_methods, sweep.rates):
        yield method, rate, None


def _rows(methods: Sequence[str], rates: Sequence[float]) -> Iterator[tuple[str, float]]:
    for method in methods:
        for rate in rates if METHODS[method].score else (0.0,):
            yield method, rate


def _options(method: str, rate: float, experts: tuple[str, ...], sweep: Sweep, given: MergeConfig | None, seed: int):
    """A single expert has coefficient 1; a merge has those of the command line."""
    options = {"rate": rate, "seed": seed}
    if METHODS[method].scale == "partition" and sweep.factors:
        factors = sweep.factors[: len(default_partitions(rate))]
        options["factors"] = dict.fromkeys(experts, factors)
    if given:
        options["coefficients"] = given.coefficients
    return options


def _dense(measured: Mapping[int, Measured], domains: Mapping[str, list[Task]]) -> ResultTable:
    rows = {
        f"{domain}: {task.name}": [
            Cell(tuple(m.base[task.name] for m in measured.values())),
            Cell(tuple(m.experts[task.name] for m in measured.values())),
        ]
        for domain, tasks in domains.items()
        for task in tasks
    }
    return ResultTable("Accuracy of the dense models (%)", "task", ("base", "its expert"), rows)


def _singles(measured: Mapping[int, Measured], sweep: Sweep, domains: Mapping[str, list[Task]]) -> ResultTable:
    rows = {}
    for domain, tasks in domains.items():
        for rate in sweep.rates:
            rows[f"{domain} {100 * rate:g} %"] = [
                Cell(
                    tuple(
                        _ratio(m.single[method, rate if METHODS[method].score else 0.0, domain], m.experts, tasks)
                        for m in measured.values()
                    )
                )
                for method in sweep.methods
            ]
    return ResultTable("Domain ratios of single experts, pruned (%)", "domain, rate", sweep.methods, rows)


def _merges(measured: Mapping[int, Measured], sweep: Sweep, domains: Mapping[str, list[Task]]) -> ResultTable:
    rows = {}
    for method, rate in _rows(sweep.merge_methods, sweep.rates):
        name = f"{method} {100 * rate:g} %" if METHODS[method].score else method
        rows[name] = [
            Cell(tuple(_ratio(m.merged[method, rate], m.experts, tasks) for m in measured.values()))
            for tasks in domains.values()
        ]
    return ResultTable("Domain ratios of the merge of all experts (%)", "method, rate", tuple(domains), rows)


def _ratio(found: Accuracies, experts: Accuracies, tasks: Sequence[Task]) -> float:
    return domain_ratio([found[task.name] for task in tasks], [experts[task.name] for task in tasks])


def _write(workdir: Path, tables: Sequence[ResultTable], measured: Mapping[int, Measured]) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    names = {table.title: f"table_{i}" for i, table in enumerate(tables)}
    for table in tables:
        (workdir / f"{names[table.title]}.csv").write_text(table.csv())
    (workdir / "tables.md").write_text("\n".join(f"{table.title}\n\n{table.markdown()}" for table in tables))
    content = {"tables": {names[table.title]: table.as_dict() for table in tables}}
    content["accuracies"] = {
        seed: {
            "base": m.base,
            "experts": m.experts,
            "single": [_named(key, found) for key, found in m.single.items()],
            "merged": [_named(key, found) for key, found in m.merged.items()],
        }
        for seed, m in measured.items()
    }
    (workdir / "tables.json").write_text(json.dumps(content, indent=1) + "\n")


def _named(key: tuple, found: Accuracies) -> dict:
    return {**dict(zip(("method", "rate", "expert"), key, strict=False)), "accuracies": found}
