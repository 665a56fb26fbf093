"""What a report is made from: the scores of every model that was compared."""

from typing import NamedTuple

from dppa_jax.evaluate.scores import Scores


class Merged(NamedTuple):
    """A merge of all experts. `coefficients` says how they were found, a key of `ADAMERGING`; empty where given."""

    method: str
    rate: float
    coefficients: str = ""


class Measurements(NamedTuple):
    """With one seed: the dense models, and every pruned expert and merge."""

    base: Scores
    experts: Scores  # of each task, by the expert of its domain
    single: dict[tuple[str, float, str], Scores]  # (method, rate, expert)
    merged: dict[Merged, Scores]
