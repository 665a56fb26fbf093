"""How the prune rate is spread over layers and linears: host arithmetic in float64 on the survey's statistics.

Every function takes (rate, statistics) and gives rates (layers, linears). More significance, lower rate. Rates are
clipped to [0, 1]; fluctuations that are all zero, or no more than the mean's rounding error, leave the rate alone (the
authors' code divides by their maximum).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Num

Table = Num[np.ndarray, "layers linears"]
ROUNDING = 1e-12  # of a mean of thousands of float64 numbers; shares of counts differ by more, if at all


@dataclass(frozen=True)
class Statistics:
    """What a survey knows of one expert. An outlier is a |δ| above a multiple of a mean |δ|."""

    numel: Table
    linear_outliers: Table  # of each linear against its own mean: sums of |δ|, or counts
    layer_outliers: Num[np.ndarray, " layers"]  # of each layer against the layer's mean


def uniform(rate: float, statistics: Statistics, max_fluctuation: float) -> Table:
    """The same rate everywhere."""
    return np.full(statistics.numel.shape, rate, np.float64)


def owl(rate: float, statistics: Statistics, max_fluctuation: float) -> Table:
    """rate_l = p − f_l, f from each layer's share of outliers (counts).

    Source: Yin et al. 2023 as the DPPA authors use it on deltas; differs from OWL itself, which scores |w|·‖x‖ and
    scales between the least and the most.
    """
    share = 100.0 / statistics.numel.sum(1) * statistics.layer_outliers
    fluctuation = _fluctuation(share, share.mean(), max_fluctuation)
    return _clip(np.broadcast_to((rate - fluctuation)[:, None], statistics.numel.shape))


def dp(rate: float, statistics: Statistics, max_fluctuation: float) -> Table:
    """rate_{l,j} = p − f_l − g_{l,j}, with significances that are sums of magnitudes.

    f_l from S_l, the sum of |δ| above N times the layer's mean; g_{l,j} from s_{l,j}, the same for a linear, per
    parameter, about its parameter-weighted mean. Source: Zhu et al. 2024, eqs. 1 to 5.
    """
    layer = statistics.layer_outliers
    linear = statistics.linear_outliers / statistics.numel
    return _dynamic(rate, layer, linear, statistics.numel, max_fluctuation)


def dp_reference(rate: float, statistics: Statistics, max_fluctuation: float) -> Table:
    """`dp` as the authors' published code computes it: percentages of outliers in place of sums of magnitudes.

    There N is 5 for linears whatever its flag says of layers, for which it is 3. Differs from that code: rates are
    clipped.
    """
    layer = 100.0 / statistics.numel.sum(1) * statistics.layer_outliers
    linear = 100.0 / statistics.numel * statistics.linear_outliers
    return _dynamic(rate, layer, linear, statistics.numel, max_fluctuation)


@dataclass(frozen=True)
class Allocation:
    rates: Callable[[float, Statistics, float], Table]
    outliers: str | None  # "sum" or "count" of |δ| above the threshold; None: needs no survey
    linear_multiple: float | None = None  # None: --significance_multiple
    layer_multiple: float | None = None
    divides: bool = False  # the layer's outliers are |δ|/mean > N, rounded, in place of |δ| > N·mean
    summary: str = ""


ALLOCATIONS = {
    "uniform": Allocation(uniform, None, summary="the same rate everywhere"),
    "owl": Allocation(owl, "count", summary="per layer, by its share of outliers"),
    "dp": Allocation(dp, "sum", summary="per layer and linear, by the magnitude of outliers (the paper)"),
    "dp_reference": Allocation(
        dp_reference,
        "count",
        layer_multiple=3.0,
        divides=True,
        summary="per layer and linear, by the number of outliers (the authors' code)",
    ),
}


def _dynamic(rate: float, layer: np.ndarray, linear: Table, numel: Table, max_fluctuation: float) -> Table:
    f = _fluctuation(layer, layer.mean(), max_fluctuation)
    mean = linear.mean()
    normal = linear / mean if mean else linear
    g = _fluctuation(normal, (normal * numel).sum() / numel.sum(), max_fluctuation)
    # In the order of the authors' code, where density, not rate, is adjusted: the last bits of the rate depend on it.
    return _clip(1.0 - (g + (f + (1.0 - rate))[:, None]))


def _fluctuation(significance: np.ndarray, mean: float, maximum: float) -> np.ndarray:
    centred = significance - mean
    largest = np.abs(centred).max()
    equal = largest <= ROUNDING * np.abs(significance).max()
    return np.zeros_like(centred) if equal else maximum * centred / largest


def _clip(rates: np.ndarray) -> np.ndarray:
    return np.clip(rates, 0.0, 1.0)
