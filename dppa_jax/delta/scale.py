"""How kept parameters are rescaled: from the rates of the partitions to one weight per partition.

A partition is an interval of the score: "kept at rate 0.9", "kept at rate 0.8 but not at 0.9". Each function takes the
partitions' rates, (partitions, linears) float64 with the highest rate first, and gives weights of the same shape.

To add a scale, write its function and a row in `SCALES`. Nothing outside this room looks at a scale's name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Numbers:
    """What a scale may use of an expert's numbers: DPA's factors and rule, DAREx's q."""

    factors: tuple[float, ...] = ()
    dpa_combine: str = "highest"
    q: float | np.ndarray = 1.0


@dataclass(frozen=True)
class Scale:
    """The facts of a scale.

    Attributes:
      weights: from (rates, numbers of the expert) to the weights of the partitions.
      takes_factors: is it given `--partitions` and a factor for each?
      takes_q: is it given `--q`?
      keeps_norm: are its weights multiplied by Σ|δ| / Σ|what is kept of δ| of the tensor, so that the sum stays?
      gains: does the `gain` of a score, which makes up for an element's own probability, apply?
      rates: from (the rate, the parameters by name) to the partitions' nominal rates, highest first, for a scale that
        makes its partitions itself.
      parameters: the scale's own numbers, keys of `presets.PARAMETERS`, which `rates` gets by name.
    """

    weights: Callable[[np.ndarray, Numbers], np.ndarray]
    takes_factors: bool = False
    takes_q: bool = False
    keeps_norm: bool = False
    gains: bool = True
    rates: Callable[[float, Mapping[str, float]], tuple[float, ...]] = lambda rate, parameters: (rate,)
    parameters: tuple[str, ...] = ()


def none(rates: np.ndarray) -> np.ndarray:
    """Leave what is kept as it is: weight 1."""
    return np.ones_like(rates)


def dare(rates: np.ndarray) -> np.ndarray:
    """Weigh by 1/(1−p), so that the expected delta is the dense one; 0 at rate 1. Source: Yu et al. 2023, algorithm 1.

    >>> dare(np.array([0.9, 1.0])).round(12).tolist()
    [10.0, 0.0]
    """
    return np.divide(1.0, 1.0 - rates, out=np.zeros_like(rates), where=rates < 1.0)


def q(rates: np.ndarray, q: float | np.ndarray) -> np.ndarray:
    """Weigh by 1/q with q at or above the density 1−p, global or per linear. Source: Deng et al. 2024 (DAREx-q)."""
    return np.broadcast_to(1.0 / np.asarray(q, np.float64), rates.shape).copy()


def partition(rates: np.ndarray, factors: tuple[float, ...], combine: str = "highest") -> np.ndarray:
    """Weigh each partition by its own factor. Source: Zhu et al. 2024, section 3.3.2 (DPA).

    combine "highest": an element takes the factor of the highest-rate partition that keeps it. "max" reproduces the
    authors' code: of the factors of all partitions that keep the element, the one of largest magnitude, the lower
    rate's where two are equal in magnitude.

    >>> partition(np.array([0.9, 0.8]), (0.5, -2.0), "max").tolist()
    [-2.0, -2.0]
    """
    chosen = list(factors)
    if combine == "max":
        for p in range(len(chosen) - 2, -1, -1):
            chosen[p] = chosen[p] if abs(chosen[p]) > abs(chosen[p + 1]) else chosen[p + 1]
    weights = np.asarray(chosen, np.float64).reshape((-1,) + (1,) * (rates.ndim - 1))
    return np.broadcast_to(weights, rates.shape).copy()


def breadcrumbs_rates(rate: float, parameters: Mapping[str, float]) -> tuple[float, float]:
    """Cut off both ends of the score: the largest γ, and the smallest until the density 1−p is reached.

    So the partition above rate 1−γ weighs 0, and that above rate p−γ weighs 1. At a rate below γ only the largest p go.
    Source: Davari & Belilovsky 2023 (Breadcrumbs), with the density as mergekit has it: γ counts as removed.

    >>> breadcrumbs_rates(0.75, {"breadcrumbs_gamma": 0.25})
    (0.75, 0.5)
    """
    gamma = min(parameters["breadcrumbs_gamma"], rate)
    return 1.0 - gamma, rate - gamma


def breadcrumbs(rates: np.ndarray) -> np.ndarray:
    """Weigh the upper of two partitions by 0 and the lower by 1."""
    return np.stack([np.zeros_like(rates[0]), np.ones_like(rates[1])])


def over_depth(layer: int, layers: int, alpha: float, beta: float) -> float:
    """Scale the coefficient of a layer, counted from 0, by α + β·layer/(layers − 1); by α where there is one layer.

    Source: Wang et al. 2024 (LiNeS), λ_l = α + β·(l−1)/(L−1), with l from 1 to L over the blocks. What comes before the
    layers goes with the first, what comes after them with the last.

    >>> over_depth(1, 3, 0.5, 1.0)
    1.0
    """
    return alpha + beta * (layer / (layers - 1) if layers > 1 else 0.0)


SCALES = {
    "none": Scale(lambda rates, numbers: none(rates), gains=False),
    "l1": Scale(lambda rates, numbers: none(rates), keeps_norm=True, gains=False),
    "dare": Scale(lambda rates, numbers: dare(rates)),
    "q": Scale(lambda rates, numbers: q(rates, numbers.q), takes_q=True),
    "breadcrumbs": Scale(
        lambda rates, numbers: breadcrumbs(rates), rates=breadcrumbs_rates, parameters=("breadcrumbs_gamma",)
    ),
    "breadcrumbs_l1": Scale(
        lambda rates, numbers: breadcrumbs(rates),
        keeps_norm=True,
        rates=breadcrumbs_rates,
        parameters=("breadcrumbs_gamma",),
    ),
    "partition": Scale(
        lambda rates, numbers: partition(rates, numbers.factors, numbers.dpa_combine), takes_factors=True
    ),
}
