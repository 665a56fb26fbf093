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
    """A number that one score, scale or combination has to itself: its flag, help and check are made from this."""

    default: float
    help: str
    lower: float
    upper: float


PARAMETERS = {  # by the name of their flag; a score, scale or combination lists its own
    "breadcrumbs_gamma": Parameter(0.01, "Breadcrumbs: share of the largest elements that is removed", 0.0, 1.0),
    "della_window": Parameter(0.15, "DELLA: keep probabilities are spread over this, by the rank in a row", 0.0, 1.0),
    "normalize": Parameter(1.0, "linear, multislerp: 1 divides the coefficients by their sum, 0 does not", 0.0, 1.0),
    "sce_topk": Parameter(1.0, "sce: share of the elements that vary between experts that is kept", 0.0, 1.0),
    "karcher_iterations": Parameter(10.0, "karcher: steps towards the mean at most", 0.0, 1e6),
    "karcher_tolerance": Parameter(1e-5, "karcher: a step or an angle below this counts as none", 0.0, 1.0),
    "regmean_alpha": Parameter(0.9, "regmean: products of two different inputs are multiplied by this", 0.0, 1.0),
    "ram_epsilon": Parameter(1e-5, "ram, ramplus_tl: a delta above this is a change", 0.0, 1e6),
    "ram_r": Parameter(0.1, "ramplus_tl: gain of what one expert alone changed, by shared / unique", -1e6, 1e6),
    "ram_alpha": Parameter(0.2, "ramplus_tl: shared / unique counts up to this", 0.0, 1e6),
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
    "linear": Method(None, None, "none", "linear", "Wortsman et al. 2022"),
    "passthrough": Method(None, None, "none", "passthrough", "mergekit"),
    "slerp": Method(None, None, "none", "slerp", "Shoemake 1985, as in mergekit"),
    "nuslerp": Method(None, None, "none", "nuslerp", "mergekit"),
    "nuslerp_deltas": Method(None, None, "none", "nuslerp_deltas", "mergekit"),
    "multislerp": Method(None, None, "none", "multislerp", "mergekit"),
    "multislerp_deltas": Method(None, None, "none", "multislerp_deltas", "mergekit"),
    "karcher": Method(None, None, "none", "karcher", "Karcher 1977, as in mergekit"),
    "model_stock": Method(None, None, "none", "model_stock", "Jang et al. 2024"),
    "regmean": Method(None, None, "none", "regmean", "Jin et al. 2023"),
    "nearswap": Method(None, None, "none", "nearswap", "the author of QuartetAnemoi-70B, as in mergekit"),
    "arcee_fusion": Method(None, None, "none", "arcee_fusion", "mergekit"),
    "ram": Method(None, None, "none", "ram", "Reinforced Agent Merging 2026, as in mergekit"),
    "ramplus_tl": Method(None, None, "none", "ramplus_tl", "Reinforced Agent Merging 2026, as in mergekit"),
    "sce": Method(None, None, "none", "sce", "Wan et al. 2024, as in mergekit"),
}
