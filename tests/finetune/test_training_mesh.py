"""Training on several devices: the result of one device, with weights, moments and batches really divided."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from training import SMALL

from dppa_jax.config.finetune import TrainConfig
from dppa_jax.finetune.data import Rows, batches
from dppa_jax.finetune.train import TRAIN_AXES, State, Trainer
from dppa_jax.model import init_tree

OPTIONS = TrainConfig(steps=5, learning_rate=1e-2, batch_size=8)
SLOW = pytest.mark.slow
MESHES = {(2, 2): 2, (4, 1): 2, (1, 4): 1}  # and the parts that a step's rows go through the model in


def mesh_of(data: int, fsdp: int) -> Mesh:
    return Mesh(np.array(jax.devices()[: data * fsdp]).reshape(data, fsdp), TRAIN_AXES)


def trained(rows: Rows, mesh: Mesh, **changes) -> tuple[State, list[float], float]:
    trainer = Trainer(SMALL, replace(OPTIONS, **changes), mesh)
    state, losses = trainer.start(init_tree(SMALL, jax.random.key(0), stddev=0.2)), []
    for step, batch in enumerate(batches(rows.count, OPTIONS.batch_size, OPTIONS.steps, OPTIONS.seed)):
        state, loss = trainer.step(state, step, rows.take(batch))
        losses.append(float(loss))
    return state, losses, trainer.loss(state, rows.take(slice(13)))


@pytest.mark.parametrize(
    ("shape", "accumulate"), [pytest.param(*of, marks=[] if of[0] == (2, 2) else SLOW) for of in MESHES.items()]
)
def test_four_devices_give_the_losses_of_one(rows, shape, accumulate):
    _, wanted, wanted_eval = trained(rows, mesh_of(1, 1))
    _, found, found_eval = trained(rows, mesh_of(*shape), accumulate=accumulate)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert found_eval == pytest.approx(wanted_eval, rel=1e-5)


@pytest.mark.parametrize("shape", [pytest.param(of, marks=[] if of == (2, 2) else SLOW) for of in MESHES])
def test_a_device_holds_its_share_of_matrices_and_moments_before_and_after_steps(rows, shape):
    trainer = Trainer(SMALL, replace(OPTIONS, accumulate=MESHES[shape]), mesh_of(*shape))
    start = trainer.start(init_tree(SMALL, jax.random.key(0)))
    shares = [jax.tree.map(share, start)]
    after, _ = trainer.step(start, 0, rows.take(np.arange(8)))
    shares.append(jax.tree.map(share, after))
    for state in shares:
        adam = next(part for part in state.moments if hasattr(part, "mu"))
        for tree in (state.tree, adam.mu, adam.nu):
            for path, found in jax.tree.leaves_with_path(tree):
                is_matrix = "norm" not in path[-1].key
                assert found == (1 / shape[1] if is_matrix else 1), jax.tree_util.keystr(path)


def share(array: jax.Array) -> float:
    """Of an array's elements that one device holds."""
    sizes = {piece.data.size for piece in array.addressable_shards}
    assert len(sizes) == 1
    return sizes.pop() / array.size


def test_rows_that_the_devices_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"--train_batch_size=8, --accumulate=4: .* 2, must be a multiple of the 4"):
        Trainer(SMALL, replace(OPTIONS, accumulate=4), mesh_of(2, 2))
