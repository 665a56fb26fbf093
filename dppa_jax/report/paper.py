"""The paper's tables, from what was measured, with its published values beside ours where the models are its own.

Source: Zhu et al. 2024, tables 1, 2, 3, 5, 6 and 7 (appendix A).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dppa_jax.delta.presets import METHODS
from dppa_jax.evaluate.ratios import domain_ratio, task_ratio
from dppa_jax.evaluate.scores import Scores
from dppa_jax.evaluate.tasks import Task
from dppa_jax.report import published
from dppa_jax.report.measurements import Measurements, Merged
from dppa_jax.report.tables import Cell, ResultTable

LABELS = {
    "task_arithmetic": "Task arithmetic",
    "magnitude": "Magnitude",
    "owl": "OWL",
    "dp": "DP",
    "dppa": "DPPA",
    "dare": "DARE",
    "dare_dpa": "DARE+DPA",
    "darex_q": "DAREx-q",
    "ties": "TIES",
    "dare_ties": "DARE+TIES",
    "adamerging": "AdaMerging",
    "adamerging_layerwise": "AdaMerging by layer",
    "adamerging_linearwise": "AdaMerging by tensor",
}

# Columns in the paper's order; what else was measured follows them.
TABLE_1 = ("magnitude", "owl", "dare", "dppa")
TABLE_2 = ("magnitude", "owl", "dp")
TABLE_3 = ("dare", "dare_dpa", "dppa")
TABLE_7 = ("magnitude", "owl", "dp", "dare")
MERGED_TABLES = {3: 5, 2: 6}  # by the number of experts

RATIOS = "Domain ratio: the geometric mean, over a domain's tasks, of accuracy / the dense expert's accuracy."
DEDUCED = "( ): not printed in the paper, but its tables 1 and 2 follow from them by its appendix A."

Domains = Mapping[str, Sequence[Task]]


def paper_tables(
    measured: Mapping[int, Measurements], domains: Domains, experts: int, papers: bool = False
) -> list[ResultTable]:
    """Every table whose methods were measured.

    Args:
      measured: by seed; a later seed may lack models that no seed changes, and then has the first one's dense scores.
      domains: the tasks of every domain, which has the name of its expert.
      experts: how many were merged.
      papers: whether the models are the paper's (`published.is_papers`), so that its values stand beside ours, if the
        tasks are the paper's, too.
    """
    made = _Tables(measured, domains, experts, papers)
    found = [made.dense()]
    if made.singles:
        methods = made.methods(TABLE_1)
        found.append(made.table_1(methods))
        if "dp" in methods:
            found.append(made.at_highest_rate(2, TABLE_2))
        if "dare_dpa" in methods:
            found.append(made.at_highest_rate(3, TABLE_3))
    if made.merges:
        found += [made.merge_ratios(), made.merge_accuracies()]
    if made.singles:
        found.append(made.appendix())
    return found


def evaluated(
    base: Scores, experts: Scores, merged: Scores, domains: Domains, known: Mapping[str, float | None] | None = None
) -> ResultTable:
    """One merge: accuracies of the base, of each domain's expert and of the merge; task and domain ratios.

    Args:
      base: its scores by task, as the others'.
      experts: of each task, by the expert of its domain.
      merged: of the merge.
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
    """What the paper's table 5 or 6 says of a merge of its models, by domain."""
    tables = _Tables({}, domains, experts, papers=True)
    return {domain: tables.published(MERGED_TABLES.get(experts), domain, method, rate) for domain in domains}


def label(name: str) -> str:
    """A method or a domain as tables and figures write it.

    >>> label("dare_dpa"), label("math")
    ('DARE+DPA', 'Math')
    """
    return LABELS.get(name, name[:1].upper() + name[1:])


def percent(rate: float) -> str:
    """
    >>> percent(0.1 + 0.2)
    '30 %'
    """
    return f"{100 * rate:g} %"


def raw(measured: Mapping[int, Measurements]) -> dict:
    """Every score, as JSON: right answers and questions of every model and task, by seed."""

    def counts(scores: Scores) -> dict:
        return {task: score._asdict() for task, score in scores.items()}

    return {
        str(seed): {
            "base": counts(m.base),
            "experts": counts(m.experts),
            "single": [
                {"method": method, "rate": rate, "expert": expert, "scores": counts(scores)}
                for (method, rate, expert), scores in m.single.items()
            ],
            "merged": [{**key._asdict(), "scores": counts(scores)} for key, scores in m.merged.items()],
        }
        for seed, m in measured.items()
    }


def _accuracies(scores: Scores, tasks: Sequence[Task]) -> list[float]:
    return [scores[task.name].accuracy for task in tasks]


