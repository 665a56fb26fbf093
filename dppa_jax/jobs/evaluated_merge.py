"""--job=merge with --evaluate: find factors and coefficients if asked to, merge, evaluate the merge, and report."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dppa_jax.config.run import JobConfig
from dppa_jax.evaluate.scores import Scores
from dppa_jax.evaluate.tasks import every_task
from dppa_jax.jobs.advise import check_advise, with_method
from dppa_jax.jobs.evaluated import (
    Domains,
    check_search,
    check_searched,
    domains_of,
    evaluated_candidates,
    find_coefficients,
)
from dppa_jax.jobs.models import check_outputs
from dppa_jax.jobs.q import check_q, find_q
from dppa_jax.jobs.search import search_and_print
from dppa_jax.jobs.write_merge import write_merge
from dppa_jax.merging.merger import Outcome
from dppa_jax.report.paper import merge_table, published_merge
from dppa_jax.report.published import is_papers
from dppa_jax.report.sections import (
    adamerging_facts,
    adamerging_figures,
    adamerging_notes,
    finish,
    merge_figures,
    new_report,
    search_data,
    search_facts,
    search_figures,
    search_notes,
    search_tables,
    show,
)
from dppa_jax.runtime import processes
from dppa_jax.runtime.progress import steps
from dppa_jax.search.adamerging_state import AdaMerged
from dppa_jax.search.candidates import Candidates
from dppa_jax.search.factors import Searched
from dppa_jax.search.mixture import check_combine
from dppa_jax.where import open_checkpoint


def run_evaluated_merge(job: JobConfig) -> Outcome:
    """Search factors and find coefficients if asked to; merge, evaluate the merge, and write a report."""
    check_outputs(job)
    domains = domains_of(job)
    if job.search:
        check_search(job)
        check_searched(job, domains)
    if job.q:
        check_q(job, domains)
    if job.advise:
        check_advise(job)
    if job.adamerging:
        check_combine(job.merge)
    with evaluated_candidates(job, writes=True) as candidates:
        return merge_and_report(job, candidates, domains)


def merge_and_report(job: JobConfig, candidates: Candidates, domains: Domains) -> Outcome:
    """Do the work of `run_evaluated_merge` with models and an evaluator that are open."""
    searches: dict[str, Searched] = {}
    advice = {}
    if job.advise:
        job, advice = with_method(candidates.opened, candidates, domains)
    if job.search:
        searches = search_and_print(job, candidates, domains)
        factors = {**job.search.given, **{name: searched.result.factors for name, searched in searches.items()}}
        job = replace(job, merge=replace(job.merge, factors=factors))
    if job.q:
        job = replace(job, merge=find_q(candidates.opened, job.merge, candidates, domains))
    adamerged = None
    if job.adamerging:
        adamerged = find_coefficients(candidates, domains, job.merge, job.adamerging, Path(job.workdir))
        job = replace(job, merge=replace(job.merge, coefficients=adamerged.coefficients))
    outcome = write_merge(replace(candidates.opened, job=job), advice)
    _report_merge(job, candidates, domains, outcome, searches, adamerged)
    return outcome


def _report_merge(
    job: JobConfig,
    candidates: Candidates,
    domains: Domains,
    outcome: Outcome,
    searches: Mapping[str, Searched],
    adamerged: AdaMerged | None,
) -> None:
    """Evaluate base, experts and the merge in job.output, and write the report."""
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
        evaluation, reads = candidates.evaluation, candidates.evaluation.readers.of
        reader = reads("the merge", merged.config, merged.directory)
        scores = evaluation.scores("merge", fingerprints["merge"], lambda: merged.directory, every, reader=reader)
        advance()
    merged.close()
    if processes.index():
        return
    known = published_merge(len(job.experts), domains, job.merge.method, job.merge.rate)
    table = merge_table(base, experts, scores, domains, known if is_papers(job.base, job.experts) else None)
    models = {"base": job.base, **job.experts, "merge": job.output}
    tables = [table, *search_tables(searches)]
    show(tables)
    report = new_report("Merge", job.command, models, job.evaluation, candidates.evaluation, tables)
    report = replace(
        report,
        facts={**report.facts, **search_facts(searches), **adamerging_facts(adamerged)},
        figures=[
            *search_figures(searches),
            *adamerging_figures({"adamerging": adamerged} if adamerged else {}),
            *merge_figures(candidates, job.merge, outcome),
        ],
        recipe={"config": job.merge.as_dict(), "fingerprints": fingerprints},
        data={
            "fingerprints": fingerprints,
            **search_data(searches),
            **({"adamerging": adamerged.as_dict()} if adamerged else {}),
        },
        notes=[*search_notes(searches), *adamerging_notes(job.adamerging)],
    )
    finish(Path(job.workdir), report)
