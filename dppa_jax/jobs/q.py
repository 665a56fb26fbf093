"""Find DAREx's q as a job asks: by a rule or by gradient for each linear, by the change of outputs, or by items."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from absl import logging
from rich.table import Table

from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.numbers import Coefficient
from dppa_jax.config.q import GRADIENT, LABELLED, UNLABELLED, QConfig
from dppa_jax.config.run import JobConfig
from dppa_jax.evaluate.tasks import Task
from dppa_jax.jobs.evaluated import Domains, check_forward, check_whole_layers
from dppa_jax.merging.opened import Opened
from dppa_jax.runtime import processes
from dppa_jax.runtime.files import write_whole
from dppa_jax.runtime.memory import peak_resident, size_text
from dppa_jax.runtime.progress import console
from dppa_jax.search.candidates import Candidates
from dppa_jax.search.mixture import check_combine
from dppa_jax.search.output_change import PrunedChange, least_change, searched_by_change
from dppa_jax.search.q import QSearched, searched_by_score
from dppa_jax.search.q_gradient import QDescended, q_by_gradient
from dppa_jax.where import look

BY_TEXT = (UNLABELLED, GRADIENT)  # ways that measure a whole model on text


def check_q(job: JobConfig, domains: Domains | None = None) -> None:
    """Refuse, before any work, a way to q that lacks its text, its tasks, or a model that is computed here."""
    q, merge = job.q, job.merge
    if q.way == LABELLED:
        for name in set(merge.experts) - set(q.given):
            if name not in (domains or {}):
                raise ValueError(
                    f"--q={q.way}: expert {name!r} has no tasks in --evaluate; an expert is searched by the tasks of "
                    f"the domain it is named after. Give --q={name}=0.2, or another way: --q={UNLABELLED}."
                )
        return
    check_text(job, q.way, f"--q={q.way}", "a number, or a rule such as bound")


def check_text(job: JobConfig, way: str, needs: str, other: str) -> None:
    """Refuse a way that lacks its text, or a model that is computed here.

    Args:
      needs: the flag that asks for the way.
      other: what could be given in its place.
    """
    if not job.calibration:
        raise ValueError(f"{needs} needs --calibration=FILE, a text file whose lines the experts read.")
    if way in BY_TEXT and processes.count() > 1:
        raise ValueError(f"{needs}: one process computes whole models; give {other}.")
    looked = look(job.base, job.merge.seed, dequantise=job.dequantise)
    check_forward(looked, needs)
    if way == GRADIENT:
        check_combine(job.merge, needs)
        check_whole_layers(looked, needs, f"{other}, or --q={UNLABELLED}")


def with_q(opened: Opened) -> Opened:
    """Return the job with the q that was found."""
    merge = find_q(opened, opened.job.merge)
    return replace(opened, job=replace(opened.job, merge=merge))


def find_q(
    opened: Opened, merge: MergeConfig, candidates: Candidates | None = None, domains: Domains | None = None
) -> MergeConfig:
    """Return the merge with the q of every expert; print it, and write it to q.json in --workdir, which --q takes.

    Args:
      candidates, domains: what is needed for the way that measures tasks.
    """
    job = opened.job
    q, found, searches = job.q, dict(merge.q), {}
    for name in merge.experts:
        if name not in q.given:
            found[name], searched = q_of_expert(opened, name, q, merge, candidates, (domains or {}).get(name, ()))
            searches |= {name: searched} if searched else {}
    _tell(q.way, found, searches)
    if processes.index() == 0:
        content = {"q": found, "way": q.way, "searches": {name: one.as_dict() for name, one in searches.items()}}
        file = Path(job.workdir) / "q.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(content, indent=1) + "\n")
    return replace(merge, q=found)


def q_of_expert(
    opened: Opened,
    name: str,
    q: QConfig,
    merge: MergeConfig,
    candidates: Candidates | None = None,
    tasks: Sequence[Task] = (),
    change: Callable[[], PrunedChange] | None = None,
) -> tuple[Coefficient, QSearched | QDescended | None]:
    """Return the q of one expert, one number or one for each linear, and the search that found it, if one did.

    Args:
      candidates, tasks: what is needed for the way that measures tasks.
      change: returns what measures changes of the expert's outputs, which is otherwise made when a way needs it.
    """
    started, searched, opened = time.perf_counter(), None, opened.reading(name)
    change = change or partial(PrunedChange, opened, name, q, merge)
    if q.is_rule:
        of_eta = opened.q_of_linears(merge, q, name)
        found = of_eta[0 if len(of_eta) == 1 else least_change(change(), q, merge, of_eta)]
    elif q.way == LABELLED:
        searched = searched_by_score(candidates, name, tasks, q, merge)
    elif q.way == UNLABELLED:
        searched = searched_by_change(change(), q, merge)
    else:
        searched = q_by_gradient(opened, name, q, merge)
    if searched:
        found = searched.q
    seconds, peak = time.perf_counter() - started, size_text(peak_resident())
    logging.info("q of %s found in %.1f s; peak memory so far %s", name, seconds, peak)
    return found, searched


def _tell(way: str, found: Mapping, searches: Mapping[str, QSearched | QDescended]) -> None:
    """Print the q of every expert, beside what was measured of it."""
    table = Table("expert", "q", "measured", title=f"q, which divides what is kept, by --q={way}")
    for name, q in found.items():
        if isinstance(q, Mapping):
            numbers = list(q.values())
            said = f"{sum(numbers) / len(numbers):.4g} on average, from {min(numbers):.4g} to {max(numbers):.4g}"
        else:
            said = f"{q:.4g}"
        table.add_row(name, said, searches[name].in_words() if name in searches else "")
    console().print(table)
