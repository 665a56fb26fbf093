"""Combinations that compare the deltas of a tensor, element by element, by what they learn of the tensor as a whole.

Each is a function of (the experts' deltas, numbers, zero) to the merged delta, in float32. `numbers` are (rows, k): the
experts' coefficients first, then what a function of `Asked` found of the tensor, on the host. `zero` is that of
`rounding.rounded`. Nothing is pruned before.

Terms and keys are functions of (base, deltas, numbers, zero), which are added up, or ranked, over a tensor.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from operator import add

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dppa_jax.delta.rounding import rounded

Matrix = Float[Array, "rows columns"]
Numbers = Float[Array, "rows k"]
Term = Callable[[Matrix, Sequence[Matrix], Numbers, jax.Array], tuple[Matrix, Matrix]]
Key = Callable[[Matrix, Sequence[Matrix], Numbers, jax.Array], Matrix]

LEAST = 1e-6  # mergekit's SCE takes a sum of weights below it for none


@dataclass(frozen=True)
class Asked:
    """What may be asked of tensors of one shape. Numbers are given by tensor, (tensors, k), or by row, (rows, k).

    Attributes:
      coefficients: (tensors, experts) float64.
      parameters: the combination's own numbers by name, each (tensors,).
      numel: elements of a tensor.
      sums: from (term, numbers) to the sums of its two values over each tensor, (tensors, 2).
      row_sums: the same over each row, (rows, 2).
      row_maxima: returns the largest weight of the base in each row, (rows,).
      ranked: from (key, numbers, index) to sorted(keys)[index] of each tensor, (tensors, ranks) float32, exactly. Keys
        are not negative; `index`, (tensors, ranks), counts from 0 for the least.
      per_row: repeats what is given by tensor for each row.
    """

    coefficients: np.ndarray
    parameters: Mapping[str, np.ndarray]
    numel: int
    sums: Callable[[Term, np.ndarray], np.ndarray]
    row_sums: Callable[[Term, np.ndarray], np.ndarray]
    row_maxima: Callable[[], np.ndarray]
    ranked: Callable[[Key, np.ndarray, np.ndarray], np.ndarray]
    per_row: Callable[[np.ndarray], np.ndarray]

    @property
    def experts(self) -> int:
        """How many experts there are."""
        return self.coefficients.shape[1]


def coefficients_alone(asked: Asked) -> np.ndarray:
    """Ask for nothing."""
    return asked.coefficients


def nearswap(deltas: Sequence[Matrix], numbers: Numbers, zero: jax.Array) -> Matrix:
    """Move the base towards the expert by t at most, the coefficient: min(max(δ, −t), t).

    Source: the author of QuartetAnemoi-70B; mergekit writes it w·expert + (1−w)·base with w = min(t/|δ|, 1).
    """
    (delta,) = deltas
    most = _column(numbers, 0)
    return jnp.clip(delta, -most, most)


def ram_numbers(asked: Asked) -> np.ndarray:
    """Return coefficients, ε, and a gain of 1 for every expert."""
    gains = np.ones_like(asked.coefficients)
    return np.column_stack([asked.coefficients, asked.parameters["ram_epsilon"], gains])


def ramplus_numbers(asked: Asked) -> np.ndarray:
    """Return coefficients, ε, and gains 1 + r·min(shared/unique, α), by how many elements of an expert others touch.

    Source: RAM+ of Reinforced Agent Merging, 2026, with the counts of the tensor alone, as mergekit's ramplus_tl.
    """
    given = np.column_stack([asked.coefficients, asked.parameters["ram_epsilon"]])
    counts = np.stack([asked.sums(_touched_by(e), given) for e in range(asked.experts)], axis=1)
    epsilon, r, alpha = (asked.parameters[name][:, None] for name in ("ram_epsilon", "ram_r", "ram_alpha"))
    gains = 1 + r * np.clip(counts[..., 0] / np.maximum(counts[..., 1], epsilon), 0, alpha)
    return np.column_stack([given, gains])


def ram(deltas: Sequence[Matrix], numbers: Numbers, zero: jax.Array) -> Matrix:
    """Add what one expert alone changed, times its gain, and the mean of what several changed: |δ| > ε is a change.

    Source: Reinforced Agent Merging, 2026 (arXiv 2601.13572), as in mergekit.
    """
    count = len(deltas)
    touched = _touched(deltas, numbers)
    experts = reduce(add, [t.astype(jnp.float32) for t in touched])
    total = jnp.zeros_like(deltas[0])
    for e, (delta, mine) in enumerate(zip(deltas, touched, strict=True)):
        own = rounded(_column(numbers, e) * delta, zero)
        gained = rounded(_column(numbers, count + 1 + e) * own, zero)
        total = total + jnp.where(mine, jnp.where(experts == 1, gained, own / jnp.maximum(experts, 1)), 0)
    return total


def sce_numbers(asked: Asked) -> np.ndarray:
    """Return coefficients, the least variance that is kept, and the experts' weights: their shares of Σ δ².

    Kept are the `sce_topk` largest of the variances that are not zero, and all that tie with the last of them.
    """
    nonzero, share = asked.sums(_varies, asked.coefficients)[:, 0], asked.parameters["sce_topk"]
    kept, least = np.floor(nonzero * share).astype(np.int64), np.zeros(len(nonzero))
    if (share < 1).any():
        index = np.clip(asked.numel - kept, 0, asked.numel - 1)[:, None]
        found = np.where(kept > 0, asked.ranked(variance, asked.coefficients, index)[:, 0], np.inf)
        least = np.where(share < 1, found, 0)
    given = np.column_stack([asked.coefficients, least])
    pairs = [asked.sums(_squares_of(e, min(e + 1, asked.experts - 1)), given) for e in range(0, asked.experts, 2)]
    means = np.concatenate(pairs, axis=1)[:, : asked.experts] / asked.numel
    total = means.sum(axis=1, keepdims=True)
    return np.column_stack([given, np.where(total < LEAST, 1 / asked.experts, means / np.maximum(total, LEAST))])


def sce(deltas: Sequence[Matrix], numbers: Numbers, zero: jax.Array) -> Matrix:
    """Select, calculate, erase: average by weight the selected deltas whose sign is that of their sum.

    Selected are elements that vary between experts, weights are shares of Σ δ². Source: Wan et al. 2024 (FuseChat), as
    in mergekit, which takes weights as equal where the mean δ² of all experts are below 1e-6 together.
    """
    count = len(deltas)
    selected = _selected(deltas, numbers, zero)
    deltas = [jnp.where(selected, delta, 0) for delta in deltas]
    sign = jnp.where(reduce(add, deltas) >= 0, 1.0, -1.0)
    agree = [delta * sign > 0 for delta in deltas]
    weights = [jnp.where(a, _column(numbers, count + 1 + e), 0) for e, a in enumerate(agree)]
    own = [rounded(_column(numbers, e) * delta, zero) for e, delta in enumerate(deltas)]
    merged = reduce(add, [rounded(delta * weight, zero) for delta, weight in zip(own, weights, strict=True)])
    return merged / jnp.maximum(reduce(add, weights), LEAST)


def arcee_numbers(asked: Asked) -> np.ndarray:
    """Return the coefficient, KL(p‖q) of every row, and the least importance that is kept: Q₂ + 1.5·(Q₃ − Q₁).

    p and q are the softmax of the expert's and of the base's row: KL = Σ p·δ − log Σ q·e^δ, which loses no bits where
    δ is small. The quartiles are sorted[int((n−1)/4)] and so on, of all elements; mergekit takes a million at random
    where a tensor has more, and adds 1e-8 to p and q.
    """
    maxima = asked.row_maxima()
    rows = np.column_stack([asked.per_row(asked.coefficients), maxima])
    exponentials = asked.row_sums(_exponentials, rows)
    moments = asked.row_sums(divergence, np.column_stack([rows, 1 / exponentials]))
    kl = np.maximum(moments[:, 0] - np.log1p(moments[:, 1]), 0)
    given = np.column_stack([asked.per_row(asked.coefficients), kl])
    index = np.array([[int(q * (asked.numel - 1)) for q in (0.25, 0.5, 0.75)]] * len(asked.coefficients))
    first, median, third = asked.ranked(importance, given, index).T
    return np.column_stack([given, asked.per_row(median + np.float32(1.5) * (third - first))])


def arcee_fusion(deltas: Sequence[Matrix], numbers: Numbers, zero: jax.Array) -> Matrix:
    """Take the changes that matter: δ where |δ|·KL of its row stands out among those of the tensor.

    Source: Arcee Fusion, as in mergekit.
    """
    (delta,) = deltas
    kept = importance(None, deltas, numbers, zero) >= _column(numbers, 2)
    return jnp.where(kept, rounded(_column(numbers, 0) * delta, zero), 0)


def variance(base: Matrix | None, deltas: Sequence[Matrix], numbers: Numbers, zero: jax.Array) -> Matrix:
    """Compute the variance of an element over the experts: the key that SCE ranks."""
    mean = reduce(add, deltas) / len(deltas)
    squares = [rounded(jnp.square(delta - mean), zero) for delta in deltas]
    return reduce(add, squares) / len(deltas)


def importance(base: Matrix | None, deltas: Sequence[Matrix], numbers: Numbers, zero: jax.Array) -> Matrix:
    """Compute |δ|·KL of the row: the key that Arcee Fusion ranks."""
    return jnp.abs(deltas[0]) * _column(numbers, 1)


def divergence(base: Matrix, deltas: Sequence[Matrix], numbers: Numbers, zero: jax.Array) -> tuple[Matrix, Matrix]:
    """Compute p·δ and q·(e^δ − 1), p and q from the row's maximum and the reciprocals of its sums."""
    (delta,), start = deltas, base - _column(numbers, 1)
    p, q = (rounded(jnp.exp(x) * _column(numbers, 2 + i), zero) for i, x in enumerate((start + delta, start)))
    return rounded(p * delta, zero), rounded(q * jnp.expm1(delta), zero)


