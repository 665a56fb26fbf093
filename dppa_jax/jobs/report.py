"""--job=report: compare methods and rates, for single experts and merges, in tables and figures like the paper's."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from dppa_jax.config.merge import MergeConfig, parameters_of
from dppa_jax.config.numbers import Coefficient, default_partitions
from dppa_jax.config.report import ReportConfig, Sweep
from dppa_jax.config.run import JobConfig
from dppa_jax.config.search import ADAMERGING, Factors
from dppa_jax.delta.presets import METHODS
from dppa_jax.delta.scale import SCALES
from dppa_jax.delta.score import SCORES
from dppa_jax.demo import families
from dppa_jax.evaluate.scores import Scores
from dppa_jax.evaluate.tasks import Task, every_task
from dppa_jax.jobs.evaluated import (
    announce,
    candidates_of,
    check_searched,
    domains_of,
    evaluation_of,
    find_coefficients,
)
from dppa_jax.jobs.evaluated_merge import merge_and_report
from dppa_jax.jobs.models import check_outputs
from dppa_jax.report import published
from dppa_jax.report.curves import accuracy_panels, draw_against_rate, ratio_panels
from dppa_jax.report.measurements import Measurements, Merged
from dppa_jax.report.page import Illustration
from dppa_jax.report.paper import paper_tables, raw
from dppa_jax.report.sections import (
    adamerging_figures,
    adamerging_notes,
    finish,
    illustration,
    new_report,
    search_figures,
    search_notes,
    show,
)
from dppa_jax.report.tables import ResultTable
from dppa_jax.runtime.ahead import imported_ahead
from dppa_jax.runtime.progress import steps
from dppa_jax.search.adamerging_state import AdaMerged
from dppa_jax.search.candidates import Candidates
from dppa_jax.search.factors import Searched, search_expert
from dppa_jax.search.mixture import check_combine

Domains = Mapping[str, Sequence[Task]]


class Compared(NamedTuple):
    """A model of the report.

    Attributes:
      method: a preset of `--method`.
      rate: the share removed; 0 for a method that prunes nothing.
      expert: the name of a single expert; None for the merge of all.
      coefficients: how they are found, a key of ADAMERGING; empty if they are given.
    """

    method: str
    rate: float
    expert: str | None
    coefficients: str = ""

    @property
    def has_seed(self) -> bool:
        """Whether another seed gives another model."""
        return self.has_random_score or bool(self.coefficients)

    @property
    def has_random_score(self) -> bool:
        """Whether a random number decides what is kept."""
        score = METHODS[self.method].score
        return score is not None and SCORES[score].random

    @property
    def name(self) -> str:
        """A name for files and logs, such as "dppa-0.8-math"."""
        parts = self.method, f"{self.rate:g}", self.expert or "merge", self.coefficients
        return "-".join(part for part in parts if part)


@dataclass
class SeedRun:
    """Measures all models with one seed, and keeps the searches and coefficients that they needed."""

    job: JobConfig
    sweep: Sweep
    domains: Domains
    candidates: Candidates
    searched: dict[Compared, Searched] = field(default_factory=dict)
    adamerged: dict[Compared, AdaMerged] = field(default_factory=dict)

    def measure(self, advance, first: Measurements | None = None) -> Measurements:
        """Return the scores of this seed's models.

        `first` holds the scores of the same dense models with another seed. The base, the experts and models that no
        seed changes are then not measured again.
        """
        every = every_task(self.job.evaluation.tasks)
        if first:
            measured = Measurements(first.base, first.experts, {}, {})
        else:
            measured = Measurements(self.candidates.dense("base", every), {}, {}, {})
            for domain, tasks in self.domains.items():
                measured.experts.update(self.candidates.dense(domain, tasks))
        for model in compared(self.sweep, self.domains):
            if first and not model.has_seed:
                pass
            elif model.expert is None:
                merged = Merged(model.method, model.rate, model.coefficients)
                measured.merged[merged] = self.scores(model, tuple(self.job.experts), every)
            else:
                single = (model.method, model.rate, model.expert)
                measured.single[single] = self.scores(model, (model.expert,), self.domains[model.expert])
            advance()
        return measured

    def scores(self, model: Compared, experts: tuple[str, ...], tasks: Sequence[Task]) -> Scores:
        """Return the scores of one model, with the factors and coefficients that it needs."""
        config = config_of(model, experts, self.job.merge, self.sweep)
        if config.takes_factors:
            config = replace(config, factors={name: self.factors(model, name) for name in experts})
        if model.coefficients:
            config = replace(config, coefficients=self.coefficients(model, config))
        return self.candidates.merged(model.name, self.candidates.opened.merger(config), tasks)

    def coefficients(self, model: Compared, config: MergeConfig) -> Mapping[str, Coefficient]:
        """Find the coefficients of a merge by AdaMerging."""
        seed = self.job.merge.seed
        adamerging = replace(self.sweep.adamerging, granularity=ADAMERGING[model.coefficients], seed=seed)
        place = Path(self.job.workdir) / f"{model.name}-seed{seed}"
        self.adamerged[model] = find_coefficients(self.candidates, self.domains, config, adamerging, place)
        return self.adamerged[model].coefficients

    def factors(self, model: Compared, expert: str) -> Factors:
        """Return the factors of an expert: those given, or those of a search, which is made once for each rate."""
        given = self.job.search.given.get(expert) if self.job.search else self.sweep.factors
        if given is not None:
            if model.has_random_score:
                return ()  # the default of MergeConfig: factors for magnitudes are of another size
            partitions = len(default_partitions(model.rate))
            return (*given, *[1.0] * partitions)[:partitions]
        alone = Compared(model.method, model.rate, expert)  # merges take the factors of the single expert
        if alone not in self.searched:
            place = Path(self.job.workdir) / f"{model.method}-{model.rate:g}-seed{self.job.merge.seed}"
            config = config_of(alone, (expert,), self.job.merge, self.sweep)
            self.searched[alone] = search_expert(
                self.candidates, expert, self.domains[expert], self.job.search, config, place
            )
        return self.searched[alone].result.factors


def config_of(model: Compared, experts: tuple[str, ...], given: MergeConfig, sweep: Sweep) -> MergeConfig:
    """Return the config of one model: the numbers of `given` with the model's method, rate and own numbers.

    A single expert has coefficient 1. Factors are plain here; `SeedRun` fills in others.
    """
    preset, merged = METHODS[model.method], model.expert is None
    own = parameters_of(preset.score, preset.scale)
    return replace(
        given,
        experts=experts,
        method=model.method,
        **dict.fromkeys(("score", "allocate", "scale", "combine")),  # the method's own
        rate=model.rate,
        partitions=(),
        factors={},
        q={name: sweep.q[name] for name in experts if name in sweep.q and SCALES[preset.scale].takes_q},
        coefficients=given.coefficients if merged else {},
        tensor_coefficients=given.tensor_coefficients if merged else (),
        tensor_rates=given.tensor_rates if preset.score else (),
        method_options={name: value for name, value in sweep.method_options.items() if name in own},
    )


def check_sweep(job: JobConfig, sweep: Sweep, domains: Domains) -> None:
    """Refuse, before anything is measured, what cannot be measured."""
    for model in compared(sweep, domains):
        config = config_of(model, tuple(job.experts) if model.expert is None else (model.expert,), job.merge, sweep)
        if job.search and config.takes_factors:
            job.search.config(config).ranges(len(config.partitions))
            if model.expert is None:
                check_searched(job, domains)
        if model.coefficients:
            check_combine(config)


def run_report(config: ReportConfig) -> list[ResultTable]:
    """Measure all models, print the tables and write the report to --workdir.

    With --output, make and evaluate the merge that the flags describe as well.
    """
    job, sweep = config.run, config.sweep
    domains = domains_of(job)
    check_sweep(job, sweep, domains)
    if job.output:
        check_outputs(job)
    demo = any(where.startswith("demo:") for where in (job.base, *job.experts.values()))
    if demo:
        with imported_ahead("transformers.models.auto.tokenization_auto", "scipy.stats"):
            families(sweep.seeds)  # trains those that are missing, side by side
    searched: dict[int, dict[Compared, Searched]] = {}
    adamerged: dict[int, dict[Compared, AdaMerged]] = {}
    measured: dict[int, Measurements] = {}
    with evaluation_of(job) as evaluation:
        finds = any(model.coefficients for model in compared(sweep, domains))
        announce(evaluation, job.evaluation, job.search, sweep.adamerging if finds else job.adamerging)
        if job.output:
            with candidates_of(job, evaluation, writes=True) as candidates:
                merge_and_report(replace(job, workdir=str(Path(job.workdir) / "merge")), candidates, domains)
        total = len(sweep.seeds) * sum(1 for _ in compared(sweep, domains))
        with steps("evaluate", total) as advance:
            for seed in sweep.seeds:
                seed_job = replace(job, merge=replace(job.merge, seed=seed))
                with candidates_of(seed_job, evaluation) as candidates:
                    seed_run = SeedRun(seed_job, sweep, domains, candidates)
                    first = None if demo or not measured else measured[sweep.seeds[0]]
                    measured[seed] = seed_run.measure(advance, first)
                    searched[seed], adamerged[seed] = seed_run.searched, seed_run.adamerged
        models = {"base": job.base, **job.experts}
        tables = paper_tables(measured, domains, len(job.experts), published.is_papers(job.base, job.experts))
        show(tables)
        report = new_report("Methods and rates", job.command, models, job.evaluation, evaluation, tables)
    shown = sweep.seeds[0]
    searches = {model.name: search for model, search in searched[shown].items()}
    results = {model.name: result for model, result in adamerged[shown].items()}
    report = replace(
        report,
        figures=[*_rate_figures(measured, domains, sweep), *search_figures(searches), *adamerging_figures(results)],
        data={"measured": raw(measured), "searches": _by_seed(searched), "adamerging": _by_seed(adamerged)},
        notes=[*search_notes(searches), *(adamerging_notes(sweep.adamerging) if finds else [])],
    )
    finish(Path(job.workdir), report)
    return tables


def compared(sweep: Sweep, domains: Domains) -> Iterator[Compared]:
    """Yield every model to measure."""
    for method, rate in _rows(sweep.methods, sweep.rates):
        for expert in domains:
            yield Compared(method, rate, expert)
    for name in sweep.merge_methods:
        method, _, coefficients = name.partition("+")
        for _, rate in _rows([method], sweep.rates):
            yield Compared(method, rate, None, coefficients)


def _by_seed(results: Mapping[int, Mapping[Compared, Searched | AdaMerged]]) -> dict:
    """Return searches or coefficients as JSON has them, by seed and model."""
    return {
        str(seed): {model.name: result.as_dict() for model, result in models.items()}
        for seed, models in results.items()
    }


def _rows(methods: Sequence[str], rates: Sequence[float]) -> Iterator[tuple[str, float]]:
    """Yield (method, rate); a method that prunes nothing has the rate 0 only."""
    for method in methods:
        for rate in rates if METHODS[method].score else (0.0,):
            yield method, rate


def _rate_figures(measured: Mapping[int, Measurements], domains: Domains, sweep: Sweep) -> list[Illustration]:
    """Draw accuracy and domain ratio against the share removed, if several rates were measured."""
    if len(sweep.rates) < 2 or not sweep.methods:
        return []
    accuracy = draw_against_rate(accuracy_panels(measured, domains), "accuracy")
    ratio = draw_against_rate(ratio_panels(measured, domains), "domain ratio")
    return [
        illustration("accuracy", accuracy, "Accuracy of single experts against the share removed."),
        illustration("ratio", ratio, "Domain ratio of single experts against the share removed."),
    ]
