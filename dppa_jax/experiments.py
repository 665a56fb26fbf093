"""Jobs that evaluate: --job=evaluate, --job=search, and a merge that is evaluated, or whose numbers are to be found."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import jax
from absl import logging
from rich.table import Table

from dppa_jax import jobs
from dppa_jax.config.evaluation import EvaluationConfig
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.run import JobConfig
from dppa_jax.config.search import AdaMergingConfig, FactorSearch
from dppa_jax.evaluate.evaluation import Evaluation, open_evaluation
from dppa_jax.evaluate.scores import Scores
from dppa_jax.evaluate.tasks import Task, by_domain, every_task
from dppa_jax.inspect import remaining
from dppa_jax.merge.merger import Outcome
from dppa_jax.report import figures
from dppa_jax.report.page import Illustration, Run, surroundings, write_report
from dppa_jax.report.paper import evaluated, published_merge
from dppa_jax.report.published import is_papers
from dppa_jax.report.tables import Cell, ResultTable
from dppa_jax.runtime import processes
from dppa_jax.runtime.progress import console, steps
from dppa_jax.search.adamerging import AdaMerged, adamerge
from dppa_jax.search.candidates import Candidates
from dppa_jax.search.entropy import check_combine
from dppa_jax.search.factors import Searched, print_searches, search_factors
from dppa_jax.where import locate, open_checkpoint

Domains = Mapping[str, Sequence[Task]]


def run_evaluate(
    models: Mapping[str, str],
    config: EvaluationConfig,
    workdir: str,
    seed: int = 0,
    command: str = "",
    tokenizer: str = "base",
) -> dict[str, Scores]:
    """Every model on every task: a table of accuracies, printed and as a report in `workdir`.

    All are asked with the tokenizer of one of them; of the first where there is no `tokenizer` among them.
    """
    check_tasks(config)
    opened = {name: open_checkpoint(where, seed) for name, where in models.items()}
    directories = {name: model.directory for name, model in opened.items()}
    reader = directories.get(tokenizer) or next(iter(directories.values()))
    with open_evaluation(config, reader, Path(workdir)) as evaluation:
        announce(evaluation, config)
        with steps("evaluate", len(opened)) as advance:
            found = {}
            for name, model in opened.items():
                weights = directories[name]
                fingerprint = model.content_digest()
                model.close()
                found[name] = evaluation.scores(name, fingerprint, lambda w=weights: w, every_task(config.tasks))
                advance()
        rows = {
            task.name: [Cell.of_scores([found[name][task.name]]) for name in models]
            for task in every_task(config.tasks)
        }
        table = ResultTable("Accuracy (%)", "task", tuple(models), rows, name="accuracies")
        finish(Path(workdir), run_of("Evaluation", command, models, config, evaluation, [table]))
    return found


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


def run_merge(job: JobConfig) -> Outcome:
    """Search factors and find coefficients if asked to, merge, evaluate, report."""
    jobs.check_outputs(job)
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
    outcome = jobs.run_merge(job)
    _report_merge(job, candidates, domains, outcome, found, merged)
    return outcome


def find_coefficients(
    candidates: Candidates, domains: Domains, merge: MergeConfig, given: AdaMergingConfig, workdir: Path
) -> AdaMerged:
    """By AdaMerging, which needs the memory of an accelerator that the evaluator has: it starts again after it."""
    if jax.default_backend() != "cpu":
        candidates.evaluation.release()
    return adamerge(candidates, domains, merge, given, workdir)


def check_tasks(config: EvaluationConfig) -> None:
    if not config.tasks:
        raise ValueError("--evaluate is empty: name the tasks, for example --evaluate=gsm8k,fpb.")


def check_search(job: JobConfig) -> None:
    """Refuse a search that cannot be made."""
    if job.merge.scale != "partition":
        raise ValueError(
            f"a search needs partitions, which only --scale=partition has (--method=dppa, dare_dpa), not "
            f"--method={job.merge.method} with scale {job.merge.scale!r}."
        )
    given = job.search or FactorSearch()
    given.config(job.merge).ranges(len(job.merge.partitions))
    replace(job.merge, factors=given.given)  # as many as partitions?


def check_searched(job: JobConfig, domains: Domains) -> None:
    """Refuse a merge with an expert whose factors nothing can tell."""
    given = job.search.given if job.search else {}
    if missing := [expert for expert in job.experts if expert not in domains and expert not in given]:
        raise ValueError(
            f"--factors=search: expert {missing[0]!r} has no tasks in --evaluate, which has those of "
            f"{', '.join(domains)}; an expert is searched by the tasks of the domain it is named after."
        )


@contextmanager
def opened(job: JobConfig) -> Iterator[Candidates]:
    """The job's models, and what evaluates them; all that can be refused before the work begins is."""
    with evaluation_of(job) as evaluation:
        announce(evaluation, job.evaluation, job.search, job.adamerging)
        with Candidates(job, evaluation) as candidates:
            yield candidates


def evaluation_of(job: JobConfig) -> AbstractContextManager[Evaluation]:
    tokenizer = job.base if job.tokenizer == "base" else job.experts[job.tokenizer]
    return open_evaluation(job.evaluation, locate(tokenizer, job.merge.seed), Path(job.workdir))


