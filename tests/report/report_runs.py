"""Measurements made up for tests of the report: the paper's own numbers, and a small run with two seeds."""

from dppa_jax.evaluate.scores import Score, Scores
from dppa_jax.evaluate.tasks import by_domain
from dppa_jax.report.measurements import Measurements, Merged
from dppa_jax.report.published import DENSE, published

TOTALS = {"gsm8k": 1319, "math": 5000, "fiqa_sa": 235, "fpb": 970, "scotus": 60, "unfair_tos": 172}
DOMAINS = by_domain(TOTALS)
TASKS = ("addition", "comparison", "sentiment", "trend")
PAIR = by_domain(TASKS)


def scores(accuracies: dict[str, float]) -> Scores:
    return {task: Score(round(accuracy * TOTALS[task]), TOTALS[task]) for task, accuracy in accuracies.items()}


def by_expert(found: Scores, domains) -> dict[str, Scores]:
    return {domain: {task.name: found[task.name] for task in tasks} for domain, tasks in domains.items()}


def as_the_paper() -> Measurements:
    """Accuracies of appendix A; where the paper has only ratios, accuracies that have them."""
    single, merged = {}, {}
    for p in published():
        tasks = [task.name for task in DOMAINS.get(p.subject, ())]
        if p.table == 7:
            domain = next(d for d, of in DOMAINS.items() if p.subject in [task.name for task in of])
            single.setdefault((p.column, p.rate, domain), {}).update(scores({p.subject: p.value}))
        elif p.table in (1, 3) and p.column in ("dppa", "dare_dpa"):
            single[p.column, p.rate, p.subject] = scores({task: DENSE[task] * p.value for task in tasks})
        elif p.table == 5:
            found = scores({task: DENSE[task] * p.value for task in tasks})
            merged.setdefault(Merged(p.column, p.rate), {}).update(found)
    return Measurements(scores(dict.fromkeys(TOTALS, 0.1)), by_expert(scores(DENSE), DOMAINS), single, merged)


def two_seeds() -> dict[int, Measurements]:
    """Two domains of the demo family, 200 questions a task."""

    def of(*correct: int) -> Scores:
        return {task: Score(c, 200) for task, c in zip(TASKS, correct, strict=False)}

    def finance(*correct: int) -> Scores:
        return {task: Score(c, 200) for task, c in zip(TASKS[2:], correct, strict=True)}

    return {
        seed: Measurements(
            of(20, 80, 60, 40),
            by_expert(of(160, 200, 180, 160), PAIR),
            {
                ("magnitude", 0.8, "math"): of(40 + shift, 50 + shift),
                ("magnitude", 0.8, "finance"): finance(90, 80),
                ("dare", 0.8, "math"): of(80, 100),
                ("dare", 0.8, "finance"): finance(180, 160),
            },
            {
                Merged("dare", 0.8): of(40, 50, 90, 80),
                Merged("ties", 0.8): of(80, 100, 90 + shift, 80 + shift),
                Merged("dare", 0.8, "adamerging"): of(60, 75, 90, 80),
                Merged("task_arithmetic", 0.0): of(160, 200, 180, 160),
            },
        )
        for seed, shift in ((0, 0), (1, 20))
    }


def scores_of(tasks, correct, total: int) -> Scores:
    return {task: Score(c, total) for task, c in zip(tasks, correct, strict=True)}
