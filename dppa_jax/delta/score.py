"""What ranks a delta parameter: one record of facts per score.

A score turns a delta matrix into uint32 keys whose order is the order of the score. So thresholds, counts and masks are
integer work: exact, the same on every device, and blind to flushed denormals. An element is kept when its key is at or
above a bound; `bound_above(t)` is the bound for "score > t".

To add a score, write its `keys` function and a row in `SCORES`. Nothing outside this room looks at a score's name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Shaped, UInt32

from dppa_jax.delta.draws import NO_UNIT, Columns, column_draws, hashed, row_draws, row_words, unit_draws, unit_keys

Delta = Float[Array | np.ndarray, "rows columns"]
Keys = UInt32[Array | np.ndarray, "rows columns"]
Ranks = Shaped[Array, "rows columns"]

FIRST_BOUND = 0  # keeps everything
LAST_BOUND = np.uint32(0xFFFFFFFF)


class Whole(StrEnum):
    """What goes as a whole."""

    ROWS = "rows"
    COLUMNS = "columns"
    UNITS = "units"  # heads and neurons, from all linears of their group


@dataclass(frozen=True)
class Units:
    """The heads or neurons that the rows or columns of a linear belong to, one after another.

    Attributes:
      group: the name that all linears with these units have.
      span: how many rows or columns of this linear belong to a unit.
      rows: are they rows, or columns?
      ranks: the place of each unit in the order of importance, from 0 for the least; None where they are not compared.
    """

    group: str
    span: int
    rows: bool
    ranks: UInt32[np.ndarray, " units"] | None = None


@dataclass(frozen=True)
class Rows:
    """Rows start..stop of one expert's linear, and what a score may ask about them.

    Attributes:
      seed, expert, tensor: what random numbers are made from.
      rate: the share removed from the tensor.
      row_sums: computes Σ_j |δ_ij| of these rows, (rows,) float64; None where the weights are not at hand.
      column_sums: computes Σ_i |δ_ij| over these rows, (columns,) float64; None where the weights are not at hand.
      parameters: the score's own numbers by name.
      norms: ‖x_j‖ of the tensor's inputs on calibration text, (columns,); None where there is no such text.
      units: the heads or neurons that the tensor's rows or columns belong to; None where they are not known.
    """

    seed: int
    expert: str
    tensor: str
    start: int
    stop: int
    rate: float
    row_sums: Callable[[], np.ndarray] | None = None
    column_sums: Callable[[], np.ndarray] | None = None
    parameters: Mapping[str, float] = field(default_factory=dict)
    norms: np.ndarray | None = None
    units: Units | None = None


class Inputs(NamedTuple):
    """What a score's `keys` needs beside the delta.

    Attributes:
      make: from `Rows` to an array: (rows, numbers), or (columns,): a number for each column, which all rows share.
      sees_weights: must the weights be at hand? If not, any rows can be asked for at any time.
    """

    make: Callable[[Rows], np.ndarray]
    sees_weights: bool = True


@dataclass(frozen=True)
class Score:
    """The facts of a score.

    Attributes:
      keys: from (delta, inputs, column numbers) to uint32 keys.
      inputs: what `keys` needs beside the delta; None for nothing.
      random: is it a uniform random number? Then thresholds are the rates themselves, the seed counts, and the factors
        of partitions start at 1/(1−p).
      gain: from the arguments of `keys` to a scale for each element, beside the weight of its partition; None for 1.
      ranked: do `keys` and `gain` take `rank`, that of each |δ| within its row?
      calibrated: does it need activation norms on `--calibration` text?
      parameters: the score's own numbers, keys of `presets.PARAMETERS`, which `inputs` finds in `Rows`.
      ties: the rule for ties, a key of `tied.TIES`, that goes with it; empty for none.
      draws: from (what `inputs` makes, columns) to the random numbers of the rows or columns that go as a whole, of
        which the share that is kept need not be the density; None where every element has its own.
      rescaled: may a scale rescale what is kept?
      whole: what goes as a whole; None where each element goes on its own.
      sums: the score of single elements whose sums over units rank these; empty where units are not ranked. Then a
        share of units is dropped in place of what is below a threshold.
    """

    keys: Callable[..., Keys]
    inputs: Inputs | None = None
    random: bool = False
    gain: Callable[..., jax.Array] | None = None
    ranked: bool = False
    calibrated: bool = False
    parameters: tuple[str, ...] = ()
    ties: str = ""
    draws: Callable[[np.ndarray, int], np.ndarray] | None = None
    rescaled: bool = True
    whole: Whole | None = None
    sums: str = ""


def delta(base: jax.Array, expert: jax.Array, dtype: str) -> Delta:
    """Return expert − base, formed in float32 and rounded once to `dtype`, as float32.

    For 16-bit weights of that dtype these are the bits that PyTorch's 16-bit subtraction gives.
    """
    return in_dtype(expert.astype(jnp.float32) - base.astype(jnp.float32), dtype)


def in_dtype(x: Float[Array, "*shape"], dtype: str) -> Float[Array, "*shape"]:
    """Round float32 numbers to those that a dtype has, as float32."""
    if dtype == "float32":
        return x
    info = jnp.finfo(dtype)
    rounded = lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)
    if dtype == "float16":  # reduce_precision flushes what is below 6.1e-5, and many deltas of a fine-tune are
        step = np.float32(info.smallest_subnormal)
        rounded = jnp.where(jnp.abs(x) < info.tiny, jnp.round(x / step) * step, rounded)
    return rounded


def finite_delta(base: jax.Array, expert: jax.Array, dtype: str) -> Delta:
    """Return `delta` with 0 in place of NaN and Inf (--allow_nonfinite)."""
    difference = delta(base, expert, dtype)
    return jnp.where(jnp.isfinite(difference), difference, 0)


def magnitude(delta: Delta, inputs: None = None, column: Columns | None = None) -> Keys:
    """Rank by |δ|. Source: Han et al. 2015.

    >>> delta = jnp.array([[-2.0, 0.0, 1.0]])
    >>> jnp.argsort(magnitude(delta)).tolist()
    [[1, 2, 0]]
    """
    return float_keys(jnp.abs(delta))


def random(delta: Delta, inputs: UInt32[Array | np.ndarray, "rows words"], column: Columns) -> Keys:
    """Draw u, uniform on the 2³² integers, by a counter-based hash of (words of the row, column).

    `inputs` begins with two words per row, folded from (seed, expert name, tensor name, row) by `row_words`.
    Drop-and-rescale keeps u ≥ p·2³². Source: Yu et al. 2023 (DARE), algorithm 1.
    """
    return hashed(inputs, column)


def random_row(delta: Delta, inputs: UInt32[Array | np.ndarray, "rows words"], column: Columns) -> Keys:
    """Draw u once for all elements of an output row: rows go as a whole.

    An output then changes by −S_i or not at all, so that the least expected |h|² is at q = 1: rows are not rescaled.
    Deng et al. 2024 prune structures; which ones was not to be found, and this choice is ours.
    """
    return jnp.broadcast_to(row_draws(inputs, delta.shape[1]), delta.shape)


def random_column(delta: Delta, inputs: UInt32[Array | np.ndarray, "rows words"], column: Columns) -> Keys:
    """Draw u once for all elements of an input column, of which every row has the same words: columns go as a whole.

    Each output changes as with `random`, so that every rule for q holds as it is. The choice of columns is ours.
    """
    return jnp.broadcast_to(hashed(inputs, column), delta.shape)


def random_group(delta: Delta, inputs: UInt32[Array | np.ndarray, "rows words"], column: Columns) -> Keys:
    """Draw u once for all elements of a unit, a head or a neuron, in all linears of its group: units go as a whole.

    All of a unit, rows and columns, is divided by one q. Let c_k be what the delta of unit k changes in an output of
    the group (of o or down), to first order in δ, rows and columns together. As the units' shares of that output add
    up, it changes by Σ_k c_k·(1 − m_k/q): the law of `random` with units for elements, E = (1 − (1−p)/q)·S and
    Var = p(1−p)/q²·Q, S = Σ c_k, Q = Σ c_k². So rows are rescaled here, which `random_row` must not do: outputs of
    single rows are errors there, and are added up by the columns of the group here. If the columns alone were rescaled,
    the rows' share of S would be kept by 1−p only. The second order, rows times columns, comes with m_k/q², whose mean
    at q = 1−p is 1/(1−p); at q = 1 each unit is wholly the expert's or wholly the base's. Deng et al. 2024
    prune structures; which ones was not to be found, and these are ours.

    `inputs` are two words of the group, the unit of the row, and the columns of a unit.
    """
    return jnp.broadcast_to(unit_keys(inputs, column), delta.shape)


def group(delta: Delta, inputs: Array | tuple[Shaped[Array, "tensors inputs"], jax.Array], column: Columns) -> Keys:
    """Rank units, heads or neurons, by the sum of a score over all their elements in all linears of the group.

    The score is |δ_ij| or, as WANDA has it, |δ_ij| · ‖x_j‖ (`Score.sums`). The int(units · rate) units of the least
    sums are dropped, of equal ones the first. `inputs` are the ranks, of rows or of columns. Source of the scores: Han
    et al. 2015, Sun et al. 2023; to add them up over units of a delta is ours.
    """
    if not isinstance(inputs, tuple):
        return jnp.broadcast_to(inputs, delta.shape)
    ranks, tensor = inputs
    return jnp.broadcast_to(ranks[tensor[:, None], column], delta.shape)


def della(delta: Delta, inputs: UInt32[Array, "rows 4"], column: Columns, *, rank: Ranks) -> Keys:
    """Draw u as `random` does, and move it by the rank of |δ| within its row: the larger |δ|, the likelier it is kept.

    The keep probability is 1−p + w·(r/(n−1) − ½), with r the rank from 0 for the smallest |δ| and n the columns. The
    window w is `della_window`, or less where the probability would leave [0, 1]. `inputs` are the two words of
    `row_words` and the bits of the density 1−p and of the window. Source: Deep et al. 2024 (DELLA, MagPrune), section
    3.1.
    """
    shift = _della_shift(rank, inputs)
    moved = (jnp.abs(shift) * 2.0**32).astype(jnp.uint32)
    u = random(delta, inputs, column)
    up = jnp.where(u > LAST_BOUND - moved, LAST_BOUND, u + moved)
    return jnp.where(shift >= 0, up, jnp.where(u < moved, np.uint32(0), u - moved))


def della_gain(delta: Delta, inputs: UInt32[Array, "rows 4"], column: Columns, *, rank: Ranks) -> Delta:
    """(1−p) / keep probability: with DARE's 1/(1−p), a kept element is divided by its own probability."""
    density = lax.bitcast_convert_type(inputs[:, 2:3], jnp.float32)
    keeps = density + _della_shift(rank, inputs)
    return jnp.where(keeps > 0, density / keeps, 0)


