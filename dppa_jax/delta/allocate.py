"""How the prune rate is spread over layers and linears: host arithmetic in float64 on the survey's statistics.

Every function takes (rate, statistics, max_fluctuation) and gives the rate of every linear. More significance, lower
rate. Rates are clipped to [0, 1]. Fluctuations that are all zero, or no more than the mean's rounding error, leave the
rate alone (the authors' code divides by their maximum).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Num

Rates = Num[np.ndarray, " linears"]
ROUNDING = 1e-12  # of a mean of thousands of float64 numbers; shares of counts differ by more, if at all


@dataclass(frozen=True)
class Statistics:
    """What a survey knows of one expert. An outlier is a |δ| above a multiple of a mean |δ|.

    Attributes:
      layer: the layer of each linear, counted from 0.
      numel: parameters of each linear.
      linear_outliers: of each linear against its own mean: a sum of |δ|, or a count.
      layer_outliers: the same of each layer against the layer's mean.
    """

    layer: Int[np.ndarray, " linears"]
    numel: Num[np.ndarray, " linears"]
    linear_outliers: Num[np.ndarray, " linears"]
    layer_outliers: Num[np.ndarray, " layers"]

    @property
    def layer_numel(self) -> Num[np.ndarray, " layers"]:
        """Parameters of each layer's linears."""
        return np.bincount(self.layer, self.numel, len(self.layer_outliers))


def uniform(rate: float, statistics: Statistics, max_fluctuation: float) -> Rates:
    """Give every linear the same rate."""
    return np.full(statistics.numel.shape, rate, np.float64)


def owl(rate: float, statistics: Statistics, max_fluctuation: float) -> Rates:
    """rate_l = p − f_l, f from each layer's share of outliers (counts).

    Source: Yin et al. 2023 as the DPPA authors use it on deltas; differs from OWL itself, which scores |w|·‖x‖ and
    scales between the least and the most.
    """
    share = 100.0 / statistics.layer_numel * statistics.layer_outliers
    fluctuation = _fluctuation(share, share.mean(), max_fluctuation)
    return _clip((rate - fluctuation)[statistics.layer])


def dp(rate: float, statistics: Statistics, max_fluctuation: float) -> Rates:
    """rate_{l,j} = p − f_l − g_{l,j}, with significances that are sums of magnitudes.

    f_l from S_l, the sum of |δ| above N times the layer's mean; g_{l,j} from s_{l,j}, the same for a linear, per
    parameter, about its parameter-weighted mean. Source: Zhu et al. 2024, eqs. 1 to 5.
    """
    return _dynamic(
        rate, statistics.layer_outliers, statistics.linear_outliers / statistics.numel, statistics, max_fluctuation
    )


def dp_reference(rate: float, statistics: Statistics, max_fluctuation: float) -> Rates:
    """Compute `dp` as the authors' published code does: percentages of outliers in place of sums of magnitudes.

    There N is 5 for linears whatever its flag says of layers, for which it is 3. Differs from that code: rates are
    clipped.
    """
    layer = 100.0 / statistics.layer_numel * statistics.layer_outliers
    linear = 100.0 / statistics.numel * statistics.linear_outliers
    return _dynamic(rate, layer, linear, statistics, max_fluctuation)


@dataclass(frozen=True)
class Allocation:
    """The facts of an allocation.

    Attributes:
      rates: from (rate, statistics, max_fluctuation) to the rate of every linear.
      outliers: "sum" or "count" of the |δ| above the threshold; None where no survey is needed.
      layer_multiple: N for layers; None takes `--significance_multiple`, which N for linears always is.
      divides: is a layer's outlier a |δ|/mean > N, rounded, in place of |δ| > N·mean?
      ties: the rule for ties, a key of `tied.TIES`, that goes with it; empty for none.
      by_linear: do linears of one layer get rates of their own?
    """

    rates: Callable[[float, Statistics, float], Rates]
    outliers: str | None
    layer_multiple: float | None = None
    divides: bool = False
    ties: str = ""
    by_linear: bool = False


ALLOCATIONS = {
    "uniform": Allocation(uniform, None),
    "owl": Allocation(owl, "count"),
    "dp": Allocation(dp, "sum", by_linear=True),
    "dp_reference": Allocation(dp_reference, "count", layer_multiple=3.0, divides=True, ties="drop", by_linear=True),
}


def _dynamic(
    rate: float, layer: np.ndarray, linear: np.ndarray, statistics: Statistics, max_fluctuation: float
) -> Rates:
    f = _fluctuation(layer, layer.mean(), max_fluctuation)
    mean, numel = linear.mean(), statistics.numel
    normal = linear / mean if mean else linear
    g = _fluctuation(normal, (normal * numel).sum() / numel.sum(), max_fluctuation)
    # In the order of the authors' code, where density, not rate, is adjusted: the last bits of the rate depend on it.
    return _clip(1.0 - (g + (f + (1.0 - rate))[statistics.layer]))


def _fluctuation(significance: np.ndarray, mean: float, maximum: float) -> np.ndarray:
    centred = significance - mean
    largest = np.abs(centred).max()
    equal = largest <= ROUNDING * np.abs(significance).max()
    return np.zeros_like(centred) if equal else maximum * centred / largest


def _clip(rates: np.ndarray) -> np.ndarray:
    return np.clip(rates, 0.0, 1.0)
