"""--job=report: compare methods and rates, for single experts and merges, in tables and figures like the paper's."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from dppa_jax.config.report import ReportConfig, Sweep
from dppa_jax.demo import families
from dppa_jax.jobs.compared import Compared, Domains, SeedRun, check_sweep, compared
from dppa_jax.jobs.evaluated import announce, candidates_of, domains_of, evaluation_of, experts_of
from dppa_jax.jobs.evaluated_merge import merge_and_report
from dppa_jax.jobs.models import check_outputs
from dppa_jax.report import published
from dppa_jax.report.curves import accuracy_panels, draw_against_rate, ratio_panels
from dppa_jax.report.darex import darex_tables
from dppa_jax.report.darex_published import told_table
from dppa_jax.report.measurements import Measurements
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
from dppa_jax.search.factors import Searched


def run_report(config: ReportConfig) -> list[ResultTable]:
    """Measure all models, print the tables and write the report to --workdir.

    With --output, make and evaluate the merge that the flags describe as well.
    """
    job, sweep = config.run, config.sweep
    domains = experts_of(job)
    check_sweep(job, sweep, domains)
    if job.output:
        check_outputs(job)
    places = [where for where in (job.base, *job.experts.values()) if where.startswith("demo:")]
    demo = bool(places)
    with imported_ahead("transformers.models.auto.tokenization_auto", "scipy.stats") if demo else nullcontext():
        for optimizer in sorted({where.partition("@")[2] for where in places}):
            families(sweep.seeds, optimizer)  # trains those that are missing, side by side
    searched: dict[int, dict[Compared, Searched]] = {}
    adamerged: dict[int, dict[Compared, AdaMerged]] = {}
    measured: dict[int, Measurements] = {}
    with evaluation_of(job) as evaluation:
        finds = any(model.choice.coefficients for model in compared(sweep, domains))
        announce(evaluation, job.evaluation, job.search, sweep.adamerging if finds else job.adamerging)
        if job.output:
            with candidates_of(job, evaluation, writes=True) as candidates:
                merge_and_report(replace(job, workdir=str(Path(job.workdir) / "merge")), candidates, domains_of(job))
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
        tables += darex_tables(measured, domains)
        tables += filter(None, [told_table(job.base, job.experts, job.evaluation.tasks)])
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


def _by_seed(results: Mapping[int, Mapping[Compared, Searched | AdaMerged]]) -> dict:
    """Return searches or coefficients as JSON has them, by seed and model."""
    return {
        str(seed): {model.name: result.as_dict() for model, result in models.items()}
        for seed, models in results.items()
    }


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
