"""TODO."""

from dataclasses import replace
from pathlib import Path

from dppa_jax.config.run import JobConfig
from dppa_jax.jobs.evaluated import (
    Domains,
    check_search,
    domains_of,
    opened,
)
from dppa_jax.report.sections import (
    _search_data,
    _search_facts,
    finish,
    run_of,
    search_figures,
    search_notes,
    search_tables,
)
from dppa_jax.search.candidates import Candidates
from dppa_jax.search.factors import Searched, print_searches, search_factors


def run_search(job: JobConfig) -> dict[str, Searched]:
    """The best factors of every expert, printed and in `workdir`; nothing is merged."""
    domains = domains_of(job)
    check_search(job)
    with opened(job) as candidates:
        found = _search(job, candidates, domains)
        experts = {name: job.experts[name] for name in found}
        models, tables = {"base": job.base, **experts}, search_tables(found)
        run = run_of("Search of factors", job.command, models, job.evaluation, candidates.evaluation, tables)
        run = replace(run, facts={**run.facts, **_search_facts(found)}, notes=search_notes(found))
        finish(Path(job.workdir), replace(run, figures=search_figures(found), data=_search_data(found)))
    return found


def _search(job: JobConfig, candidates: Candidates, domains: Domains) -> dict[str, Searched]:
    found = search_factors(candidates, domains, job.search, job.merge, Path(job.workdir))
    print_searches(found, job.evaluation.options)
    return found
