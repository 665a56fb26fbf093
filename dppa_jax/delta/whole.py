"""Merges of whole tensors: Σₖ cₖ·xₖ, with coefficients that follow from inner products of the models' tensors.

A tensor is one long vector of each model. Angles, norms and means on a sphere are functions of the Gram matrix
G_kl = ⟨x_k, x_l⟩ alone, so that one read of the weights finds G and one applies the coefficients. Every function takes

    gram: (tensors, models, models) float64, or None where it is not needed
    weights: (tensors, models) float64, what `--coefficient` says
    parameters: the method's own numbers by name, each (tensors,) float64

and gives (tensors, models) float64. The models are the base and then the experts; of a method "of deltas" they are the
experts' deltas, and the base gets what is left of 1. With `--compare=row` every row counts as a tensor.

A method may instead solve for linears whose inputs are known; then the formula is that of all other tensors.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float

from dppa_jax.delta.regmean import regmean

Gram = Float[np.ndarray, "tensors models models"]
OfModels = Float[np.ndarray, "tensors models"]
Parameters = Mapping[str, Float[np.ndarray, " tensors"]]

COLLINEAR = 0.9995  # |cos| above which slerp is a straight line, as in mergekit
TINY = 1e-8  # a norm that counts as none


@dataclass(frozen=True)
class Whole:
    """The facts of a merge of whole tensors.

    Attributes:
      coefficients: from (gram, weights, parameters) to the coefficients.
      gram: does it look at inner products?
      of_deltas: are the vectors the experts' deltas?
      divisor: from (weights, parameters) to what the sum is divided by, (tensors,); None for nothing.
      solve: from the experts' weights of a linear, the products of its inputs on `--calibration` text, coefficients and
        parameters to the merged linear, as `regmean` does; None where linears are merged as all else.
    """

    coefficients: Callable[[Gram | None, OfModels, Parameters], OfModels]
    gram: bool = True
    of_deltas: bool = False
    divisor: Callable[[OfModels, Parameters], np.ndarray] | None = None
    solve: Callable[..., Float[np.ndarray, "out in"]] | None = None


def linear(gram: None, weights: OfModels, parameters: Parameters) -> OfModels:
    """Average: Σ wₖxₖ, over Σ wₖ where `normalize` is 1. Source: Wortsman et al. 2022 (model soups)."""
    return weights


def weights_total(weights: OfModels, parameters: Parameters) -> np.ndarray:
    """Σ wₖ where `normalize` is 1, else 1: the sum is divided by it, which keeps the mean of equal models exact."""
    return _total(weights, parameters["normalize"])[:, 0]


def of_experts(gram: None, weights: OfModels, parameters: Parameters) -> OfModels:
    """Average the experts alone: Σ wₖxₖ, over Σ wₖ."""
    return np.concatenate([np.zeros_like(weights[:, :1]), weights[:, 1:]], axis=1)


def experts_total(weights: OfModels, parameters: Parameters) -> np.ndarray:
    """Σ wₖ of the experts."""
    return _total(weights[:, 1:])[:, 0]


def passthrough(gram: None, weights: OfModels, parameters: Parameters) -> OfModels:
    """Take the expert, times its coefficient."""
    return weights * [0.0, 1.0]


def slerp(gram: Gram, weights: OfModels, parameters: Parameters) -> OfModels:
    """Turn base into expert along the arc between them: (sin((1−t)θ)·x₀ + sin(tθ)·x₁)/sin θ, t the coefficient.

    θ is the angle between the two tensors, whose norms are left in. Where |cos θ| > 0.9995 it is (1−t)·x₀ + t·x₁.
    Source: Shoemake 1985; on unnormalised weights, with that limit, as in mergekit.
    """
    cosine = _cosines(gram)[:, 0, 1]
    return _arc(cosine, weights[:, 1], np.abs(cosine) > COLLINEAR)


def nuslerp(gram: Gram, weights: OfModels, parameters: Parameters) -> OfModels:
    """Compute `slerp` with t = w₁/(w₀ + w₁), ½ where the weights cancel, up to the last bit of |cos θ| = 1.

    Of deltas it is base + slerp(δ₁, δ₂). Source: mergekit's NuSLERP.
    """
    total = weights.sum(axis=-1)
    t = np.divide(weights[:, 1], total, out=np.full_like(total, 0.5), where=np.abs(total) >= 1e-6)
    cosine = _cosines(gram)[:, 0, 1]
    return _arc(cosine, t, 1 - cosine**2 <= TINY**2)


def multislerp(gram: Gram, weights: OfModels, parameters: Parameters) -> OfModels:
    """Average directions and norms apart: (Σ wₖ‖xₖ‖)·m/‖m‖ with m = Σ wₖxₖ/‖xₖ‖.

    This is what remains of mergekit's Multi-SLERP in exact arithmetic: it takes a step from m/‖m‖ along the weighted
    sum of the tangents there, which is m − ⟨m, m/‖m‖⟩·m/‖m‖ = 0. With `normalize` the weights are divided by their sum.

    Raises:
      ValueError: more than two directions cancel, so that they have no mean.
    """
    weights = weights / _total(weights, parameters["normalize"])
    norms = np.sqrt(np.diagonal(gram, axis1=1, axis2=2))
    directions = weights / (norms + TINY)
    length = _norm(gram, directions)
    cancel = length < TINY
    if weights.shape[1] > 2 and (cancel & (norms > TINY).any(axis=-1)).any():
        raise ValueError(
            "the weighted directions of the models cancel, so that they have no mean; change --coefficient"
        )
    size = (weights * norms).sum(axis=-1)
    return np.where(cancel[:, None], weights, directions * (size / np.where(cancel, 1, length))[:, None])


def karcher(gram: Gram, weights: OfModels, parameters: Parameters) -> OfModels:
    """Find the mean on the sphere, to which the sum of squared angles is least, times the mean norm.

    Each of `karcher_iterations` steps goes from m along Σ aₖ·θₖ/sin θₖ·(uₖ − cos θₖ·m), uₖ = xₖ/‖xₖ‖, until that is
    shorter than `karcher_tolerance`; aₖ = wₖ/Σ w. m stays a combination of the models, so that all angles follow from
    their Gram matrix. Source: Karcher 1977; start, steps and limits as in mergekit, whose weights are equal.
    """
    tolerance = parameters["karcher_tolerance"][:, None]
    norms = np.sqrt(np.diagonal(gram, axis1=1, axis2=2))
    valid = norms > tolerance
    shares = weights / _total(weights)
    unit = np.divide(1.0, norms, out=np.zeros_like(norms), where=valid)
    units = gram * unit[:, :, None] * unit[:, None, :]
    own = np.where(valid, shares, 0)
    own = np.divide(own, own.sum(axis=-1, keepdims=True), out=np.zeros_like(own), where=valid)
    length = _norm(units, own)
    first = np.eye(valid.shape[1])[valid.argmax(axis=-1)]
    short = length[:, None] < tolerance
    mean = np.where(short, first, own / np.where(short, 1, length[:, None]))
    going, steps = valid.any(axis=-1), parameters["karcher_iterations"].astype(int)
    for done in range(steps.max(initial=0)):
        cosine = np.clip((units @ mean[:, :, None])[..., 0], -1, 1)
        angle = np.arccos(cosine)
        near = angle < tolerance
        pull = np.where(near, 0, own * angle / np.sin(np.where(near, 1, angle)))
        tangent = pull - (pull * cosine).sum(axis=-1, keepdims=True) * mean
        step = _norm(units, tangent)
        going &= (step >= tolerance[:, 0]) & (done < steps)
        if not going.any():
            break
        step = np.where(going, step, 1)[:, None]
        turned = np.cos(step) * mean + np.sin(step) / step * tangent
        length = _norm(units, turned)[:, None]
        turned = turned / np.where(length > tolerance, length, 1)
        mean = np.where(going[:, None], turned, mean)
    return (shares * norms).sum(axis=-1, keepdims=True) * mean * unit


def model_stock(gram: Gram, weights: OfModels, parameters: Parameters) -> OfModels:
    """Go from the base towards the experts' mean by t = N·cos θ/(1 + (N−1)·cos θ), θ the mean angle of two deltas.

    More exactly, cos θ is the mean of the cosines of all pairs, and t is 0 where the divisor vanishes, as in mergekit.
    A coefficient scales its expert's delta beforehand. Source: Jang et al. 2024 (Model Stock), equation 7; the authors
    merge layer by layer, here it is tensor by tensor.
    """
    count = weights.shape[1]
    cosines = _cosines(gram * weights[:, :, None] * weights[:, None, :], 1e-6)
    cosine = np.mean([cosines[:, i, j] for i, j in combinations(range(count), 2)], axis=0)
    divisor = 1 + (count - 1) * cosine
    singular = np.abs(divisor) < 1e-6
    t = np.where(singular, 0, count * cosine / np.where(singular, 1, divisor))
    return weights * (t / count)[:, None]


WHOLE = {
    "linear": Whole(linear, gram=False, divisor=weights_total),
    "passthrough": Whole(passthrough, gram=False),
    "slerp": Whole(slerp),
    "nuslerp": Whole(nuslerp),
    "nuslerp_deltas": Whole(nuslerp, of_deltas=True),
    "multislerp": Whole(multislerp),
    "multislerp_deltas": Whole(multislerp, of_deltas=True),
    "karcher": Whole(karcher),
    "model_stock": Whole(model_stock, of_deltas=True),
    "regmean": Whole(of_experts, gram=False, divisor=experts_total, solve=regmean),
}


def _total(weights: OfModels, normalize: np.ndarray | float = 1.0) -> Float[np.ndarray, "tensors 1"]:
    """Return Σ wₖ, by which weights can be divided; 1 where `normalize` is 0."""
    total = np.where(np.reshape(normalize, (-1, 1)) != 0, weights.sum(axis=-1, keepdims=True), 1)
    if not total.all():
        raise ValueError("the coefficients add up to 0, and are divided by their sum; change --coefficient")
    return total


def _cosines(gram: Gram, least: float = TINY**2) -> Gram:
    """Return the cosine of the angle of every pair, in [−1, 1]; a product of norms is at least `least`."""
    norms = np.sqrt(np.diagonal(gram, axis1=1, axis2=2))
    return np.clip(gram / np.maximum(norms[:, :, None] * norms[:, None, :], least), -1, 1)


def _norm(gram: Gram, combination: OfModels) -> np.ndarray:
    """Return ‖Σ aₖxₖ‖ of every tensor, (tensors,)."""
    return np.sqrt(np.maximum(np.einsum("ti,tij,tj->t", combination, gram, combination), 0))


def _arc(cosine: np.ndarray, t: np.ndarray, straight: np.ndarray) -> OfModels:
    """Return the two coefficients of a place on the arc, or on the straight line."""
    angle = np.arccos(np.where(straight, 0, cosine))
    on_arc = np.sin(np.stack([1 - t, t], axis=-1) * angle[:, None]) / np.sin(angle)[:, None]
    return np.where(straight[:, None], np.stack([1 - t, t], axis=-1), on_arc)
