"""TODO."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import logging

from dppa_jax.config.evaluation import EvaluationConfig
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.search import AdaMergingConfig
from dppa_jax.evaluate.evaluation import Evaluation
from dppa_jax.evaluate.tasks import every_task
from dppa_jax.merging.inspection import kept_counts
from dppa_jax.merging.merger import Outcome
from dppa_jax.report import figures
from dppa_jax.report.page import Illustration, Run, surroundings, write_report
from dppa_jax.report.tables import Cell, ResultTable
from dppa_jax.runtime import processes
from dppa_jax.runtime.progress import console
from dppa_jax.search.adamerging import AdaMerged
from dppa_jax.search.candidates import Candidates
from dppa_jax.search.factors import Searched


def merge_figures(candidates: Candidates, config: MergeConfig, outcome: Outcome) -> list[Illustration]:
    """Rates of every layer and linear, and what is left of the middle layer by dimension."""
    if not config.score:
        return []
    linears = outcome.linears
    rates = {name: linears.by_layer(outcome.rates[e, -1]) for e, name in enumerate(config.experts)}
    caption = f"Share removed of every linear, at rate {config.rate:g}."
    illustrations = [illustration("rates", figures.rates(rates, linears.kinds), caption)]
    if config.ranks_by_magnitude:
        layer = linears.layers // 2
        places = np.flatnonzero(linears.layer == layer)
        for e, name in enumerate(config.experts):
            thresholds = {linears.names[place]: outcome.thresholds[e, :, place] for place in places}
            counts = kept_counts(candidates.base, candidates.experts[name], config, thresholds)
            caption = f"Parameters of {name} that are left in layer {layer}, by dimension (figure 3 of the paper)."
            illustrations.append(illustration(f"remaining-{name}", figures.remaining(counts), caption))
    return illustrations


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