def wanda(delta: Delta, inputs: tuple[Float[Array, "tensors inputs"], jax.Array], column: Columns) -> Keys:
    """Rank by |δ_ij| · ‖x_j‖, ‖x_j‖ being the norm of input j over calibration tokens. Source: Sun et al. 2023, eq. 1.

    `inputs` is the norms of every tensor in the matrix and the tensor of each row (`runtime.mesh.PerTensor`).
    """
    norms, tensor = inputs
    return float_keys(jnp.abs(delta) * norms[tensor[:, None], column])


def row(delta: Delta, inputs: Float[Array, "rows 1"], column: Columns) -> Keys:
    """Rank output rows by Σ_j |δ_ij|, one score for all elements of a row: structural pruning of rows."""
    return float_keys(jnp.broadcast_to(inputs, delta.shape))


def column(delta: Delta, inputs: tuple[Float[Array, "tensors inputs"], jax.Array], column: Columns) -> Keys:
    """Rank input columns by Σ_i |δ_ij| or, with WANDA's score, by ‖x_j‖ · Σ_i |δ_ij|: structural pruning of columns.

    All elements of a column have one score. Sun et al. 2023 rank single elements; their sums are ours.
    """
    sums, tensor = inputs
    return float_keys(jnp.broadcast_to(sums[tensor[:, None], column], delta.shape))


