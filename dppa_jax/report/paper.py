"""Make the paper's tables from what was measured, beside its published values if the models are its own.

Source: Zhu et al. 2024, tables 1, 2, 3, 5, 6 and 7 (appendix A).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dppa_jax.config.report import Choice
from dppa_jax.delta.presets import METHODS
from dppa_jax.evaluate.ratios import domain_ratio, task_ratio
from dppa_jax.evaluate.scores import Scores
from dppa_jax.evaluate.tasks import Task
from dppa_jax.report import published
from dppa_jax.report.labels import label, percent
from dppa_jax.report.measurements import Measurements, Merged, prunes
from dppa_jax.report.tables import Cell, ResultTable

COLUMNS = {  # the methods of each of the paper's tables of single experts, in its order
    1: ("magnitude", "owl", "dare", "dppa"),
    2: ("magnitude", "owl", "dp"),
    3: ("dare", "dare_dpa", "dppa"),
    7: ("magnitude", "owl", "dp", "dare"),
}
HIGHEST_RATE = (2, 3)  # tables of single experts at the highest rate alone
MERGED_TABLES = {3: 5, 2: 6}  # the table of merges, by the number of experts

RATIOS = "Domain ratio: the geometric mean, over a domain's tasks, of accuracy / the dense expert's accuracy."
MEAN_RATIO = "Accuracy: the mean of the domain ratios, so 100 is what the dense experts reach."
DENSITY = "Bytes of the delta: its density, 1 - rate: the share of its values in linears that is not set to 0."
DEDUCED = "( ): not printed in the paper, but its tables 1 and 2 follow from them by its appendix A."

Domains = Mapping[str, Sequence[Task]]


def paper_tables(
    measured: Mapping[int, Measurements], domains: Domains, experts: int, papers: bool = False
) -> list[ResultTable]:
    """Return the tables whose methods were measured.

    Tables 2 and 3 are shown if a method was measured that they have and table 1 lacks.

    Args:
      measured: by seed. A later seed may lack models that no seed changes; then it has the dense scores of the first.
      domains: the tasks of every domain; its expert has the domain's name.
      experts: how many experts were merged.
      papers: whether the models are the paper's (`published.is_papers`). Its values then stand beside ours, unless the
        tasks differ.
    """
    builder = _Tables(measured, domains, experts, papers)
    tables = [builder.dense()]
    if builder.singles:
        methods = builder.methods(COLUMNS[1])
        tables.append(builder.table_1(methods))
        for number in HIGHEST_RATE:
            own = set(COLUMNS[number]) - set(COLUMNS[1])
            if own & set(methods):
                tables.append(builder.at_highest_rate(number))
    if builder.merges:
        tables += [builder.merge_ratios(), builder.merge_accuracies()]
    if builder.singles:
        tables.append(builder.appendix())
    if builder.singles or builder.merges:
        tables.append(builder.kept())
    return tables


def merge_table(
    base: Scores, experts: Scores, merged: Scores, domains: Domains, known: Mapping[str, float | None] | None = None
) -> ResultTable:
    """Return the table of one merge: accuracies of the base, the dense experts and the merge, and the merge's ratios.

    Args:
      base: the base's scores by task.
      experts: the score of each task by the dense expert of its domain.
      merged: the merge's scores by task.
      domains: the tasks of every domain.
      known: published domain ratios, see `published_merge`.
    """
    known = known or {}
    rows = {}
    for domain, tasks in domains.items():
        for task in tasks:
            scores = base[task.name], experts[task.name], merged[task.name]
            ratio = task_ratio(scores[2].accuracy, scores[1].accuracy)
            rows[label(domain), task.name] = [*(Cell.of_scores([score]) for score in scores), Cell((ratio,))]
        ratio = domain_ratio(_accuracies(merged, tasks), _accuracies(experts, tasks))
        rows[label(domain), "domain ratio"] = [Cell(), Cell(), Cell(), Cell((ratio,), published=known.get(domain))]
    columns = ("base", "dense expert", "merge", "ratio")
    return ResultTable("Accuracy and ratios of the merge (%)", "task", columns, rows, (RATIOS,), "evaluated")


def published_merge(experts: int, domains: Domains, method: str, rate: float) -> dict[str, float | None]:
    """Return the domain ratios of a merge as the paper's table 5 or 6 has them; None where it has none."""
    tables = _Tables({}, domains, experts, papers=True)
    return {domain: tables.published(MERGED_TABLES.get(experts), domain, method, rate) for domain in domains}


def raw(measured: Mapping[int, Measurements]) -> dict:
    """Return every score as JSON has it: right answers and questions of every model and task, by seed."""

    def counts(scores: Scores) -> dict:
        known = lambda score: {name: value for name, value in score._asdict().items() if value is not None}  # noqa: E731
        return {task: known(score) for task, score in scores.items()}

    return {
        str(seed): {
            "base": counts(m.base),
            "experts": {expert: counts(scores) for expert, scores in m.experts.items()},
            "single": [
                {"name": key[0], **_parts(key[0]), "rate": key[1], "expert": key[2], "q": m.q.get(key)}
                | {"factors": m.factors.get(key), "scores": counts(scores)}
                for key, scores in m.single.items()
            ],
            "sizes": m.sizes,
            "merged": [{**key._asdict(), "scores": counts(scores)} for key, scores in m.merged.items()],
        }
        for seed, m in measured.items()
    }


