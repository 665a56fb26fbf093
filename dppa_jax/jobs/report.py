"""--job=report: methods against rates, single experts and merges, as the paper's tables and figures."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from dppa_jax.config.merge import Coefficient, MergeConfig, default_partitions
from dppa_jax.config.report import Sweep
from dppa_jax.config.run import JobConfig
from dppa_jax.config.search import ADAMERGING, Factors
from dppa_jax.delta.presets import METHODS
from dppa_jax.demo import families
from dppa_jax.evaluate.scores import Scores
from dppa_jax.evaluate.tasks import Task, every_task
from dppa_jax.jobs.evaluated import announce, check_searched, domains_of, evaluation_of, find_coefficients
from dppa_jax.jobs.evaluated_merge import merge_and_report
from dppa_jax.jobs.models import check_outputs
from dppa_jax.report import figures, published
from dppa_jax.report.measurements import Measurements, Merged
from dppa_jax.report.paper import paper_tables, raw
from dppa_jax.report.sections import (
    adamerging_figures,
    adamerging_notes,
    finish,
    illustration,
    run_of,
    search_figures,
    search_notes,
)
from dppa_jax.report.tables import ResultTable
from dppa_jax.runtime.progress import steps
from dppa_jax.search.adamerging import AdaMerged
from dppa_jax.search.candidates import Candidates
from dppa_jax.search.factors import Searched, search_expert
from dppa_jax.search.mixture import check_combine

Domains = Mapping[str, Sequence[Task]]


class Compared(NamedTuple):
    """A model of the report; `expert` is None for the merge of all. `coefficients` is a key of ADAMERGING or empty."""

    method: str
    rate: float
    expert: str | None
    coefficients: str = ""

    @property
    def has_seed(self) -> bool:
        return METHODS[self.method].score == "random" or bool(self.coefficients)

    @property
    def name(self) -> str:
        parts = self.method, f"{self.rate:g}", self.expert or "merge", self.coefficients
        return "-".join(part for part in parts if part)


@dataclass
class Measuring:
    """The models of one seed, and what has been found about them."""

    job: JobConfig
    sweep: Sweep
    domains: Domains
    candidates: Candidates
    searched: dict[Compared, Searched] = field(default_factory=dict)
    adamerged: dict[Compared, AdaMerged] = field(default_factory=dict)

    def measure(self, advance, first: Measurements | None = None) -> Measurements:
        """Of this seed; only of models with random scores where `first` has measured the same models with another."""
        every = every_task(self.job.evaluation.tasks)
        if first:
            found = Measurements(first.base, first.experts, {}, {})
        else:
            found = Measurements(self.candidates.dense("base", every), {}, {}, {})
            for domain, tasks in self.domains.items():
                found.experts.update(self.candidates.dense(domain, tasks))
        for model in compared(self.sweep, self.domains):
            if first and not model.has_seed:
                pass
            elif model.expert is None:
                merged = Merged(model.method, model.rate, model.coefficients)
                found.merged[merged] = self.scores(model, tuple(self.job.experts), every)
            else:
                single = (model.method, model.rate, model.expert)
                found.single[single] = self.scores(model, (model.expert,), self.domains[model.expert])
            advance()
        return found

    def scores(self, model: Compared, experts: tuple[str, ...], tasks: Sequence[Task]) -> Scores:
        config = config_of(model, experts, self.job.merge, self.sweep)
        if METHODS[model.method].scale == "partition":
            config = replace(config, factors={name: self.factors(model, name) for name in experts})
        if model.coefficients:
            config = replace(config, coefficients=self.coefficients(model, config))
        return self.candidates.merged(model.name, self.candidates.merger(config), tasks)

    def coefficients(self, model: Compared, config: MergeConfig) -> Mapping[str, Coefficient]:
        seed = self.job.merge.seed
        given = replace(self.sweep.adamerging, granularity=ADAMERGING[model.coefficients], seed=seed)
        place = Path(self.job.workdir) / f"{model.name}-seed{seed}"
        self.adamerged[model] = find_coefficients(self.candidates, self.domains, config, given, place)
        return self.adamerged[model].coefficients

    def factors(self, model: Compared, expert: str) -> Factors:
        given = self.job.search.given.get(expert) if self.job.search else self.sweep.factors
        if given is not None:
            if METHODS[model.method].score == "random":
                return ()  # MergeConfig's, which are of another size than those of magnitudes
            partitions = len(default_partitions(model.rate))
            return (*given, *[1.0] * partitions)[:partitions]
        alone = Compared(model.method, model.rate, expert)  # whose factors the merges take, too
        if alone not in self.searched:
            place = Path(self.job.workdir) / f"{model.method}-{model.rate:g}-seed{self.job.merge.seed}"
            config = config_of(alone, (expert,), self.job.merge, self.sweep)
            self.searched[alone] = search_expert(
                self.candidates, expert, self.domains[expert], self.job.search, config, place
            )
        return self.searched[alone].result.factors


def config_of(model: Compared, experts: tuple[str, ...], given: MergeConfig, sweep: Sweep) -> MergeConfig:
    """With the numbers of the command line; a single expert has coefficient 1."""
    merged = model.expert is None
    kept = ("max_fluctuation", "significance_multiple", "dpa_combine", "delta_dtype", "output_dtype", "seed")
    return MergeConfig(
        experts=experts,
        method=model.method,
        rate=model.rate,
        coefficients=given.coefficients if merged else {},
        tensor_coefficients=given.tensor_coefficients if merged else (),
        tensor_rates=given.tensor_rates if METHODS[model.method].score else (),
        q={name: sweep.q[name] for name in experts if name in sweep.q and METHODS[model.method].scale == "q"},
        allow_nonfinite=given.allow_nonfinite,
        **{name: getattr(given, name) for name in kept},
    )


def check_sweep(job: JobConfig, sweep: Sweep, domains: Domains) -> None:
    """Refuse now what could not be measured later."""
    for model in compared(sweep, domains):
        config = config_of(model, tuple(job.experts) if model.expert is None else (model.expert,), job.merge, sweep)
        if job.search and config.scale == "partition":
            job.search.config(config).ranges(len(config.partitions))
            if model.expert is None:
                check_searched(job, domains)
        if model.coefficients:
            check_combine(config)


def run_report(job: JobConfig, sweep: Sweep) -> list[ResultTable]:
    """Measure, print and write the report to --workdir; with --output also the merge that the flags describe."""
    domains = domains_of(job)
    check_sweep(job, sweep, domains)
    if job.output:
        check_outputs(job)
    demo = any(where.startswith("demo:") for where in (job.base, *job.experts.values()))
    if demo:
        families(sweep.seeds)  # trained side by side where they are missing
    searched: dict[int, dict[Compared, Searched]] = {}
    adamerged: dict[int, dict[Compared, AdaMerged]] = {}
    measured: dict[int, Measurements] = {}
    with evaluation_of(job) as evaluation:
        finds = any(model.coefficients for model in compared(sweep, domains))
        announce(evaluation, job.evaluation, job.search, sweep.adamerging if finds else job.adamerging)
        if job.output:
            with Candidates(job, evaluation) as candidates:
                merge_and_report(replace(job, workdir=str(Path(job.workdir) / "merge")), candidates, domains)
        total = len(sweep.seeds) * sum(1 for _ in compared(sweep, domains))
        with steps("evaluate", total) as advance:
            for seed in sweep.seeds:
                of_seed = replace(job, merge=replace(job.merge, seed=seed))
                with Candidates(of_seed, evaluation) as candidates:
                    measuring = Measuring(of_seed, sweep, domains, candidates)
                    first = None if demo or not measured else measured[sweep.seeds[0]]
                    measured[seed] = measuring.measure(advance, first)
                    searched[seed], adamerged[seed] = measuring.searched, measuring.adamerged
        models = {"base": job.base, **job.experts}
        tables = paper_tables(measured, domains, len(job.experts), published.is_papers(job.base, job.experts))
        run = run_of("Methods and rates", job.command, models, job.evaluation, evaluation, tables)
    first = {model.name: one for model, one in searched[sweep.seeds[0]].items()}
    found = {model.name: one for model, one in adamerged[sweep.seeds[0]].items()}
    run = replace(
        run,
        figures=[*_rate_figures(measured, domains, sweep), *search_figures(first), *adamerging_figures(found)],
        data={"measured": raw(measured), "searches": _by_seed(searched), "adamerging": _by_seed(adamerged)},
        notes=[*search_notes(first), *(adamerging_notes(sweep.adamerging) if finds else [])],
    )
    finish(Path(job.workdir), run)
    return tables


def compared(sweep: Sweep, domains: Domains) -> Iterator[Compared]:
    """Every model to measure."""
    for method, rate in _rows(sweep.methods, sweep.rates):
        for expert in domains:
            yield Compared(method, rate, expert)
    for name in sweep.merge_methods:
        method, _, coefficients = name.partition("+")
        for _, rate in _rows([method], sweep.rates):
            yield Compared(method, rate, None, coefficients)


def _by_seed(found: Mapping[int, Mapping[Compared, Searched | AdaMerged]]) -> dict:
    return {str(seed): {model.name: one.as_dict() for model, one in of.items()} for seed, of in found.items()}


def _rows(methods: Sequence[str], rates: Sequence[float]) -> Iterator[tuple[str, float]]:
    for method in methods:
        for rate in rates if METHODS[method].score else (0.0,):
            yield method, rate


def _rate_figures(measured: Mapping[int, Measurements], domains: Domains, sweep: Sweep):
    if len(sweep.rates) < 2 or not sweep.methods:
        return []
    accuracy = figures.against_rate(figures.accuracy_panels(measured, domains), "accuracy")
    ratio = figures.against_rate(figures.ratio_panels(measured, domains), "domain ratio")
    return [
        illustration("accuracy", accuracy, "Accuracy of single experts against the share removed."),
        illustration("ratio", ratio, "Domain ratio of single experts against the share removed."),
    ]
