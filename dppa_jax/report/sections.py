"""The sections that reports share: tables, figures, facts, notes and data of merges, searches and AdaMerging."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import logging

from dppa_jax.config.evaluation import EvaluationConfig
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.numbers import listed
from dppa_jax.config.search import AdaMergingConfig
from dppa_jax.evaluate.evaluation import Evaluation
from dppa_jax.evaluate.tasks import every_task
from dppa_jax.merging.inspection import kept_counts
from dppa_jax.merging.merger import Outcome
from dppa_jax.report.coefficient_figures import draw_adamerging
from dppa_jax.report.figures import draw_kept_counts, draw_rates, draw_search
from dppa_jax.report.page import Illustration, Report, surroundings, write_report
from dppa_jax.report.styles import svg
from dppa_jax.report.tables import Cell, ResultTable
from dppa_jax.runtime import processes
from dppa_jax.runtime.progress import console
from dppa_jax.search.adamerging_state import AdaMerged
from dppa_jax.search.candidates import Candidates
from dppa_jax.search.factors import Searched


def merge_figures(candidates: Candidates, config: MergeConfig, outcome: Outcome) -> list[Illustration]:
    """Draw the rates of every layer and linear and, of the middle layer, what is left by dimension."""
    if not config.of_deltas.score:
        return []
    linears = outcome.linears
    rates = {name: linears.by_layer(outcome.rates[e, -1]) for e, name in enumerate(config.experts)}
    caption = f"Share removed of every linear, at rate {config.rate:g}."
    illustrations = [illustration("rates", draw_rates(rates, linears.kinds), caption)]
    if config.ranks_by_magnitude:
        layer = linears.layers // 2
        places = [i for i, spec in enumerate(linears.specs) if spec.layer == layer and len(spec.shape) == 2]
        for e, name in enumerate(config.experts):
            tables = outcome.thresholds[e], outcome.densities[e]
            decided = {linears.names[place]: tuple(table[:, place] for table in tables) for place in places}
            counts = kept_counts(candidates.base, candidates.opened.experts[name], config, name, decided)
            caption = f"Parameters of {name} that are left in layer {layer}, by dimension (figure 3 of the paper)."
            illustrations.append(illustration(f"remaining-{name}", draw_kept_counts(counts), caption))
    return illustrations


def search_tables(searches: Mapping[str, Searched]) -> list[ResultTable]:
    """Make a table of all candidates for each expert."""
    tables = []
    for name, searched in searches.items():
        rows = {
            listed(factors): [
                *(Cell.of_scores([score]) for score in scores.values()),
                Cell((searched.ratio(factors),)),
            ]
            for factors, scores in searched.scores.items()
        }
        title = f"Factors of {name}: accuracy on the {searched.split} split and domain ratio (%)"
        tables.append(ResultTable(title, "factors", (*searched.dense, "domain ratio"), rows, name=f"search-{name}"))
    return tables


def search_figures(searches: Mapping[str, Searched]) -> list[Illustration]:
    """Draw score against factor for each expert."""
    return [
        illustration(
            f"search-{name}",
            draw_search(searched.result.visits, searched.partitions, searched.result.factors),
            f"Domain ratio of {name}, {searched.split} split, against each partition's factor (figure 2 of the paper).",
        )
        for name, searched in searches.items()
    ]


def search_facts(searches: Mapping[str, Searched]) -> dict[str, str]:
    """Return one line about the factors of each expert."""
    return {f"factors of {name}": searched.in_words() for name, searched in searches.items()}


def search_data(searches: Mapping[str, Searched]) -> dict:
    """Return what tables.json says of the searches; nothing if there were none."""
    return {"searches": {name: searched.as_dict() for name, searched in searches.items()}} if searches else {}


def search_notes(searches: Mapping[str, Searched]) -> list[str]:
    """Warn of factors that were chosen by the items that are reported."""
    return [
        f"The factors of {name} were chosen by the items that are reported here (--search_split=test), as in the paper."
        for name, searched in searches.items()
        if searched.split == "test"
    ]


def adamerging_facts(result: AdaMerged | None) -> dict[str, str]:
    """Return the coefficients and the memory that finding them took; nothing if they were given."""
    if result is None:
        return {}
    step, models = result.peak_bytes / 1e9, result.model_bytes / 1e9
    memory = f"{step:.3f} GB a device in a step, base and experts alone {models:.3f}"
    return {"coefficients": result.in_words()} | ({"memory of AdaMerging": memory} if result.peak_bytes else {})


def adamerging_figures(results: Mapping[str, AdaMerged]) -> list[Illustration]:
    """Draw entropies and coefficients; the keys become the figures' names."""
    return [
        illustration(name, draw_adamerging(result), f"Entropy against the step, and coefficients, of {name}.")
        for name, result in results.items()
    ]


def adamerging_notes(config: AdaMergingConfig | None) -> list[str]:
    """Warn of coefficients that were found on the prompts that are reported."""
    if config is None or config.split != "test":
        return []
    return ["AdaMerging read the prompts that are reported here (--adamerging_split=test), without their answers."]


def illustration(name: str, figure, caption: str) -> Illustration:
    """Make a figure of the page from a matplotlib Figure."""
    return Illustration(name, caption, svg(figure, name))


def new_report(
    title: str,
    command: str,
    models: Mapping[str, str],
    config: EvaluationConfig,
    evaluation: Evaluation,
    tables: Sequence[ResultTable] = (),
) -> Report:
    """Return a report with tables, surroundings, decoding, and how each task was asked and judged."""
    choices = {
        task.name: {"items": str(len(evaluation.questions(task))), **task.describe(config.options)}
        for task in every_task(config.tasks)
    }
    decoding = ", ".join(f"{name} {value}" for name, value in evaluation.evaluator.decoding.items())
    facts = {**surroundings(), "decoding": f"greedy, {decoding}"}
    return Report(title, command, models, facts, tables, choices=choices)


def show(tables: Sequence[ResultTable]) -> None:
    """Print tables, in the first process only; before the figures, which take seconds to draw."""
    for table in tables:
        console().print(table.printed())


def finish(workdir: Path, report: Report) -> None:
    """Write the report, in the first process only."""
    if processes.index():
        return
    write_report(workdir, report)
    logging.info("report: %s", workdir / "report.html")
