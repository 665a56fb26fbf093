"""RegMean: the linear whose outputs are nearest to those of all experts, each on its own inputs; no JAX.

Σₖ cₖ·‖X̃ₖ(W − Wₖ)ᵀ‖² is least where W·Σₖ cₖG̃ₖ = Σₖ cₖWₖG̃ₖ. Gₖ = XₖᵀXₖ/nₖ are the mean products of the inputs of expert k
on its text, and G̃ₖ = α·Gₖ + (1−α)·diag(Gₖ) are the same with off-diagonals that are α times as large. So α = 0 weighs
every input on its own, and α = 1 is the least-squares problem itself.

Source: Jin et al. 2023 (Dataless Knowledge Fusion by Merging Weights of Language Models), section 3; α as there, 0.9 by
default. As in the authors' code Gₖ is a mean over nₖ tokens, so that a longer text weighs no more; the paper has the
sum. Ours is what becomes of inputs that are always 0, and the first expert as the origin: it changes no result, saves a
product, and leaves equal experts as they are to the bit.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

LEAST_PIVOT = 1e-6  # of a Cholesky factor, by the diagonal: below it is the rounding of products in float32


def regmean(
    weights: Sequence[Float[np.ndarray, "out in"]],
    grams: Sequence[Float[np.ndarray, "in in"]],
    coefficients: Sequence[float] | np.ndarray,
    parameters: Mapping[str, float],
) -> Float[np.ndarray, "out in"]:
    """Solve for the merged linear, in float64: W₁ + Σ cₖ(Wₖ − W₁)G̃ₖ · (Σ cₖG̃ₖ)⁻¹.

    An input that is 0 on all texts says nothing of its column, which is then the mean Σ cₖWₖ / Σ cₖ.

    Args:
      weights: Wₖ of every expert.
      grams: Gₖ of every expert.
      coefficients: cₖ.
      parameters: `regmean_alpha` is α.

    Raises:
      ValueError: the coefficients add up to 0, or the inputs do not determine the result.

    >>> ones, twice = np.ones((1, 2)), np.full((1, 2), 2.0)
    >>> regmean([ones, twice], [np.diag([3.0, 0.0]), np.diag([1.0, 0.0])], [1, 1], {"regmean_alpha": 0.9}).tolist()
    [[1.25, 1.5]]
    """
    if not (sum_of := float(np.sum(coefficients))):
        raise ValueError("the coefficients add up to 0, and are divided by their sum; change --coefficient")
    alpha, first = parameters["regmean_alpha"], weights[0].astype(np.float64)
    total, change = np.zeros(grams[0].shape), np.zeros(first.shape)
    for k, (coefficient, gram) in enumerate(zip(coefficients, grams, strict=True)):
        reduced = gram.astype(np.float64)
        diagonal = coefficient * np.diagonal(reduced)
        reduced *= coefficient * alpha
        np.fill_diagonal(reduced, diagonal)
        total += reduced
        if k:
            change += (weights[k] - first) @ reduced
    unseen = np.diagonal(total) == 0
    merged = first + _divided(change, total, alpha)
    merged[:, unseen] = sum(c * w[:, unseen].astype(np.float64) for c, w in zip(coefficients, weights, strict=True))
    merged[:, unseen] /= sum_of
    return merged


def _divided(
    change: Float[np.ndarray, "out in"], total: Float[np.ndarray, "in in"], alpha: float
) -> Float[np.ndarray, "out in"]:
    """Return change · total⁻¹ by Cholesky, with 1 for a diagonal of 0; `total` is overwritten.

    Raises:
      ValueError: the matrix is singular, but for rounding, or not positive.
    """
    from scipy.linalg import cho_factor, cho_solve  # here, as other merges need none of it

    diagonal = np.diagonal(total).copy()
    diagonal[diagonal == 0] = 1
    np.fill_diagonal(total, diagonal)
    try:
        factor, lower = cho_factor(total.T, lower=True, overwrite_a=True, check_finite=False)  # by columns: in place
        singular = (np.square(np.diagonal(factor)) < LEAST_PIVOT * diagonal).any()
    except np.linalg.LinAlgError:
        singular = True
    if singular:
        raise ValueError(
            f"the inputs on --calibration text are too few, or too much alike, to say what {len(total)} columns are; "
            f"give more text, an --regmean_alpha below {alpha:g}, and no --coefficient below 0"
        )
    return cho_solve((factor, lower), change.T, check_finite=False).T