def bound_above(threshold: float | np.floating | np.ndarray) -> np.uint32 | np.ndarray:
    """Return the smallest key whose score is greater than a non-negative float32 threshold.

    >>> bool(bound_above(np.float32(1.0)) == np.float32(1.0).view(np.uint32) + 1)
    True
    """
    return np.asarray(threshold, np.float32).view(np.uint32) + np.uint32(1)


def random_bound(rate: float | np.floating | np.ndarray) -> np.uint32 | np.ndarray:
    """Return ⌈rate·2³²⌉: u is kept when it is at or above. At rate 1 no bound drops all keys; the weight is 0 there."""
    return np.minimum(np.ceil(np.asarray(rate, np.float64) * 2.0**32), float(LAST_BOUND)).astype(np.uint32)


def _random_inputs(rows: Rows) -> np.ndarray:
    return row_words(rows.seed, rows.expert, rows.tensor, rows.start, rows.stop)


def _column_inputs(rows: Rows) -> np.ndarray:
    return np.repeat(row_words(rows.seed, rows.expert, rows.tensor, 0, 1), rows.stop - rows.start, axis=0)


def _wanda_sums(rows: Rows) -> np.ndarray:
    return (rows.column_sums() * rows.norms).astype(np.float32)


def _unit_words(rows: Rows) -> np.ndarray:
    units, count = rows.units, rows.stop - rows.start
    words = np.repeat(row_words(rows.seed, rows.expert, units.group, 0, 1), count, axis=0)
    unit = np.arange(rows.start, rows.stop) // units.span if units.rows else np.zeros(count)
    span = np.full(count, NO_UNIT if units.rows else units.span)
    return np.concatenate([words, np.stack([unit, span], axis=1).astype(np.uint32)], axis=1)


