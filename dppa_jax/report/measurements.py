"""What a report is made from: the scores of every model that was compared."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

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


@dataclass(frozen=True)
class Remaining:
    """How many parameters of a linear a rate leaves, by dimension.

    Attributes:
      linear: one of checkpoint.names.LINEARS.
      rate: the share removed, as asked for.
      rows: kept parameters of every output dimension.
      columns: kept parameters of every input dimension.
    """

    linear: str
    rate: float
    rows: Int[np.ndarray, " out"]
    columns: Int[np.ndarray, " in_"]
