"""--job=search: find the factors of DPA for every expert, print and report them; nothing is merged."""

from dataclasses import replace
from pathlib import Path

from dppa_jax.config.run import JobConfig
from dppa_jax.jobs.evaluated import (
    Domains,
    check_search,
    domains_of,
    evaluated_candidates,
)
from dppa_jax.report.sections import (
    finish,
    new_report,
    search_data,
    search_facts,
    search_figures,
    search_notes,
    search_tables,
    show,
)
from dppa_jax.search.candidates import Candidates
from dppa_jax.search.factors import Searched, print_searches, search_factors


def run_search(job: JobConfig) -> dict[str, Searched]:
    """Search the factors of every expert; print them and write a report to `workdir`."""
    domains = domains_of(job)
    check_search(job)
    with evaluated_candidates(job) as candidates:
        searches = search_and_print(job, candidates, domains)
        experts = {name: job.experts[name] for name in searches}
        models, tables = {"base": job.base, **experts}, search_tables(searches)
        show(tables)
        report = new_report("Search of factors", job.command, models, job.evaluation, candidates.evaluation, tables)
        report = replace(report, facts={**report.facts, **search_facts(searches)}, notes=search_notes(searches))
        finish(Path(job.workdir), replace(report, figures=search_figures(searches), data=search_data(searches)))
    return searches


def search_and_print(job: JobConfig, candidates: Candidates, domains: Domains) -> dict[str, Searched]:
    """Search the factors of every expert whose factors are not given, and print them."""
    searches = search_factors(candidates, domains, job.search, job.merge, Path(job.workdir))
    print_searches(searches, job.evaluation.options)
    return searches
