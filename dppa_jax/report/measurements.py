"""What a report is made from: the scores of every model that was compared."""

from typing import NamedTuple

from dppa_jax.evaluate.scores import Scores


class Measurements(NamedTuple):
    """With one seed: the dense models, and every pruned expert and merge."""

    base: Scores
    experts: Scores  # of each task, by the expert of its domain
    single: dict[tuple[str, float, str], Scores]  # (method, rate, expert)
    merged: dict[tuple[str, float], Scores]  # (method, rate)
