"""Jobs that evaluate: --job=evaluate, --job=search, and a merge that is evaluated, or whose numbers are to be found."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dppa_jax.config.run import JobConfig
from dppa_jax.evaluate.scores import Scores
from dppa_jax.evaluate.tasks import every_task
from dppa_jax.jobs.evaluated import (
    Domains,
    check_search,
    check_searched,
    domains_of,
    find_coefficients,
    opened,
)
from dppa_jax.jobs.merge import run_merge as write_merge
from dppa_jax.jobs.models import check_outputs
from dppa_jax.jobs.search import _search
from dppa_jax.merging.merger import Outcome
from dppa_jax.report.paper import evaluated, published_merge
from dppa_jax.report.published import is_papers
from dppa_jax.report.sections import (
    _search_data,
    _search_facts,
    adamerging_facts,
    adamerging_figures,
    adamerging_notes,
    finish,
    merge_figures,
    run_of,
    search_figures,
    search_notes,
    search_tables,
)
from dppa_jax.runtime import processes
from dppa_jax.runtime.progress import steps
from dppa_jax.search.adamerging import AdaMerged
from dppa_jax.search.candidates import Candidates
from dppa_jax.search.factors import Searched
from dppa_jax.search.mixture import check_combine
from dppa_jax.where import open_checkpoint


def run_merge(job: JobConfig) -> Outcome:
    """Search factors and find coefficients if asked to, merge, evaluate, report."""
    check_outputs(job)
    domains = domains_of(job)
    if job.search:
        check_search(job)
        check_searched(job, domains)
    if job.adamerging:
        check_combine(job.merge)
    with opened(job) as candidates:
        return merge_and_report(job, candidates, domains)


def merge_and_report(job: JobConfig, candidates: Candidates, domains: Domains) -> Outcome:
    """The same of models that are open."""
    found: dict[str, Searched] = {}
    if job.search:
        found = _search(job, candidates, domains)
        factors = {**job.search.given, **{name: one.result.factors for name, one in found.items()}}
        job = replace(job, merge=replace(job.merge, factors=factors))
    merged = None
    if job.adamerging:
        merged = find_coefficients(candidates, domains, job.merge, job.adamerging, Path(job.workdir))
        job = replace(job, merge=replace(job.merge, coefficients=merged.coefficients))
    outcome = write_merge(job)
    _report_merge(job, candidates, domains, outcome, found, merged)
    return outcome


def _report_merge(
    job: JobConfig,
    candidates: Candidates,
    domains: Domains,
    outcome: Outcome,
    searched: Mapping[str, Searched],
    adamerged: AdaMerged | None,
) -> None:
    merged = open_checkpoint(job.output)
    content = processes.of_first("content of the merge", merged.content_digest)
    every = every_task(job.evaluation.tasks)
    with steps("evaluate", 2 + len(domains)) as advance:
        base = candidates.dense("base", every)
        advance()
        experts: Scores = {}
        for domain, tasks in domains.items():
            experts |= candidates.dense(domain, tasks)
            advance()
        fingerprints = {**candidates.fingerprints, "merge": content}
        found = candidates.evaluation.scores("merge", fingerprints["merge"], lambda: merged.directory, every)
        advance()
    merged.close()
    if processes.index():
        return
    known = published_merge(len(job.experts), domains, job.merge.method, job.merge.rate)
    table = evaluated(base, experts, found, domains, known if is_papers(job.base, job.experts) else None)
    models = {"base": job.base, **job.experts, "merge": job.output}
    tables = [table, *search_tables(searched)]
    run = run_of("Merge", job.command, models, job.evaluation, candidates.evaluation, tables)
    run = replace(
        run,
        facts={**run.facts, **_search_facts(searched), **adamerging_facts(adamerged)},
        figures=[
            *search_figures(searched),
            *adamerging_figures({"adamerging": adamerged} if adamerged else {}),
            *merge_figures(candidates, job.merge, outcome),
        ],
        recipe={"config": job.merge.as_dict(), "fingerprints": fingerprints},
        data={
            "fingerprints": fingerprints,
            **_search_data(searched),
            **({"adamerging": adamerged.as_dict()} if adamerged else {}),
        },
        notes=[*search_notes(searched), *adamerging_notes(job.adamerging)],
    )
    finish(Path(job.workdir), run)
