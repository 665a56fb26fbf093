"""The table of methods: each is a choice on the axes score, allocate, scale and combine, and nothing else.

This module does not import JAX: `--help` is made from it.
"""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Method:
    """A preset of `--method`; None for the score means that nothing is pruned."""

    score: str | None
    allocate: str | None
    scale: str
    combine: str
    source: str


class Parameter(NamedTuple):
    """A number that one score or scale has to itself: its flag, help and check are made from this."""

    default: float
    help: str
    lower: float
    upper: float


PARAMETERS = {  # by the name of their flag; a score or scale lists those that it takes
    "breadcrumbs_gamma": Parameter(0.01, "Breadcrumbs: share of the largest elements that is removed", 0.0, 1.0),
    "della_window": Parameter(0.15, "DELLA: keep probabilities are spread over this, by the rank in a row", 0.0, 1.0),
}

COMPARISONS = {"linear": False, "row": True}  # by the value of --compare: is an element ranked within its row?

METHODS = {
    "task_arithmetic": Method(None, None, "none", "sum", "Ilharco et al. 2023"),
    "magnitude": Method("magnitude", "uniform", "none", "sum", "Han et al. 2015"),
    "owl": Method("magnitude", "owl", "none", "sum", "Yin et al. 2023"),
    "breadcrumbs": Method("magnitude", "uniform", "breadcrumbs", "sum", "Davari & Belilovsky 2023"),
    "breadcrumbs_ties": Method("magnitude", "uniform", "breadcrumbs", "ties", "Davari & Belilovsky 2023 with TIES"),
    "dp": Method("magnitude", "dp", "none", "sum", "Zhu et al. 2024, section 3.3.1"),
    "dppa": Method("magnitude", "dp", "partition", "sum", "Zhu et al. 2024"),
    "dare": Method("random", "uniform", "dare", "sum", "Yu et al. 2023"),
    "dare_dpa": Method("random", "uniform", "partition", "sum", "Zhu et al. 2024, section 4.6"),
    "darex_q": Method("random", "uniform", "q", "sum", "Deng et al. 2024"),
    "darex_q_columns": Method("random_column", "uniform", "q", "sum", "Deng et al. 2024; what is dropped is ours"),
    "wanda": Method("wanda", "uniform", "none", "sum", "Sun et al. 2023, on deltas as Deng et al. 2024"),
    "magnitude_q": Method("magnitude", "uniform", "q", "sum", "Han et al. 2015 with q; the pair is ours"),
    "wanda_q": Method("wanda", "uniform", "q", "sum", "Sun et al. 2023 with q; the pair is ours"),
    "della_linear": Method("della", "uniform", "dare", "sum", "Deep et al. 2024"),
    "della": Method("della", "uniform", "dare", "ties", "Deep et al. 2024"),
    "ties": Method("magnitude", "uniform", "none", "ties", "Yadav et al. 2023"),
    "dare_ties": Method("random", "uniform", "dare", "ties", "Yu et al. 2023 with Yadav et al. 2023"),
}
