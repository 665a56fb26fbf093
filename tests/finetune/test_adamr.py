"""AdamR: the authors' steps, one sum on any mesh, and what an update looks like."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from dppa_jax.finetune.optimizer import PullError, ordered_sum, pull_of, root_mean, scale_by_adamr

CASES = [
    f"{norm}_wd{decay}_{start}"
    for norm in ("L1", "L2")
    for decay in (0.01, 0.5)
    for start in ("from_anchor", "from_anchor_schedule", "from_elsewhere")
]


@pytest.fixture(params=["float64", "float32"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def followed(norm: str, decay: float, found: dict, start: dict, anchor: dict, rates, dtype: str):
    """The weights after each step of AdamR on mean((XW + b − Y)²), and vbar of each."""
    inputs, targets = (np.asarray(found[name], dtype) for name in "XY")
    weights, anchor = ({k: jnp.asarray(v, dtype) for k, v in tree.items()} for tree in (start, anchor))
    transform = scale_by_adamr(weight_decay=decay, norm=norm)
    gradient_of = jax.grad(lambda w: jnp.mean((inputs @ w["W"] + w["b"] - targets) ** 2))
    path, bars, state = [weights], [], transform.init(weights)

    @jax.jit
    def step(weights, state, rate):
        direction, state = transform.update(gradient_of(weights), state, weights, anchor=anchor, learning_rate=rate)
        return jax.tree.map(lambda w, d: w - rate * d, weights, direction), state

    with jax.default_matmul_precision("highest"):
        for rate in np.asarray(rates, dtype):
            weights, state = step(weights, state, rate)
            path.append(weights)
            bars.append(state.vbar)
    return {name: np.array([w[name] for w in path]) for name in "Wb"}, np.array(bars)


@pytest.mark.parametrize("case", CASES)
def test_7_adamr_has_the_trajectories_of_the_authors_code(golden, case, dtype):
    found = load_file(golden / "darex" / "adamr" / f"{case}.safetensors")
    start, anchor = {k: found[k][0] for k in "Wb"}, {k: found[f"anchor_{k}"] for k in "Wb"}
    norm, decay = case[:2].lower(), float(case.split("_")[1][2:])
    path, bars = followed(norm, decay, found, start, anchor, found["learning_rate"], dtype)
    tolerance = 1e-12 if dtype == "float64" else 1e-5
    for name in "Wb":
        np.testing.assert_allclose(path[name], found[name], rtol=0, atol=tolerance)
    np.testing.assert_allclose(bars, found["vbar"], rtol=tolerance)


def test_7_adamr_has_the_trajectory_of_the_authors_own_run(golden):
    found = load_file(golden / "adamr" / "L2_wd0.01.safetensors")
    start, anchor = ({k: found[f"{which}_{k}"] for k in "Wb"} for which in ("init", "pre"))
    path, bars = followed("l2", 0.01, found, start, anchor, [1e-3] * 20, "float32")
    for name in "Wb":
        np.testing.assert_allclose(path[name], found[f"traj_{name}"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(bars, found["exp_avg_mean_sqrt"], rtol=1e-5)


@pytest.fixture
def problem():
    """Weights and a gradient of three tensors, of which one is zero."""
    draw = np.random.default_rng(0).standard_normal
    weights = {"a": draw((3, 40, 24)), "b": draw((24,)), "c": np.zeros((5, 7))}
    gradient = {"a": draw((3, 40, 24)), "b": -draw((24,)), "c": np.zeros((5, 7))}
    return tuple({k: jnp.asarray(v, jnp.float32) for k, v in tree.items()} for tree in (weights, gradient))


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize(("decay", "moved"), [(0.0, 1.0), (0.5, 0.0)])
def test_7_without_decay_or_at_the_anchor_a_step_is_adams_bit_for_bit(problem, norm, decay, moved):
    weights, gradient = problem
    anchor = jax.tree.map(lambda w: w - moved, weights)
    adam, adamr = optax.scale_by_adam(), scale_by_adamr(weight_decay=decay, norm=norm)
    state, wanted_state = adamr.init(weights), adam.init(weights)
    for _ in range(2):
        wanted, wanted_state = jax.jit(adam.update)(gradient, wanted_state)
        found, state = jax.jit(adamr.update)(gradient, state, weights, anchor=anchor)
        for name in wanted:
            bits = [np.asarray(tree[name]).view(np.uint32) for tree in (found, wanted)]
            if decay:  # Adam's −0 and a pull of 0 are +0
                bits = [np.asarray(tree[name]) for tree in (found, wanted)]
            np.testing.assert_array_equal(*bits)
    assert float(state.vbar) != 1


def test_a_gradient_of_zero_has_a_vbar_of_one(problem):
    weights, _ = problem
    zeros, transform = jax.tree.map(jnp.zeros_like, weights), scale_by_adamr(weight_decay=0.25)
    direction, state = transform.update(zeros, transform.init(weights), weights, anchor=zeros)
    assert float(state.vbar) == 1
    np.testing.assert_array_equal(direction["a"], 0.25 * weights["a"])


def test_an_anchor_in_bfloat16_is_subtracted_in_float32(problem):
    weights, gradient = problem
    transform = scale_by_adamr(weight_decay=0.5)
    coarse = jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights)
    exact = jax.tree.map(lambda w: w.astype(jnp.float32), coarse)
    found, wanted = (
        transform.update(gradient, transform.init(weights), weights, anchor=anchor)[0] for anchor in (coarse, exact)
    )
    np.testing.assert_array_equal(found["a"], wanted["a"])
    assert found["a"].dtype == jnp.float32


def test_it_is_a_link_of_an_optax_chain(problem):
    weights, gradient = problem
    chain = optax.chain(scale_by_adamr(weight_decay=0.5), optax.scale_by_learning_rate(0.1))
    anchor = jax.tree.map(jnp.zeros_like, weights)
    found, _ = chain.update(gradient, chain.init(weights), weights, anchor=anchor)
    plain = scale_by_adamr(weight_decay=0.5)
    direction, _ = plain.update(gradient, plain.init(weights), weights, anchor=anchor)
    np.testing.assert_allclose(found["a"], -0.1 * direction["a"], rtol=1e-6)


@pytest.mark.parametrize("spec", [(None, "x", None), (None, None, "x"), ("y", "x"), ("x", None, "y")])
def test_7_a_sum_has_the_same_bits_on_one_device_and_on_eight(spec):
    array = np.random.default_rng(1).random((4, 24, 40), np.float32) ** 8
    sums = jax.jit(ordered_sum)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))
    divided = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    assert np.asarray(sums(divided)).tobytes() == np.asarray(sums(array)).tobytes()
    assert float(sums(array)) == pytest.approx(array.sum(dtype=np.float64), rel=1e-6)


def test_every_element_of_every_tensor_counts_once_in_the_mean():
    tree = {"a": jnp.full((3, 5, 7), 4.0), "b": jnp.full((11,), 9.0), "c": jnp.asarray(16.0)}
    assert float(root_mean(tree)) == pytest.approx(np.sqrt((105 * 4 + 11 * 9 + 16) / 117), rel=1e-6)


def test_a_pull_of_one_is_refused_also_when_it_was_at_an_earlier_step(problem):
    weights, gradient = problem
    transform = scale_by_adamr(weight_decay=1.0)
    step = lambda state, rate: transform.update(gradient, state, weights, anchor=weights, learning_rate=rate)[1]  # noqa: E731
    state = step(transform.init(weights), 0.0)
    rate = float(state.vbar)
    assert pull_of(step(state, 0.9 * rate)) == pytest.approx({"vbar": rate, "largest_pull": 0.9}, rel=1e-5)
    with pytest.raises(PullError, match=r"has reached 1\.1, .*--weight_decay or --learning_rate is too high"):
        pull_of(step(step(state, 1.1 * rate), 0.1 * rate))
    assert pull_of(optax.scale_by_adam().init(weights)) == {}
