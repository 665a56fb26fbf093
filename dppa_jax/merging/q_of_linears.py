"""DAREx's q of every linear by a rule of `delta.q_rules`: a pass over base and expert, on calibration text."""

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dppa_jax.architecture.specs import linears_of, pruned_specs
from dppa_jax.checkpoint import Checkpoint
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.q import QConfig
from dppa_jax.delta.q_rules import Q_RULES, Moments, q_of_linear
from dppa_jax.merging.activations import InputMoments, layers_seen, moments
from dppa_jax.merging.kernels import Kernels, host_sums
from dppa_jax.merging.merger import kernels_of
from dppa_jax.runtime.mesh import put_rows


def q_of_linears(
    base: Checkpoint,
    expert: Checkpoint,
    merge: MergeConfig,
    q: QConfig,
    tokens: Int[np.ndarray, "rows tokens"],
    rates: Float[np.ndarray, " linears"],
    mesh: Mesh,
) -> list[dict[str, float]]:
    """Find the q of every linear of an expert, by the linears' names, with each η that the rule is given.

    Base and expert are read once, a decoder layer at a time. S and Q are sums of float32 products that are folded and
    added in float64, as a survey's are, so that they have the same bits on any mesh. Biases are not pruned here, and
    have no column in the sums, as they have in the authors' code.

    Args:
      base, expert: open checkpoints.
      merge: what is computed; the delta is formed in its dtype.
      q: the rule and its number.
      tokens: what the expert reads.
      rates: of the linears, in their order in the base.
      mesh: the devices.
    """
    rule, (_, dense) = Q_RULES[q.way], kernels_of(mesh, merge)
    rate_of = dict(zip(linears_of(pruned_specs(base.specs, merge.prune)).names, rates.tolist(), strict=True))
    of_base: dict[str, np.ndarray] = {}

    def delta(name: str, weights: np.ndarray) -> Array:
        of_base[name] = base.read(name)
        return dense.elementwise.delta(*map(jnp.asarray, (of_base[name], weights)))

    etas = q.eta if rule.takes_eta else q.eta[:1]
    found: dict[str, list[float]] = {}
    for seen in layers_seen(expert, tokens, moments, delta if rule.sees_change else None):
        for name, weights in seen.linears.items():
            start = of_base.pop(name) if rule.sees_change else base.read(name)
            own = _moments(dense, start, weights, seen.measured[name], rule.sees_products)
            found[name] = [q_of_linear(q.way, own, rate_of[name], eta) for eta in etas]
    return [{name: found[name][i] for name in rate_of if name in found} for i in range(len(etas))]


def _moments(kernels: Kernels, base: np.ndarray, expert: np.ndarray, inputs: InputMoments, whole: bool) -> Moments:
    """Form what the rules may know of a linear; the products themselves if they are wanted whole."""
    base_rows, expert_rows = (put_rows(kernels.mesh, array) for array in (base, expert))
    totals = host_sums(kernels.product_sums(base_rows, expert_rows, inputs.means), len(base))
    separate = host_sums(kernels.product_sums(base_rows, expert_rows, inputs.norms), len(base)).imag.sum()
    products = None
    if whole:
        products = np.asarray(kernels.elementwise.delta(jnp.asarray(base), jnp.asarray(expert))) * inputs.means
    return Moments(totals.real, totals.imag, float(inputs.change), float(separate), products)
