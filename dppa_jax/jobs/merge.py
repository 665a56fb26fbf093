"""--job=merge: base and experts in, one model out, evaluated where the job asks for it."""

from dataclasses import replace

from dppa_jax.config.q import LABELLED
from dppa_jax.config.run import JobConfig
from dppa_jax.jobs.models import open_job
from dppa_jax.jobs.write_merge import write_merge
from dppa_jax.merging.merger import Outcome


def run_merge(job: JobConfig) -> Outcome:
    """Merge into job.output; choose a method, find its numbers and coefficients, and evaluate where the job says so.

    Earlier merges of the same file of recipes, whose outputs this one reads, are made first.
    """
    for earlier in job.earlier:
        run_merge(earlier)
    if job.search or job.adamerging or job.evaluation.tasks or (job.q and job.q.way == LABELLED):
        from dppa_jax.jobs.evaluated_merge import run_evaluated_merge  # a second of imports

        return run_evaluated_merge(job)
    if job.advise:
        from dppa_jax.jobs.advise import check_advise, with_method  # Flax takes a third of a second

        check_advise(job)
        with open_job(job, writes=True) as opened:
            job, advice = with_method(opened)
            return write_merge(replace(opened, job=job), advice)
    if job.q:
        from dppa_jax.jobs.q import check_q, with_q  # Flax takes a third of a second

        check_q(job)
    with open_job(job, writes=True) as opened:
        return write_merge(with_q(opened) if job.q else opened)
