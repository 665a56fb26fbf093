"""Searching experts' factors: on which items, with what result, at what cost."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from absl import logging
from rich.table import Table

from dppa_jax.config.evaluation import TaskOptions
from dppa_jax.config.merge import MergeConfig
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
    """The search of one expert's factors: every candidate with the scores of its tasks and what it cost."""

    expert: str
    partitions: tuple[float, ...]  # rates, highest first
    split: Split
    dense: Scores  # the expert's own, which ratios are relative to
    result: SearchResult | None = None
    scores: dict[Factors, Scores] = field(default_factory=dict)
    costs: dict[Factors, Cost] = field(default_factory=dict)

    def ratio(self, factors: Factors) -> float:
        """The domain ratio of a candidate."""
        accuracies = [self.scores[factors][task].accuracy for task in self.dense]
        return domain_ratio(accuracies, [score.accuracy for score in self.dense.values()])

    def in_words(self) -> str:
        found = self.result
        if found is None:
            return "not found yet"
        return (
            f"{_join(found.factors)} of the partitions {_join(self.partitions)}, by method {found.method} of "
            f"{found.evaluations} candidates: domain ratio {100 * found.score:.2f} % on the {self.split} split"
        )

    def as_dict(self) -> dict:
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
    candidates: Candidates, domains: Mapping[str, list[Task]], given: FactorSearch, merge: MergeConfig, workdir: Path
) -> dict[str, Searched]:
    """The best factors of every domain's expert, each by its own tasks, but for those whose factors are given.

    What is found is in `workdir` at once.
    """
    return {
        name: search_expert(candidates, name, domains[name], given, merge, workdir)
        for name in merge.experts
        if name in domains and name not in given.given
    }


def search_expert(
    candidates: Candidates, name: str, tasks: Sequence[Task], given: FactorSearch, merge: MergeConfig, workdir: Path
) -> Searched:
    """A candidate costs a fused pass over base and expert, a hand-over of weights, and the responses."""
    alone = replace(merge, experts=(name,), factors={}, coefficients={})
    options = replace(candidates.evaluation.options, limit=given.limit)
    dense = candidates.dense(name, tasks, given.split, options=options)
    check_solvable(name, dense, given.split)
    merger = candidates.merger(alone)
    found = Searched(name, alone.partitions, given.split, dense)
    file = workdir / f"search-{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)

    def keep() -> None:
        if processes.index() == 0:
            write_whole(file, json.dumps(found.as_dict(), indent=1) + "\n")

    def report(visit: Visit) -> None:
        keep()
        chosen = name, visit.method, _join(visit.factors), 100 * visit.score
        logging.info("%s: method %d, factors %s: domain ratio %.2f %%", *chosen)

    with steps(f"search the factors of {name}", None, "candidates") as advance:

        def score(factors: Factors) -> float:
            label = f"{name} with factors {_join(factors)}"
            chosen = {name: factors}
            found.scores[factors] = candidates.merged(label, merger, tasks, given.split, options, factors=chosen)
            found.costs[factors] = candidates.cost(merger.merge_config(chosen))
            advance()
            return found.ratio(factors)

        found.result = search(score, len(alone.partitions), given.config(alone), report)
    keep()
    return found


def check_solvable(name: str, dense: Scores, split: Split) -> None:
    for task, score in dense.items():
        if not score.correct:
            raise ValueError(
                f"expert {name!r} solves none of the {score.total} {split} items of {task}, so that no domain ratio "
                f"can be formed; leave {task} out of --evaluate, or raise --search_limit."
            )


def scores_dict(scores: Scores) -> dict[str, dict]:
    return {
        task: {"correct": score.correct, "total": score.total, "accuracy": score.accuracy, "interval": score.interval}
        for task, score in scores.items()
    }


def print_searches(found: Mapping[str, Searched], options: TaskOptions) -> None:
    """The factors, what a candidate cost beside its responses, and the flags that report on items not searched by."""
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
    for name, one in found.items():
        costs = [cost for cost in one.costs.values() if cost.responses]
        seconds = [
            sum(getattr(c, part) for c in costs) / max(len(costs), 1) for part in ("apply", "hand_over", "generate")
        ]
        table.add_row(
            name,
            one.split,
            _join(one.partitions),
            _join(one.result.factors),
            f"{100 * one.result.score:.2f} %",
            str(one.result.evaluations),
            *(f"{value:.2f}" for value in seconds),
        )
    console().print(table)
    flags = [f"--factors={name}={_join(one.result.factors)}" for name, one in found.items()]
    if "validation" in {one.split for one in found.values()}:
        flags += [f"--validation_share={options.validation_share:g}", f"--split_seed={options.split_seed}"]
    console().print(" ".join(flags))
    for name, one in found.items():
        if one.split == "test":
            console().print(f"{name}: chosen by the items that are reported (--search_split=test), as in the paper.")


def _join(numbers: Sequence[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)
