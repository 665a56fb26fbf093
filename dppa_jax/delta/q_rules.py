"""DAREx's q of one linear in closed form, from its delta and the inputs that it sees on calibration text; no JAX.

Output i of a linear changes by h_i = Σ_j c_ij·(1 − m_ij/q), with c_ij = δ_ij·x̄_j, x̄_j the mean of input j over tokens,
and m_ij = 1 for what is kept. With S = Σ_j c_ij and Q = Σ_j c_ij², h has the mean (1 − (1−p)/q)·S and the variance
p·(1−p)·Q/q². A larger q leaves more bias and less variance. Each rule weighs them in its own way.

To add a rule, write its function and a row in `Q_RULES`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

GAMMA = 0.05  # a bound holds with probability 1 − γ: prob = 0.95 in the authors' code
LARGEST = 1.0  # of q: then nothing is rescaled
STOP_SHARE = 0.8  # of the rows, in the authors' code: then its loop ends
FIRST_BEST = 10_000.0  # in the authors' code: no objective above it counts


@dataclass(frozen=True)
class Moments:
    """What a rule may know of a linear.

    Attributes:
      sums: S of every row, (rows,) float64.
      squares: Q of every row, (rows,) float64.
      change: Σ_t |δ·x_t|² over the calibration tokens; 0 where no rule asks for it.
      separate: Σ_t Σ_j x_tj²·|δ_:j|², the same if inputs did not act on each other.
      products: c itself, (rows, columns) float32; None where no rule asks for it.
    """

    sums: Float[np.ndarray, " rows"]
    squares: Float[np.ndarray, " rows"]
    change: float = 0.0
    separate: float = 0.0
    products: Float[np.ndarray, "rows columns"] | None = None


@dataclass(frozen=True)
class QRule:
    """The facts of a rule.

    Attributes:
      q: from (moments, rate, eta) to the q of the linear.
      takes_eta: does `--q_eta` change it?
      sees_change, sees_products: does it need `Moments.change` and `separate`, or `products`?
    """

    q: Callable[[Moments, float, float], float]
    takes_eta: bool = False
    sees_change: bool = False
    sees_products: bool = False


def kearns_saul(rate: float) -> float:
    """Φ(p) = (1−2p)/ln((1−p)/p), at most ½: the constant of the tail bound of a Bernoulli variable.

    Source: Deng et al. 2024, appendix E.1, as a co-author's formal statements have it. The form with the inverse
    hyperbolic tangent is exact at p = ½, too.

    >>> kearns_saul(0.5), round(kearns_saul(0.9), 9), kearns_saul(1.0)
    (0.5, 0.364095691, 0.0)
    """
    if rate in (0.0, 1.0):
        return 0.0
    away = rate - 0.5
    return away / float(np.arctanh(2 * away)) if away else 0.5


def tail_bound(sums: ArrayLike, squares: ArrayLike, rate: float, q: float, gamma: float = GAMMA) -> ArrayLike:
    """Bound |h|: with probability 1 − γ it is at most |bias| + sqrt(Φ·Q·ln(2/γ))/q.

    Source: at q = 1−p the appendix of Deng et al. 2024 (E.1, equation 8), as a co-author's formal statements have it;
    for any other q it is derived here. The bound of their theorem 3.1, which lacks the root, does not hold in general.
    """
    bias = np.abs(1.0 - (1.0 - rate) / q) * np.abs(sums)
    return bias + np.sqrt(kearns_saul(rate) * np.asarray(squares) * np.log(2.0 / gamma)) / q


def bound_rows(sums: np.ndarray, squares: np.ndarray, rate: float, eta: float) -> Float[np.ndarray, " rows"]:
    """Return the q of each row that minimises η·|bias| + η²·Φ·Q/(4q²), within [1−p, 1].

    This is Chernoff's bound on h at the parameter η, which the authors' code minimises as well (Deng et al. 2024). Ours
    are: |S| in place of S, whose sign sends about half of the rows to the end of the authors' grid; the closed form in
    place of their grid, which goes up to 0.998; every row, where they stop at 80 % of them; float64, where they have
    float16.

    >>> bound_rows(np.array([0.0, 0.0, 2.0]), np.array([0.0, 1.0, 1.0]), 0.5, 4.0).tolist()
    [0.5, 1.0, 1.0]
    """
    sums, squares = np.abs(np.asarray(sums, np.float64)), np.asarray(squares, np.float64)
    density = 1.0 - rate
    above, below = eta * kearns_saul(rate) * squares, 2.0 * density * sums
    best = np.divide(above, below, out=np.full_like(above, np.inf), where=below > 0)
    return np.clip(np.where(squares > 0, best, density), density, LARGEST)


def mean_square(change: float, separate: float, rate: float) -> float:
    """Return the q that minimises the expected Σ |h|² over calibration tokens and outputs. Ours, not the paper's.

    q = 1−p + p·(Σ_t Σ_j x_tj²·|δ_:j|² / Σ_t |δ·x_t|²), within [1−p, 1]. It is 1 where a delta is not aligned with its
    inputs. Bias adds up over the layers of a model and variance in part averages out, so it is larger than what suits a
    whole model.

    >>> mean_square(4.0, 1.0, 0.5), mean_square(0.0, 0.0, 0.5)
    (0.625, 0.5)
    """
    share = separate / change if change > 0 else float(separate > 0)
    return float(np.clip(1.0 - rate + rate * share, 1.0 - rate, LARGEST))


def reference_rows(
    products: Float[np.ndarray, "rows columns"], rate: float, eta: float, dtype: type = np.float16
) -> tuple[Float[np.ndarray, " rows"], int]:
    """Return the q of each row as the authors' code finds it, in float16 with its rounding, and how many q it tries.

    In float64 it shows what the same walk finds without that rounding.

    The code walks q = k/1000 from int(1000·(1−p)) on. A row whose objective does not fall keeps its q but is marked;
    the walk ends when 80 % of the rows are marked. S keeps its sign. The published q of small deltas comes from ties of
    float16 and from that end: it is neither the minimum of the bound nor stable. For comparison only.
    Source: Deng et al. 2024, the authors' repository at commit 0873fc2.
    """
    half, wide = products.astype(dtype), np.result_type(dtype, np.float32)
    sums = half.sum(axis=1, dtype=wide).astype(dtype)
    squares = (half * half).sum(axis=1, dtype=wide).astype(dtype)
    found, best = np.full(len(half), 1.0 - rate), np.full(len(half), FIRST_BEST, dtype)
    marked, steps = np.zeros(len(half), bool), 0
    for k in range(int((1.0 - rate) * 1000), 999):
        q, steps = k * 0.001, steps + 1
        objective = _reference_objective(sums, squares, rate, eta, q)
        falls, rises = objective <= best, objective >= best
        found, best = np.where(falls, q, found), np.where(falls, objective, best)
        marked |= rises
        if marked.sum() >= STOP_SHARE * len(half):
            break
    return found, steps


def _reference_objective(sums: np.ndarray, squares: np.ndarray, rate: float, eta: float, q: float) -> np.ndarray:
    """|η·bias + η²·Φ·Q/(4q²) + ln(2/γ)|, rounded after each operation with a number, as PyTorch rounds float16."""
    dtype, wide = sums.dtype.type, np.result_type(sums.dtype, np.float32).type

    def times(array: np.ndarray, number: float) -> np.ndarray:
        return (array.astype(wide) * wide(number)).astype(dtype)

    phi = (1 - 2 * rate) / np.log((1 - rate) / rate) if rate != 0.5 else 0.5
    bias = times(times(sums, 1 - (1 - rate) / q), eta)
    spread = times(squares, eta**2 * phi)
    spread = (spread.astype(wide) / wide(4 * q * q)).astype(dtype)
    constant = dtype(np.log(2 / GAMMA))
    return np.abs(bias + (spread + constant))


def q_of_linear(rule: str, moments: Moments, rate: float, eta: float) -> float:
    """Return the q of a linear by a rule of `Q_RULES`; 1 at rate 1, where nothing is kept."""
    return Q_RULES[rule].q(moments, rate, eta) if rate < 1 else LARGEST


Q_RULES: Mapping[str, QRule] = {
    "bound": QRule(lambda m, rate, eta: float(bound_rows(m.sums, m.squares, rate, eta).mean()), takes_eta=True),
    "mse": QRule(lambda m, rate, eta: mean_square(m.change, m.separate, rate), sees_change=True),
    "reference": QRule(
        lambda m, rate, eta: float(np.float32(reference_rows(m.products, rate, eta)[0].mean())),
        takes_eta=True,
        sees_products=True,
    ),
}
