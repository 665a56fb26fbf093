"""How several experts become one model: functions of the experts' scaled deltas, elementwise over (rows, columns).

Merges of whole tensors are combinations too, and are in `whole`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dppa_jax.delta import consensus
from dppa_jax.delta.rounding import rounded
from dppa_jax.delta.tied import Pair, reaches
from dppa_jax.delta.whole import WHOLE, Whole

Delta = Float[Array | np.ndarray, "*shape"]


def sum_(deltas: Sequence[Delta]) -> Delta:
    """Add: Σₖ λₖδₖ, in the order of the experts. Source: Ilharco et al. 2023 (task arithmetic)."""
    return reduce(add, deltas)


def ties(deltas: Sequence[Delta], zero_sign: float = 1.0) -> Delta:
    """Average the λₖδₖ that are not zero and have the elected sign, which is the sign of Σₖ λₖδₖ.

    Source: Yadav et al. 2023, section 3 (elect, disjoint merge); the trimming is the score's work.
    Differs from the authors' code: where the sum is exactly zero they elect the sign that is in the majority over the
    whole model, which takes a pass of its own; here it is `zero_sign`, +1 as in mergekit.

    >>> ties([jnp.array([3.0, 1.0]), jnp.array([1.0, -2.0]), jnp.array([-2.0, 0.0])]).tolist()
    [2.0, -2.0]
    """
    total = reduce(add, deltas)
    elected = jnp.where(jnp.where(total == 0, zero_sign, total) > 0, 1.0, -1.0)  # ±1: its product with δ has δ's size
    agree = [delta * elected > 0 for delta in deltas]
    kept = reduce(add, [jnp.where(a, delta, 0) for a, delta in zip(agree, deltas, strict=True)])
    count = reduce(add, [a.astype(jnp.float32) for a in agree])
    return jnp.where(jnp.isnan(total), total, kept / jnp.maximum(count, 1))  # NaN agrees with no sign: let it be seen


@dataclass(frozen=True)
class Combination:
    """The facts of a combination.

    Attributes:
      merged: from the experts' λδ to the merged delta; None for a merge of whole tensors. With `numbers` from δ,
        numbers and zero, as `consensus` says.
      numbers: from `consensus.Asked` to the numbers of every tensor, (tensors or rows, k), coefficients first.
      asks: do these follow from the tensors themselves?
      whole: what a merge of whole tensors is; None for other combinations.
      is_sum: is it Σ λδ, which has a gradient?
      experts: the least and the most experts that it takes; None for no limit.
      weighs_base: is the base one of the models that are averaged, with a coefficient of its own, 1 by default?
      coefficient: an expert's coefficient where none is given.
      parameters: the combination's own numbers, keys of `presets.PARAMETERS`.
    """

    merged: Callable[..., Delta] | None = None
    numbers: Callable[[consensus.Asked], np.ndarray] | None = None
    asks: bool = True
    whole: Whole | None = None
    is_sum: bool = False
    experts: tuple[int, int | None] = (1, None)
    weighs_base: bool = False
    coefficient: float = 1.0
    parameters: tuple[str, ...] = ()

    @property
    def accumulates(self) -> bool:
        """Whether experts can be added one after the other, so that few are in memory at a time."""
        return self.is_sum or (self.whole is not None and not (self.whole.gram or self.solves))

    @property
    def solves(self) -> bool:
        """Whether it solves for linears, from what their inputs are on `--calibration` text."""
        return self.whole is not None and self.whole.solve is not None

    @property
    def asks_tensors(self) -> bool:
        """Whether something is asked of whole tensors before they are merged."""
        return self.whole.gram if self.whole else self.numbers is not None and self.asks

    @property
    def prunes(self) -> bool:
        """Whether deltas may be pruned and scaled before."""
        return self.whole is None and self.numbers is None


COMBINATIONS = {
    "sum": Combination(sum_, is_sum=True),
    "ties": Combination(ties),
    "linear": Combination(whole=WHOLE["linear"], weighs_base=True, parameters=("normalize",)),
    "passthrough": Combination(whole=WHOLE["passthrough"], experts=(1, 1)),
    "slerp": Combination(whole=WHOLE["slerp"], experts=(1, 1), coefficient=0.5),
    "nuslerp": Combination(whole=WHOLE["nuslerp"], experts=(1, 1), weighs_base=True),
    "nuslerp_deltas": Combination(whole=WHOLE["nuslerp_deltas"], experts=(2, 2)),
    "multislerp": Combination(whole=WHOLE["multislerp"], weighs_base=True, parameters=("normalize",)),
    "multislerp_deltas": Combination(whole=WHOLE["multislerp_deltas"], parameters=("normalize",)),
    "karcher": Combination(
        whole=WHOLE["karcher"], weighs_base=True, parameters=("karcher_iterations", "karcher_tolerance")
    ),
    "model_stock": Combination(whole=WHOLE["model_stock"], experts=(2, None)),
    "regmean": Combination(whole=WHOLE["regmean"], parameters=("regmean_alpha",)),
    "nearswap": Combination(
        consensus.nearswap, consensus.coefficients_alone, asks=False, experts=(1, 1), coefficient=1e-4
    ),
    "arcee_fusion": Combination(consensus.arcee_fusion, consensus.arcee_numbers, experts=(1, 1)),
    "ram": Combination(consensus.ram, consensus.ram_numbers, asks=False, parameters=("ram_epsilon",)),
    "ramplus_tl": Combination(
        consensus.ram, consensus.ramplus_numbers, parameters=("ram_epsilon", "ram_r", "ram_alpha")
    ),
    "sce": Combination(consensus.sce, consensus.sce_numbers, parameters=("sce_topk",)),
}


def scaled(
    delta: jax.Array,
    keys: jax.Array | Pair,
    bounds: jax.Array,
    weights: jax.Array,
    zero: jax.Array,
    gain: jax.Array | None = None,
) -> jax.Array:
    """Keep and scale: wₚ·δ with p the first partition (highest rate first) whose bound the key reaches, else 0.

    Args:
      delta: (rows, columns) float32.
      keys: (rows, columns) uint32, the score; with `tied.Pair` ties are told apart.
      bounds: (rows, partitions) uint32, not increasing along partitions; of pairs (rows, partitions, 2).
      weights: (rows, partitions) float32, factor times coefficient.
      gain: a scale for each element beside the weight, (rows, columns) float32; None for 1.
      zero: the int32 number 0, unknown to the compiler; see `rounded`.
    """
    weight = jnp.zeros_like(delta)
    for p in reversed(range(bounds.shape[1])):
        weight = jnp.where(reaches(keys, bounds[:, p : p + 1]), weights[:, p : p + 1], weight)
    return rounded((weight if gain is None else weight * gain) * delta, zero)