def _column(numbers: Numbers, i: int) -> Float[Array, "rows 1"]:
    return numbers[:, i : i + 1]


def _touched(deltas: Sequence[Matrix], numbers: Numbers) -> list[jax.Array]:
    """Say which elements each expert changed."""
    return [jnp.abs(delta) > _column(numbers, len(deltas)) for delta in deltas]


@cache
def _touched_by(e: int) -> Term:
    """Make the term that counts what expert e changed: with others, and alone."""

    def term(base, deltas, numbers, zero):
        touched = _touched(deltas, numbers)
        experts = reduce(add, [t.astype(jnp.float32) for t in touched])
        return tuple(jnp.where(touched[e] & how, 1.0, 0.0) for how in (experts > 1, experts == 1))

    return term


def _varies(base, deltas, numbers, zero) -> tuple[Matrix, Matrix]:
    varies = jnp.where(variance(base, deltas, numbers, zero) > 0, 1.0, 0.0)
    return varies, varies


def _selected(deltas: Sequence[Matrix], numbers: Numbers, zero: jax.Array) -> jax.Array:
    return variance(None, deltas, numbers, zero) >= _column(numbers, len(deltas))


@cache
def _squares_of(e: int, f: int) -> Term:
    """Make the term that adds up δ² of experts e and f where it is selected."""

    def term(base, deltas, numbers, zero):
        selected = _selected(deltas, numbers, zero)
        return tuple(jnp.where(selected, rounded(jnp.square(deltas[i]), zero), 0) for i in (e, f))

    return term


def _exponentials(base, deltas, numbers, zero) -> tuple[Matrix, Matrix]:
    start = base - _column(numbers, 1)
    return jnp.exp(start + deltas[0]), jnp.exp(start)
