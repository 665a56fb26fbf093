"""What jobs that evaluate share: their checks, the models and evaluator that they open, and AdaMerging."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import jax
from rich.table import Table

from dppa_jax.architecture.row import WRAPPED
from dppa_jax.architecture.table import ARCHITECTURES, known
from dppa_jax.config.evaluation import EvaluationConfig
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.run import JobConfig
from dppa_jax.config.search import AdaMergingConfig, FactorSearch
from dppa_jax.evaluate.evaluation import Evaluation, open_evaluation
from dppa_jax.evaluate.tasks import Task, by_domain, every_task
from dppa_jax.jobs.models import open_job
from dppa_jax.model import model_config
from dppa_jax.runtime.progress import console
from dppa_jax.runtime.reading import printable
from dppa_jax.search.adamerging import adamerge
from dppa_jax.search.adamerging_state import AdaMerged
from dppa_jax.search.candidates import Candidates
from dppa_jax.where import Looked, locate, look, with_bases

Domains = Mapping[str, Sequence[Task]]
ADAMERGING = "--coefficient=adamerging"


def find_coefficients(
    candidates: Candidates, domains: Domains, merge: MergeConfig, given: AdaMergingConfig, workdir: Path
) -> AdaMerged:
    """Find coefficients by AdaMerging.

    On an accelerator the evaluator is ended first, because AdaMerging needs its memory; it starts again when needed.
    """
    if jax.default_backend() != "cpu":
        candidates.evaluation.release()
    return adamerge(candidates, domains, merge, given, workdir)


def check_tasks(config: EvaluationConfig) -> None:
    """Refuse an evaluation without tasks, or with some that its evaluator does not ask."""
    if not config.tasks:
        raise ValueError("--evaluate is empty: name the tasks, for example --evaluate=gsm8k,fpb.")
    for task in every_task(config.tasks):
        if task.kind.classifies and config.evaluator != type(config).evaluator:
            raise ValueError(f"--evaluate={task.name}: --evaluator={config.evaluator} asks decoders; leave it out.")


def check_search(job: JobConfig) -> None:
    """Refuse a search of a method without partitions, or with bounds or given factors that do not fit them."""
    if not job.merge.takes_factors:
        raise ValueError(
            f"a search needs partitions, which only --scale=partition has (--method=dppa, dare_dpa), not "
            f"--method={job.merge.method} with scale {job.merge.scale!r}."
        )
    search = job.search or FactorSearch()
    search.config(job.merge).ranges(len(job.merge.partitions))
    replace(job.merge, factors=search.given)  # checks that each expert has one factor per partition


def check_searched(job: JobConfig, domains: Domains) -> None:
    """Refuse a merge with an expert whose factors are neither given nor can be searched."""
    given = job.search.given if job.search else {}
    if missing := [expert for expert in job.experts if expert not in domains and expert not in given]:
        raise ValueError(
            f"--factors=search: expert {missing[0]!r} has no tasks in --evaluate, which has those of "
            f"{', '.join(domains)}; an expert is searched by the tasks of the domain it is named after."
        )


@contextmanager
def evaluated_candidates(job: JobConfig, writes: bool = False) -> Iterator[Candidates]:
    """Open the evaluator and the job's models, and refuse what can be refused before the work begins."""
    with evaluation_of(job) as evaluation:
        announce(evaluation, job.evaluation, job.search, job.adamerging)
        with candidates_of(job, evaluation, writes) as candidates:
            yield candidates


@contextmanager
def candidates_of(job: JobConfig, evaluation: Evaluation, writes: bool = False) -> Iterator[Candidates]:
    """Open the job's models for an evaluation that is open."""
    with open_job(job, writes) as opened, Candidates(opened, evaluation) as candidates:
        for name, tasks in {"base": every_task(job.evaluation.tasks), **by_domain(job.evaluation.tasks)}.items():
            for task in tasks:  # what a model's own tokenizer cannot encode is refused before anything is asked
                evaluation.questions(task, reader=candidates.reader(name))
        yield candidates


def check_forward(looked: Looked, needs: str | None) -> None:
    """Refuse a model that this program does not compute, before any work is done.

    Args:
      looked: the model.
      needs: the flag that needs a forward pass in JAX; None where vLLM computes everything.
    """
    if not needs:
        return
    directory, architecture = looked.directory, known(looked.config)
    if not architecture or not architecture.forward or WRAPPED in looked.config:
        able = ", ".join(name for row in ARCHITECTURES.values() if row.forward for name in row.classes[:1])
        named = printable(str((looked.config.get("architectures") or ["this model"])[0]))
        raise ValueError(
            f"{directory}: {needs} needs a forward pass in JAX, and {named} has none, as {able} "
            f"have. It can be merged, and evaluated with --evaluator=vllm."
        )
    try:
        model_config(looked.config)
    except ValueError as error:
        raise ValueError(f"{directory}: {needs}: {error}") from None