def announce(
    evaluation: Evaluation,
    config: EvaluationConfig,
    search: FactorSearch | None = None,
    adamerging: AdaMergingConfig | None = None,
) -> None:
    """Read and encode the items, so that bad ones are refused now, and print how they are asked and judged."""
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
    """The tasks by domain, every one of which must have its expert."""
    check_tasks(job.evaluation)
    domains = by_domain(job.evaluation.tasks)
    for domain, tasks in domains.items():
        if domain not in job.experts:
            raise ValueError(
                f"--evaluate={tasks[0].name}: its domain is {domain}, and ratios are relative to the expert of that "
                f"name, which is missing: give --expert={domain}=WHERE, or leave the task out."
            )
    return domains


def _search(job: JobConfig, candidates: Candidates, domains: Domains) -> dict[str, Searched]:
    found = search_factors(candidates, domains, job.search, job.merge, Path(job.workdir))
    print_searches(found, job.evaluation.options)
    return found


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


def merge_figures(candidates: Candidates, config: MergeConfig, outcome: Outcome) -> list[Illustration]:
    """Rates of every layer and linear, and what is left of the middle layer by dimension."""
    if not config.score:
        return []
    rates = dict(zip(config.experts, outcome.rates[:, -1], strict=True))
    found = [illustration("rates", figures.rates(rates), f"Share removed of every linear, at rate {config.rate:g}.")]
    if config.score == "magnitude":
        layer = outcome.rates.shape[2] // 2
        for e, name in enumerate(config.experts):
            thresholds = outcome.thresholds[e, :, layer]
            left = remaining(candidates.base, candidates.experts[name], config, layer, thresholds)
            caption = f"Parameters of {name} that are left in layer {layer}, by dimension (figure 3 of the paper)."
            found.append(illustration(f"remaining-{name}", figures.remaining(left), caption))
    return found


def search_tables(found: Mapping[str, Searched]) -> list[ResultTable]:
    """Every candidate of every expert."""
    tables = []
    for name, one in found.items():
        rows = {
            ",".join(f"{factor:g}" for factor in factors): [
                *(Cell.of_scores([score]) for score in scores.values()),
                Cell((one.ratio(factors),)),
            ]
            for factors, scores in one.scores.items()
        }
        title = f"Factors of {name}: accuracy on the {one.split} split and domain ratio (%)"
        tables.append(ResultTable(title, "factors", (*one.dense, "domain ratio"), rows, name=f"search-{name}"))
    return tables


def search_figures(found: Mapping[str, Searched]) -> list[Illustration]:
    return [
        illustration(
            f"search-{name}",
            figures.search(one.result.visits, one.partitions, one.result.factors),
            f"Domain ratio of {name}, {one.split} split, against each partition's factor (figure 2 of the paper).",
        )
        for name, one in found.items()
    ]


def _search_facts(found: Mapping[str, Searched]) -> dict[str, str]:
    return {f"factors of {name}": one.in_words() for name, one in found.items()}


def _search_data(found: Mapping[str, Searched]) -> dict:
    return {"searches": {name: one.as_dict() for name, one in found.items()}} if found else {}


def search_notes(found: Mapping[str, Searched]) -> list[str]:
    return [
        f"The factors of {name} were chosen by the items that are reported here (--search_split=test), as in the paper."
        for name, one in found.items()
        if one.split == "test"
    ]


def adamerging_facts(found: AdaMerged | None) -> dict[str, str]:
    if found is None:
        return {}
    memory = f"{found.peak_bytes / 1e9:.3f} GB a device in a step, base and experts alone {found.model_bytes / 1e9:.3f}"
    return {"coefficients": found.in_words()} | ({"memory of AdaMerging": memory} if found.peak_bytes else {})


def adamerging_figures(found: Mapping[str, AdaMerged]) -> list[Illustration]:
    """Entropies and coefficients, by a name that makes the figures' names differ."""
    return [
        illustration(name, figures.adamerging(one), f"Entropy against the step, and coefficients, of {name}.")
        for name, one in found.items()
    ]


def adamerging_notes(given: AdaMergingConfig | None) -> list[str]:
    if given is None or given.split != "test":
        return []
    return ["AdaMerging read the prompts that are reported here (--adamerging_split=test), without their answers."]


def illustration(name: str, figure, caption: str) -> Illustration:
    return Illustration(name, caption, figures.svg(figure, name))


def run_of(
    title: str,
    command: str,
    models: Mapping[str, str],
    config: EvaluationConfig,
    evaluation: Evaluation,
    tables: Sequence[ResultTable] = (),
) -> Run:
    choices = {
        task.name: {"items": str(len(evaluation.questions(task))), **task.describe(config.options)}
        for task in every_task(config.tasks)
    }
    decoding = ", ".join(f"{name} {value}" for name, value in evaluation.evaluator.decoding.items())
    facts = {**surroundings(), "decoding": f"greedy, {decoding}"}
    return Run(title, command, models, facts, tables, choices=choices)


def finish(workdir: Path, run: Run) -> None:
    """Print the tables and write the report, in the first process."""
    if processes.index():
        return
    for table in run.tables:
        console().print(table.printed())
    write_report(workdir, run)
    logging.info("report: %s", workdir / "report.html")
