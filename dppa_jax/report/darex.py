"""Tables of DAREx from what was measured: by method and rate, q, trainings of an expert, sizes of deltas.

The paper (Deng et al. 2024) has such tables; its numbers, as far as they are known, are in `darex_published`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from dppa_jax.config.report import Choice
from dppa_jax.delta.score import SCORES
from dppa_jax.evaluate.scores import Score, Scores
from dppa_jax.report.labels import label, percent
from dppa_jax.report.measurements import Measurements
from dppa_jax.report.paper import Domains
from dppa_jax.report.tables import Cell, ResultTable

RANDOM, IMPORTANT, WHOLE = "random elements", "elements by importance", "whole rows, columns or groups"
POOLED = "Accuracy: over all items of the domain's tasks together."
BEST = "The best of several methods, by the items that are shown here: a little too good."
Q = "q divides what is kept; of one for each linear it is their mean."
SIZES = "Mean |δ| and ρ = ‖δ‖ / ‖base‖ are over the linears, which are what is pruned."


def darex_tables(measured: Mapping[int, Measurements], domains: Domains) -> list[ResultTable]:
    """Return the tables of single experts, if a method was measured that divides by q or removes whole structures.

    Args:
      measured: by seed. A later seed may lack models that no seed changes.
      domains: the tasks of every expert that is measured alone.
    """
    tables = _DarexTables(measured, domains)
    if not concerns(tables.choices):
        return []
    found = [tables.by_rate(expert) for expert in domains]
    return [*found, *filter(None, (tables.q(), tables.trainings(), tables.sizes()))]


def concerns(choices: Iterable[Choice]) -> bool:
    """Tell whether one of the methods divides by q or removes whole structures."""
    return any(choice.takes_q or (choice.ranks and _kind(choice) == WHOLE) for choice in choices)


def _kind(choice: Choice) -> str:
    """Say what is removed, by the facts of the score."""
    score = SCORES[choice.ranks]
    return WHOLE if score.whole else RANDOM if score.random else IMPORTANT


@dataclass(frozen=True)
class _DarexTables:
    """Builds tables; the attributes are the arguments of `darex_tables`."""

    measured: Mapping[int, Measurements]
    domains: Domains

    @property
    def dense_seeds(self) -> list[Measurements]:
        """The measurements that have dense scores of their own."""
        return list({id(m.base): m for m in self.measured.values()}.values())

    @property
    def choices(self) -> list[Choice]:
        """The methods that remove anything, in the order measured."""
        names = dict.fromkeys(method for m in self.measured.values() for method, _, _ in m.single)
        return [choice for choice in map(Choice.of, names) if choice.ranks]

    @property
    def rates(self) -> list[float]:
        """The rates, lowest first."""
        names = {choice.name for choice in self.choices}
        return sorted({rate for m in self.measured.values() for method, rate, _ in m.single if method in names})

    def by_rate(self, expert: str) -> ResultTable:
        """Return an expert's accuracies by method and rate, below those of the base and of the whole expert."""
        whole = {
            "base": _cell({task: m.base[task] for task in m.experts[expert]} for m in self.dense_seeds),
            "whole expert": self._whole(expert),
        }
        rows = {("", name): [cell] * len(self.rates) for name, cell in whole.items()}
        for kind in (RANDOM, IMPORTANT, WHOLE):
            for choice in self.choices:
                if _kind(choice) == kind:
                    rows[kind, label(choice.name)] = [self._pruned(choice, rate, expert) for rate in self.rates]
        title = f"{label(expert)}: accuracy of the pruned expert by share removed (%)"
        columns = tuple(map(percent, self.rates))
        return ResultTable(title, "method", columns, rows, (POOLED,), f"rates-{expert}")

    def q(self) -> ResultTable | None:
        """Return the q that were found, by method, expert and rate; None if none was."""
        rows = {}
        for choice in self.choices:
            for expert in self.domains if choice.finds_q else ():
                keys = [(choice.name, rate, expert) for rate in self.rates]
                rows[label(choice.name), label(expert)] = [Cell(tuple(self._q_of(key)), share=False) for key in keys]
        columns = tuple(map(percent, self.rates))
        return ResultTable("q that was found", "expert", columns, rows, (Q,), "q") if rows else None

    def trainings(self) -> ResultTable | None:
        """Return what another training of an expert changes: accuracy, size of the delta, and pruned at random."""
        trained: dict[str, list[str]] = {}
        for expert, tasks in self.domains.items():
            trained.setdefault(tasks[0].domain, []).append(expert)
        chosen = next((choice for choice in self.choices if _kind(choice) == RANDOM and not choice.way), None)
        if not chosen or max(map(len, trained.values())) < 2:
            return None
        rows = {}
        for domain, experts in trained.items():
            for expert in experts:
                pruned = [self._pruned(chosen, rate, expert) for rate in self.rates]
                rows[label(domain), label(expert)] = [self._whole(expert), self._size(expert, 0), *pruned]
        columns = ("whole (%)", "mean |δ|", *(f"{label(chosen.name)} {percent(rate)} (%)" for rate in self.rates))
        title = "Experts of the same domain that were trained in other ways"
        return ResultTable(title, "expert", columns, rows, (POOLED, SIZES), "trainings")

    def sizes(self) -> ResultTable | None:
        """Return the best random and the best other method beside the size of each delta, smallest ρ first."""
        kinds = {kind: [choice for choice in self.choices if _kind(choice) == kind] for kind in (RANDOM, IMPORTANT)}
        if not all(kinds.values()):
            return None
        rows = {}
        for expert in sorted(self.domains, key=lambda expert: self._size(expert, 1).mean):
            for rate in self.rates:
                best = [self._best(choices, rate, expert) for choices in kinds.values()]
                rows[label(expert), percent(rate)] = [self._size(expert, 0), self._size(expert, 1), *best]
        columns = ("mean |δ|", "ρ", "random, the best (%)", "by importance, the best (%)")
        title = "Random against importance, by the size of the delta"
        return ResultTable(title, "share removed", columns, rows, (POOLED, BEST, SIZES), "sizes")

    def _best(self, choices: Sequence[Choice], rate: float, expert: str) -> Cell:
        """Return the cell of the method with the highest mean accuracy, with its name."""
        cells = {choice.name: self._pruned(choice, rate, expert) for choice in choices}
        name, cell = max(cells.items(), key=lambda found: found[1].mean if found[1].values else -1.0)
        return replace(cell, of=label(name)) if cell.values else cell

    def _pruned(self, choice: Choice, rate: float, expert: str) -> Cell:
        key = (choice.name, rate, expert)
        return _cell(m.single[key] for m in self.measured.values() if key in m.single)

    def _whole(self, expert: str) -> Cell:
        return _cell(m.experts[expert] for m in self.dense_seeds)

    def _size(self, expert: str, which: int) -> Cell:
        return Cell(tuple(m.sizes[expert][which] for m in self.dense_seeds), share=False)

    def _q_of(self, key: tuple[str, float, str]) -> Iterator[float]:
        """Yield the q of every seed; of one for each linear, their mean."""
        for m in self.measured.values():
            if (q := m.q.get(key)) is not None:
                yield fmean(q.values()) if isinstance(q, Mapping) else q


def _cell(seeds: Iterable[Scores]) -> Cell:
    """Make a cell of the right answers and items of all tasks together, of every seed."""
    tasks = [scores.values() for scores in seeds]
    return Cell.of_scores([Score(sum(one.correct for one in of), sum(one.total for one in of)) for of in tasks])