def check_whole_layers(looked: Looked, needs: str, instead: str) -> None:
    """Refuse an encoder or a mixture of experts, of models computed here, where a gradient by coefficients is needed.

    Args:
      looked: the model.
      needs: the flag that needs it.
      instead: what to give in its place.
    """
    row = known(looked.config)
    if row and not row.adamerging:
        why = "looks at logits of tokens, and this is an encoder"
        if not row.own_heads:
            why = "merges one matrix of a layer at a time, and this layer is a mixture of experts"
        raise ValueError(f"{looked.directory}: {needs} {why}: give {instead}.")


def check_answers(looked: Looked, tasks: Sequence[Task], alone: bool = False) -> None:
    """Refuse tasks that a model cannot answer: an encoder classifies, and a decoder generates.

    Args:
      looked: the model.
      tasks: that it is asked.
      alone: is it asked as it is, so that it needs a head of its own?
    """
    row, directory = known(looked.config), looked.directory
    encodes = bool(row and row.own_heads)
    for task in tasks:
        if task.kind.classifies != encodes:
            does = "classifies, and does not generate: give cola, sst2, mrpc, stsb or classify:NAME"
            does = does if encodes else "generates, and does not classify: give a task that is answered in words"
            raise ValueError(f"--evaluate={task.name}: {directory} {does} (dppa_jax/evaluate/README.md).")
    if encodes and alone and not model_config(looked.config).labels:
        raise ValueError(
            f"{directory} has no classification head, and cannot be evaluated alone; a merge of it has its expert's."
        )


def evaluation_of(job: JobConfig) -> AbstractContextManager[Evaluation]:
    """Open the evaluator, with the tokenizer of the merges, which --tokenizer names."""
    needs = ADAMERGING if job.adamerging else None if job.evaluation.evaluator == "vllm" else "--evaluator=jax"
    looked = look(job.base, job.merge.seed, dequantise=job.dequantise)
    check_forward(looked, needs)
    check_answers(looked, every_task(job.evaluation.tasks))
    if job.adamerging:
        check_whole_layers(looked, ADAMERGING, "numbers as --coefficient, or search for factors")
    given = {"base": job.base, **job.experts}
    tokenizer = with_bases({"base": job.base, job.tokenizer: given[job.tokenizer]})[job.tokenizer]
    return open_evaluation(job.evaluation, locate(tokenizer, job.merge.seed, weights=False), Path(job.workdir))


def announce(
    evaluation: Evaluation,
    config: EvaluationConfig,
    search: FactorSearch | None = None,
    adamerging: AdaMergingConfig | None = None,
) -> None:
    """Read and encode the items, which refuses bad ones early, and print how they are asked and judged."""
    table = Table("task", "items", "prompt", "scoring", "tokens", title="how the tasks are asked and judged")
    for task in every_task(config.tasks):
        counts = [f"{len(evaluation.questions(task))} test"]
        if search and search.split == "validation":
            limited = replace(config.options, limit=search.limit)
            counts.append(f"{len(evaluation.questions(task, 'validation', limited))} validation")
        if adamerging:
            limited = replace(config.options, limit=adamerging.limit)
            counts.append(f"{len(evaluation.questions(task, adamerging.split, limited))} {adamerging.split} prompts")
        table.add_row(task.name, ", ".join(counts), *task.describe(config.options).values())
    console().print(table)


def domains_of(job: JobConfig) -> dict[str, list[Task]]:
    """Return the tasks by domain; refuse a domain that no expert is named after."""
    check_tasks(job.evaluation)
    domains = by_domain(job.evaluation.tasks)
    for domain, tasks in domains.items():
        if domain not in job.experts:
            raise ValueError(
                f"--evaluate={tasks[0].name}: its domain is {domain}, and ratios are relative to the expert of that "
                f"name, which is missing: give --expert={domain}=WHERE, or leave the task out."
            )
    return domains


def experts_of(job: JobConfig) -> dict[str, list[Task]]:
    """Return the tasks of every expert that is measured alone: of the one that a domain is named after, and of others.

    Another expert of a domain, such as one that was trained in another way, is called DOMAIN.NAME.
    """
    domains = domains_of(job)
    of_domain = {name: name.partition(".")[0] for name in job.experts}
    return {name: tasks for domain, tasks in domains.items() for name in job.experts if of_domain[name] == domain}
