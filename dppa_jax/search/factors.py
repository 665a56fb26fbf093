"""Search the DPA factors of experts by evaluating candidates, and keep every candidate with its scores and cost."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from absl import logging
from rich.table import Table

from dppa_jax.config.evaluation import TaskOptions
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.numbers import listed
from dppa_jax.config.search import Factors, FactorSearch
from dppa_jax.evaluate.evaluation import Cost
from dppa_jax.evaluate.ratios import domain_ratio
from dppa_jax.evaluate.scores import Scores
from dppa_jax.evaluate.tasks import Split, Task
from dppa_jax.runtime import processes
from dppa_jax.runtime.files import write_whole
from dppa_jax.runtime.progress import console, steps
from dppa_jax.search.candidates import Candidates
from dppa_jax.search.rules import SearchResult, Visit, search


@dataclass
class Searched:
    """The search of one expert's factors.

    Attributes:
      expert: its name, which is that of its domain.
      partitions: their rates, highest first.
      split: the split whose items candidates are scored on.
      dense: the scores of the unpruned expert; ratios are relative to them.
      result: the answer, once the search has ended.
      scores: every candidate's scores by task.
      costs: every candidate's seconds.
    """

    expert: str
    partitions: tuple[float, ...]
    split: Split
    dense: Scores
    result: SearchResult | None = None
    scores: dict[Factors, Scores] = field(default_factory=dict)
    costs: dict[Factors, Cost] = field(default_factory=dict)

    def ratio(self, factors: Factors) -> float:
        """Return the domain ratio of a candidate, a fraction."""
        accuracies = [self.scores[factors][task].accuracy for task in self.dense]
        return domain_ratio(accuracies, [score.accuracy for score in self.dense.values()])

    def in_words(self) -> str:
        """Return the answer as one line of text."""
        result = self.result
        if result is None:
            return "not found yet"
        return (
            f"{listed(result.factors)} of the partitions {listed(self.partitions)}, by method {result.method} of "
            f"{result.evaluations} candidates: domain ratio {100 * result.score:.2f} % on the {self.split} split"
        )

    def as_dict(self) -> dict:
        """Return everything as JSON has it, the content of search-NAME.json."""
        visits = self.result.visits if self.result else ()
        return {
            "expert": self.expert,
            "partitions": self.partitions,
            "split": self.split,
            "expert_scores": scores_dict(self.dense),
            "answer": None
            if self.result is None
            else {
                "factors": self.result.factors,
                "domain_ratio": self.result.score,
                "method": self.result.method,
                "evaluations": self.result.evaluations,
            },
            "visits": [visit._asdict() for visit in visits],
            "candidates": [
                {"factors": factors, "scores": scores_dict(scores), "seconds": asdict(self.costs[factors])}
                for factors, scores in self.scores.items()
            ],
        }


def search_factors(
    candidates: Candidates,
    domains: Mapping[str, list[Task]],
    factor_search: FactorSearch,
    merge: MergeConfig,
    workdir: Path,
) -> dict[str, Searched]:
    """Search the factors of every domain's expert, each on its own domain's tasks.

    Experts whose factors `factor_search` gives are left out. See `search_expert` for what is written to `workdir`.
    """
    return {
        name: search_expert(candidates, name, domains[name], factor_search, merge, workdir)
        for name in merge.experts
        if name in domains and name not in factor_search.given
    }


def search_expert(
    candidates: Candidates,
    name: str,
    tasks: Sequence[Task],
    factor_search: FactorSearch,
    merge: MergeConfig,
    workdir: Path,
) -> Searched:
    """Search the factors of one expert: the candidate with the highest domain ratio on `tasks`.

    A candidate costs one fused pass over base and expert, one hand-over of weights to the evaluator, and the responses.
    After each candidate everything measured so far is written to search-NAME.json in `workdir`.

    Raises:
      ValueError: the unpruned expert solves no item of a task, so that no ratio can be formed.
    """
    alone = replace(merge, experts=(name,), factors={}, coefficients={})
    options = replace(candidates.evaluation.options, limit=factor_search.limit)
    dense = candidates.dense(name, tasks, factor_search.split, options=options)
    check_solvable(name, dense, factor_search.split)
    merger = candidates.opened.merger(alone)
    searched = Searched(name, alone.partitions, factor_search.split, dense)
    file = workdir / f"search-{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)

    def keep() -> None:
        if processes.index() == 0:
            write_whole(file, json.dumps(searched.as_dict(), indent=1) + "\n")

    def report(visit: Visit) -> None:
        keep()
        chosen = name, visit.method, listed(visit.factors), 100 * visit.score
        logging.info("%s: method %d, factors %s: domain ratio %.2f %%", *chosen)

    with steps(f"search the factors of {name}", None, "candidates") as advance:

        def score(factors: Factors) -> float:
            label = f"{name} with factors {listed(factors)}"
            chosen = {name: factors}
            searched.scores[factors] = candidates.merged(
                label, merger, tasks, factor_search.split, options, factors=chosen
            )
            searched.costs[factors] = candidates.cost(merger.merge_config(chosen))
            advance()
            return searched.ratio(factors)

        searched.result = search(score, len(alone.partitions), factor_search.config(alone), report)
    keep()
    return searched


def check_solvable(name: str, dense: Scores, split: Split) -> None:
    """Refuse a task of which the unpruned expert solves nothing."""
    for task, score in dense.items():
        if not score.correct:
            raise ValueError(
                f"expert {name!r} solves none of the {score.total} {split} items of {task}, so that no domain ratio "
                f"can be formed; leave {task} out of --evaluate, or raise --search_limit."
            )


def scores_dict(scores: Scores) -> dict[str, dict]:
    """Return scores as JSON has them."""
    return {
        task: {"correct": score.correct, "total": score.total, "accuracy": score.accuracy, "interval": score.interval}
        for task, score in scores.items()
    }


def print_searches(searches: Mapping[str, Searched], options: TaskOptions) -> None:
    """Print the factors, the mean cost of a candidate, and the flags with which a later run reports on other items."""
    table = Table(
        "expert",
        "split",
        "partitions",
        "factors",
        "domain ratio",
        "candidates",
        "apply",
        "hand over",
        "responses",
        title="factors found, and mean seconds of a candidate",
    )
    for name, searched in searches.items():
        costs = [cost for cost in searched.costs.values() if cost.responses]
        seconds = [
            sum(getattr(c, part) for c in costs) / max(len(costs), 1) for part in ("apply", "hand_over", "generate")
        ]
        table.add_row(
            name,
            searched.split,
            listed(searched.partitions),
            listed(searched.result.factors),
            f"{100 * searched.result.score:.2f} %",
            str(searched.result.evaluations),
            *(f"{value:.2f}" for value in seconds),
        )
    console().print(table)
    flags = [f"--factors={name}={listed(searched.result.factors)}" for name, searched in searches.items()]
    if "validation" in {searched.split for searched in searches.values()}:
        flags += [f"--validation_share={options.validation_share:g}", f"--split_seed={options.split_seed}"]
    console().print(" ".join(flags))
    for name, searched in searches.items():
        if searched.split == "test":
            console().print(f"{name}: chosen by the items that are reported (--search_split=test), as in the paper.")