def _unit_ranks(rows: Rows) -> np.ndarray:
    ranks = np.repeat(rows.units.ranks, rows.units.span)
    return ranks[rows.start : rows.stop, None] if rows.units.rows else ranks


def _della_inputs(rows: Rows) -> np.ndarray:
    numbers = np.array([1.0 - rows.rate, rows.parameters["della_window"]], np.float32)
    words = _random_inputs(rows)
    return np.concatenate([words, np.tile(numbers.view(np.uint32), (len(words), 1))], axis=1)


SCORES = {
    "magnitude": Score(magnitude),
    "random": Score(random, Inputs(_random_inputs, sees_weights=False), random=True),
    "random_row": Score(
        random_row,
        Inputs(_random_inputs, sees_weights=False),
        random=True,
        draws=row_draws,
        rescaled=False,
        whole=Whole.ROWS,
    ),
    "random_column": Score(
        random_column,
        Inputs(_column_inputs, sees_weights=False),
        random=True,
        draws=column_draws,
        whole=Whole.COLUMNS,
    ),
    "della": Score(
        della,
        Inputs(_della_inputs, sees_weights=False),
        random=True,
        gain=della_gain,
        ranked=True,
        parameters=("della_window",),
    ),
    "wanda": Score(wanda, Inputs(lambda rows: rows.norms), calibrated=True),
    "row": Score(row, Inputs(lambda rows: rows.row_sums().astype(np.float32)[:, None]), ties="drop", whole=Whole.ROWS),
    "column": Score(
        column,
        Inputs(lambda rows: rows.column_sums().astype(np.float32)),
        ties="drop",
        whole=Whole.COLUMNS,
    ),
    "wanda_column": Score(column, Inputs(_wanda_sums), calibrated=True, ties="drop", whole=Whole.COLUMNS),
    "random_group": Score(
        random_group,
        Inputs(_unit_words, sees_weights=False),
        random=True,
        draws=unit_draws,
        whole=Whole.UNITS,
    ),
    "group": Score(group, Inputs(_unit_ranks), whole=Whole.UNITS, sums="magnitude"),
    "wanda_group": Score(group, Inputs(_unit_ranks), calibrated=True, whole=Whole.UNITS, sums="wanda"),
}


def _della_shift(rank: Ranks, inputs: UInt32[Array, "rows 4"]) -> Delta:
    """What is added to the keep probability 1−p: from −w/2 for the smallest |δ| of a row to w/2 for the largest."""
    density, window = (lax.bitcast_convert_type(inputs[:, i : i + 1], jnp.float32) for i in (2, 3))
    width = jnp.minimum(window, 2 * jnp.minimum(density, 1 - density))
    return width * (rank.astype(jnp.float32) / max(rank.shape[1] - 1, 1) - 0.5)


def float_keys(score: jax.Array) -> Keys:
    """Return the bits of non-negative float32 numbers, which sort as the numbers do."""
    return lax.bitcast_convert_type(score, jnp.uint32)