@dataclass(frozen=True)
class _Tables:
    measured: Mapping[int, Measurements]
    domains: Domains
    experts: int
    papers: bool

    @property
    def dense_seeds(self) -> list[Measurements]:
        """Those with dense models of their own."""
        return list({id(m.base): m for m in self.measured.values()}.values())

    @property
    def singles(self) -> list[tuple[str, float]]:
        """(method, rate) of what was measured of every expert by itself, in the order measured."""
        return list(dict.fromkeys((method, rate) for m in self.measured.values() for method, rate, _ in m.single))

    @property
    def merges(self) -> list[Merged]:
        return list(dict.fromkeys(key for m in self.measured.values() for key in m.merged))

    @property
    def rates(self) -> list[float]:
        found = sorted({rate for method, rate in self.singles if METHODS[method].score})
        return found or [0.0]

    def methods(self, first: Sequence[str]) -> list[str]:
        """Those measured, the given ones first."""
        found = {method for method, _ in self.singles}
        return [method for method in dict.fromkeys((*first, *METHODS)) if method in found]

    def dense(self) -> ResultTable:
        rows = {}
        for domain, tasks in self.domains.items():
            for task in tasks:
                known = published.DENSE.get(task.name) if self.papers else None
                expert = Cell.of_scores([m.experts[task.name] for m in self.dense_seeds], known)
                rows[label(domain), task.name] = [self._base(task), expert]
        columns = ("base", "its expert")
        return ResultTable("Accuracy of the dense models (%)", "task", columns, rows, name="dense", beside=DEDUCED)

    def table_1(self, methods: Sequence[str]) -> ResultTable:
        rows = {
            (label(domain), percent(rate)): [self._ratio(1, domain, method, rate) for method in methods]
            for domain in self.domains
            for rate in self.rates
        }
        title = "Domain ratios of single experts, pruned (%), like table 1 of the paper"
        return ResultTable(title, "sparse ratio", tuple(map(label, methods)), rows, (RATIOS,), "table_1")

    def at_highest_rate(self, number: int, methods: Sequence[str]) -> ResultTable:
        rate = self.rates[-1]
        chosen = [method for method in methods if method in self.methods(())]
        rows = {label(domain): [self._ratio(number, domain, m, rate) for m in chosen] for domain in self.domains}
        title = f"Domain ratios with {percent(rate)} removed (%), like table {number} of the paper"
        return ResultTable(title, "domain", tuple(map(label, chosen)), rows, (RATIOS,), f"table_{number}")

    def merge_ratios(self) -> ResultTable:
        number = MERGED_TABLES.get(self.experts)
        rows = {
            self._merge_name(key): [
                Cell(
                    self._over_seeds(lambda m, tasks=tasks, key=key: _ratio(m.merged.get(key), m, tasks)),
                    published=self.published(number, domain, key.method, key.rate),
                )
                for domain, tasks in self.domains.items()
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
        tasks = [task for tasks in self.domains.values() for task in tasks]
        rows = {
            "base": [self._base(task) for task in tasks],
            "dense experts": [Cell.of_scores([m.experts[task.name] for m in self.dense_seeds]) for task in tasks],
        }
        for key in self._merge_order():
            rows[self._merge_name(key)] = [
                Cell.of_scores([m.merged[key][task.name] for m in self.measured.values() if key in m.merged])
                for task in tasks
            ]
        title = "Accuracy of the merge of all experts (%)"
        columns = tuple(task.name for task in tasks)
        return ResultTable(title, "method, pruning rate", columns, rows, name="merge_accuracies")

    def appendix(self) -> ResultTable:
        methods = self.methods(TABLE_7)
        rows = {
            (task.name, percent(rate)): [self._accuracy(domain, task, method, rate) for method in methods]
            for domain, tasks in self.domains.items()
            for task in tasks
            for rate in self.rates
        }
        title = "Accuracy of single experts, pruned (%), like table 7 (appendix A) of the paper"
        return ResultTable(title, "sparse ratio", tuple(map(label, methods)), rows, name="table_7")

    def _base(self, task: Task) -> Cell:
        return Cell.of_scores([m.base[task.name] for m in self.dense_seeds])

    def _ratio(self, number: int, domain: str, method: str, rate: float) -> Cell:
        tasks, key = self.domains[domain], (method, rate if METHODS[method].score else 0.0, domain)
        values = self._over_seeds(lambda m: _ratio(m.single.get(key), m, tasks))
        return Cell(values, published=self.published(number, domain, method, rate))

    def _accuracy(self, domain: str, task: Task, method: str, rate: float) -> Cell:
        key = (method, rate if METHODS[method].score else 0.0, domain)
        scores = [m.single[key][task.name] for m in self.measured.values() if key in m.single]
        return Cell.of_scores(scores, self.published(7, task.name, method, rate))

    def _over_seeds(self, of: Callable[[Measurements], float | None]) -> tuple[float, ...]:
        return tuple(value for m in self.measured.values() if (value := of(m)) is not None)

    def published(self, number: int | None, subject: str, method: str, rate: float) -> float | None:
        """A ratio only where it is over the paper's two tasks. `subject` is a domain, in table 7 a task."""
        tasks = {task.name for task in self.domains.get(subject, ())}
        if not self.papers or number is None or (number != 7 and tasks != published.TASKS[subject]):
            return None
        if number == 6 and "finance" not in self.domains:  # of the pairs, the paper merged math and finance
            return None
        return published.lookup(number, subject, method, rate)

    def _merge_order(self) -> list[Merged]:
        """The highest rates first, as in the paper, after the methods that prune nothing."""
        return sorted(self.merges, key=lambda key: (METHODS[key.method].score is not None, -key.rate))

    def _merge_name(self, key: Merged) -> str:
        name = label(key.method) + (f", {label(key.coefficients)}" if key.coefficients else "")
        return f"{name} {percent(key.rate)}" if METHODS[key.method].score else name


def _ratio(found: Scores | None, measured: Measurements, tasks: Sequence[Task]) -> float | None:
    """None where nothing was measured."""
    return domain_ratio(_accuracies(found, tasks), _accuracies(measured.experts, tasks)) if found else None