def _parts(name: str) -> dict[str, str | None]:
    """Return what a method is made of, for JSON: preset, the score in place of its own, the way to q or factors."""
    choice = Choice.of(name)
    return {"method": choice.method, "score": choice.score or None, "way": choice.way or None}


def _accuracies(scores: Scores, tasks: Sequence[Task]) -> list[float]:
    return [scores[task.name].accuracy for task in tasks]


@dataclass(frozen=True)
class _Tables:
    """Builds tables; the attributes are the arguments of `paper_tables`."""

    measured: Mapping[int, Measurements]
    domains: Domains
    experts: int
    papers: bool

    @property
    def dense_seeds(self) -> list[Measurements]:
        """The measurements that have dense scores of their own."""
        return list({id(m.base): m for m in self.measured.values()}.values())

    @property
    def singles(self) -> list[tuple[str, float]]:
        """The (method, rate) pairs of pruned single experts, in the order measured."""
        return list(dict.fromkeys((method, rate) for m in self.measured.values() for method, rate, _ in m.single))

    @property
    def merges(self) -> list[Merged]:
        """The merges, in the order measured."""
        return list(dict.fromkeys(key for m in self.measured.values() for key in m.merged))

    @property
    def rates(self) -> list[float]:
        """The rates of pruned single experts, lowest first."""
        rates = sorted({rate for method, rate in self.singles if prunes(method)})
        return rates or [0.0]

    def methods(self, first: Sequence[str] = ()) -> list[str]:
        """Return the methods that single experts were pruned by: those in `first`, then the others."""
        measured = dict.fromkeys(method for method, _ in self.singles)
        others = sorted(measured, key=lambda method: list(METHODS).index(Choice.of(method).method))
        return [method for method in dict.fromkeys((*first, *others)) if method in measured]

    def dense(self) -> ResultTable:
        """Return the table of the dense models' accuracies."""
        rows = {}
        for domain, tasks in self.domains.items():
            for task in tasks:
                known = published.DENSE.get(task.name) if self.papers else None
                expert = Cell.of_scores([m.experts[domain][task.name] for m in self.dense_seeds], known)
                rows[label(domain), task.name] = [self._base(task), expert]
        columns = ("base", "its expert")
        return ResultTable("Accuracy of the dense models (%)", "task", columns, rows, name="dense", beside=DEDUCED)

    def table_1(self, methods: Sequence[str]) -> ResultTable:
        """Return the domain ratios of single experts by rate and method."""
        rows = {
            (label(domain), percent(rate)): [self._ratio(1, domain, method, rate) for method in methods]
            for domain in self.domains
            for rate in self.rates
        }
        title = "Domain ratios of single experts, pruned (%), like table 1 of the paper"
        return ResultTable(title, "sparse ratio", tuple(map(label, methods)), rows, (RATIOS,), "table_1")

    def at_highest_rate(self, number: int) -> ResultTable:
        """Return the paper's table of this number: the domain ratios of single experts at the highest rate."""
        rate, measured = self.rates[-1], self.methods()
        chosen = [method for method in COLUMNS[number] if method in measured]
        rows = {label(domain): [self._ratio(number, domain, m, rate) for m in chosen] for domain in self.domains}
        title = f"Domain ratios with {percent(rate)} removed (%), like table {number} of the paper"
        return ResultTable(title, "domain", tuple(map(label, chosen)), rows, (RATIOS,), f"table_{number}")

    def merge_ratios(self) -> ResultTable:
        """Return the domain ratios of the merges."""
        number = MERGED_TABLES.get(self.experts)
        rows = {
            self._merge_name(key): [
                Cell(
                    self._over_seeds(lambda m, domain=domain, key=key: _ratio(m.merged.get(key), m, domain)),
                    published=self.published(number, domain, key.method, key.rate),
                )
                for domain in self.domains
            ]
            for key in self._merge_order()
        }
        title = "Domain ratios of the merge of all experts (%)" + (
            f", like table {number} of the paper" if number else ""
        )
        columns = tuple(map(label, self.domains))
        name = f"table_{number}" if number else "merges"
        return ResultTable(title, "method, pruning rate", columns, rows, (RATIOS,), name)

    def merge_accuracies(self) -> ResultTable:
        """Return the accuracies of the base, the dense experts and the merges."""
        of_domain = [(domain, task) for domain, tasks in self.domains.items() for task in tasks]
        tasks = [task for _, task in of_domain]
        dense = [Cell.of_scores([m.experts[domain][task.name] for m in self.dense_seeds]) for domain, task in of_domain]
        rows = {"base": [self._base(task) for task in tasks], "dense experts": dense}
        for key in self._merge_order():
            rows[self._merge_name(key)] = [
                Cell.of_scores([m.merged[key][task.name] for m in self.measured.values() if key in m.merged])
                for task in tasks
            ]
        title = "Accuracy of the merge of all experts (%)"
        columns = tuple(task.name for task in tasks)
        return ResultTable(title, "method, pruning rate", columns, rows, name="merge_accuracies")

    def appendix(self) -> ResultTable:
        """Return the accuracies of single experts by task, rate and method."""
        methods = self.methods(COLUMNS[7])
        rows = {
            (_asked(task, domain), percent(rate)): [self._accuracy(domain, task, method, rate) for method in methods]
            for domain, tasks in self.domains.items()
            for task in tasks
            for rate in self.rates
        }
        title = "Accuracy of single experts, pruned (%), like table 7 (appendix A) of the paper"
        return ResultTable(title, "sparse ratio", tuple(map(label, methods)), rows, name="table_7")

    def kept(self) -> ResultTable:
        """Why one prunes: the share of a delta's bytes that is kept beside the share of the accuracy."""
        rows: dict[tuple[str, str], list[Cell]] = {}
        for method, rate in sorted(self.singles, key=lambda single: single[1]):
            rows["single experts, pruned", self._name(method, rate)] = self._kept(
                method, rate, lambda m, domain, at=(method, rate): m.single.get((*at, domain))
            )
        for key in sorted(self.merges, key=lambda key: key.rate):
            rows["merge of all experts", self._merge_name(key)] = self._kept(
                key.method, key.rate, lambda m, _, key=key: m.merged.get(key)
            )
        title, columns = "Why prune: what is kept of the delta's bytes and of the accuracy (%)", ("bytes", "accuracy")
        return ResultTable(title, "method, pruning rate", columns, rows, (DENSITY, MEAN_RATIO, RATIOS), "kept")

    def _kept(self, method: str, rate: float, scores_of: Callable[[Measurements, str], Scores | None]) -> list[Cell]:
        """Density, and the mean over the domains of the domain ratio."""

        def mean_ratio(m: Measurements) -> float | None:
            ratios = [_ratio(scores_of(m, domain), m, domain) for domain in self.domains]
            return None if None in ratios else float(np.mean(ratios))

        density = 1.0 - rate if prunes(method) else 1.0
        return [Cell((density,)), Cell(self._over_seeds(mean_ratio))]

    def _base(self, task: Task) -> Cell:
        return Cell.of_scores([m.base[task.name] for m in self.dense_seeds])

    def _ratio(self, number: int, domain: str, method: str, rate: float) -> Cell:
        key = (method, rate if prunes(method) else 0.0, domain)
        values = self._over_seeds(lambda m: _ratio(m.single.get(key), m, domain))
        return Cell(values, published=self.published(number, domain, method, rate))

    def _accuracy(self, domain: str, task: Task, method: str, rate: float) -> Cell:
        key = (method, rate if prunes(method) else 0.0, domain)
        scores = [m.single[key][task.name] for m in self.measured.values() if key in m.single]
        return Cell.of_scores(scores, self.published(7, task.name, method, rate))

    def _over_seeds(self, ratio: Callable[[Measurements], float | None]) -> tuple[float, ...]:
        return tuple(value for m in self.measured.values() if (value := ratio(m)) is not None)

    def published(self, number: int | None, subject: str, method: str, rate: float) -> float | None:
        """Return a published value; None if there is none, or if it is a ratio over other tasks than ours.

        `subject` is a domain; in table 7 it is a task.
        """
        tasks = {task.name for task in self.domains.get(subject, ())}
        if not self.papers or number is None or (number != 7 and tasks != published.TASKS[subject]):
            return None
        if number == 6 and "finance" not in self.domains:  # of the pairs, the paper merged math and finance
            return None
        return published.lookup(number, subject, method, rate)

    def _merge_order(self) -> list[Merged]:
        """Return the merges as the paper orders them: those that prune nothing, then the highest rates first."""
        return sorted(self.merges, key=lambda key: (prunes(key.method), -key.rate))

    def _merge_name(self, key: Merged) -> str:
        return self._name(key.method, key.rate, f", {label(key.coefficients)}" if key.coefficients else "")

    def _name(self, method: str, rate: float, more: str = "") -> str:
        name = label(method) + more
        return f"{name} {percent(rate)}" if prunes(method) else name


def _ratio(scores: Scores | None, measured: Measurements, domain: str) -> float | None:
    """Return the ratio of a model to the dense expert of a domain; None if it was not measured."""
    dense = measured.experts[domain]
    accuracies = [scores[task].accuracy for task in dense] if scores else []
    return domain_ratio(accuracies, [score.accuracy for score in dense.values()]) if scores else None


def _asked(task: Task, expert: str) -> str:
    """Return how a row names a task, with the expert where another one has the domain's name."""
    return task.name if expert == task.domain else f"{task.name}, {label(expert)}"
