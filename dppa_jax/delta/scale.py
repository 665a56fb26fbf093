"""How kept parameters are rescaled: from the rates of the partitions to one weight per partition.

Each function takes rates (partitions, ...) in float64, highest rate first, and gives weights of the same shape.
"""

import numpy as np


def none(rates: np.ndarray) -> np.ndarray:
    return np.ones_like(rates)


def dare(rates: np.ndarray) -> np.ndarray:
    """1/(1−p), so that the expected delta is the dense one; 0 at rate 1. Source: Yu et al. 2023, algorithm 1.

    >>> dare(np.array([0.9, 1.0])).round(12).tolist()
    [10.0, 0.0]
    """
    return np.divide(1.0, 1.0 - rates, out=np.zeros_like(rates), where=rates < 1.0)


def q(rates: np.ndarray, q: float | np.ndarray) -> np.ndarray:
    """1/q with q at or above the density 1−p, global or per linear. Source: Deng et al. 2024 (DAREx-q)."""
    return np.broadcast_to(1.0 / np.asarray(q, np.float64), rates.shape).copy()


def partition(rates: np.ndarray, factors: tuple[float, ...], combine: str = "highest") -> np.ndarray:
    """One factor per partition. Source: Zhu et al. 2024, section 3.3.2 (DPA).

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


SCALES = {"none": none, "dare": dare, "q": q, "partition": partition}
