"""AdamR in the trainer and in --job=finetune: on a mesh, interrupted, refused."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import launch
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file
from training import SMALL, WEIGHTS, flags, kept

from dppa_jax.config.finetune import AdamW, TrainConfig
from dppa_jax.finetune.data import Rows, batches
from dppa_jax.finetune.optimizer import PullError
from dppa_jax.finetune.train import TRAIN_AXES, Trainer, train
from dppa_jax.model import init_tree

ADAMR = AdamW(weight_decay=0.4, decay_toward="base", max_gradient_norm=float("inf"))
OPTIONS = TrainConfig(steps=5, learning_rate=1e-2, batch_size=8, optimizer=ADAMR)
PULLED = ("--train_steps=6", "--checkpoint_every=2", "--decay_toward=base", "--weight_decay=0.02")


@pytest.fixture(scope="module")
def tree() -> dict:
    return init_tree(SMALL, jax.random.key(0), stddev=0.2)


def distance(tree: dict, base: dict) -> float:
    """The mean |δ|."""
    deltas = [
        np.abs(np.asarray(a) - np.asarray(b)).ravel() for a, b in zip(*map(jax.tree.leaves, (tree, base)), strict=True)
    ]
    return float(np.concatenate(deltas).mean())


def measured(rows: Rows, tree: dict, data: int, fsdp: int) -> list[dict]:
    """vbar and the largest pull of every step on a mesh."""
    mesh = Mesh(np.array(jax.devices()[: data * fsdp]).reshape(data, fsdp), TRAIN_AXES)
    trainer = Trainer(SMALL, OPTIONS, mesh, tree)
    state, found = trainer.start(tree), []
    for step, batch in enumerate(batches(rows.count, OPTIONS.batch_size, OPTIONS.steps, OPTIONS.seed)):
        state, _ = trainer.step(state, step, rows.take(batch))
        found.append(trainer.pull(state))
    return found


@pytest.mark.parametrize("mesh", [(1, 2), pytest.param((2, 1), marks=pytest.mark.slow)])
def test_7_two_devices_have_the_vbar_of_one(rows, tree, mesh):
    wanted = measured(rows, tree, 1, 1)
    for one, two in zip(wanted, measured(rows, tree, *mesh), strict=True):
        assert two == pytest.approx(one, rel=1e-6)
    assert wanted[0]["largest_pull"] == 0, "the learning rate begins at 0"
    assert 0 < wanted[1]["largest_pull"] <= wanted[-1]["largest_pull"] < 1


def test_weights_stay_nearer_to_the_base_than_adams_and_a_base_in_bfloat16_is_held_in_it(rows, tree):
    coarse = jax.tree.map(lambda w: w.astype(jnp.bfloat16), tree)
    pulled, _ = train(SMALL, coarse, rows, OPTIONS)
    free, _ = train(SMALL, coarse, rows, TrainConfig(steps=5, learning_rate=1e-2, batch_size=8))
    assert distance(pulled, coarse) < 0.9 * distance(free, coarse)
    anchor = Trainer(SMALL, OPTIONS, base=coarse)._anchor
    assert {leaf.dtype.name for leaf in jax.tree.leaves(anchor)} == {"bfloat16"}


def test_7_a_decay_of_zero_trains_the_bits_of_adam(rows, tree):
    plain = replace(OPTIONS, optimizer=AdamW(max_gradient_norm=float("inf")))
    toward = replace(OPTIONS, optimizer=replace(ADAMR, weight_decay=0.0))
    found, wanted = (jax.tree.leaves(train(SMALL, tree, rows, options)[0]) for options in (toward, plain))
    assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(found, wanted, strict=True))


def test_a_pull_of_one_ends_training_and_a_trainer_without_a_base_is_refused(rows, tree):
    strong = TrainConfig(
        steps=5, learning_rate=1e-2, batch_size=8, optimizer=AdamW(weight_decay=50, decay_toward="base")
    )
    with pytest.raises(PullError, match="--weight_decay or --learning_rate is too high"):
        train(SMALL, tree, rows, strong)
    with pytest.raises(ValueError, match="--decay_toward=base: the trainer is given no base"):
        Trainer(SMALL, OPTIONS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"decay_toward": "bas"}, "--decay_toward=bas: not one of zero, base. Did you mean 'base'"),
        ({"decay_toward": "base", "decay_norm": "l3"}, "--decay_norm=l3: not one of l2, l1"),
        ({"decay_norm": "l1"}, "--decay_norm=l1: weights decay to zero, as in AdamW; give --decay_toward=base"),
    ],
)
def test_words_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        AdamW(**given)


# ---- the job


@pytest.fixture(scope="module")
def undisturbed(material, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    launch(*flags(material, root, *PULLED))
    return root


def stop_before_writing(monkeypatch, given: list[str]) -> None:
    def fail(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("dppa_jax.jobs.finetune.write_expert", fail)
        with pytest.raises(SystemExit, match="disk full"):
            launch(*given)


def test_vbar_and_the_largest_pull_are_logged_and_recorded(material, tmp_path, caplog, undisturbed):
    log = json.loads((undisturbed / "out/finetune.json").read_text())["log"]
    assert all(entry["vbar"] > 0 and 0 < entry["largest_pull"] < 1 for entry in log)
    with caplog.at_level("INFO", "absl"):
        launch(*flags(material, tmp_path, *PULLED, "--train_steps=2", "--decay_norm=l1"))
    assert re.search(r"step 2 of 2: loss .*, vbar 0\.\d+, largest pull 0\.\d+, .* tokens/s", caplog.text)


def test_7_a_resumed_run_has_the_same_bits(material, undisturbed, tmp_path, caplog, monkeypatch):
    given = flags(material, tmp_path, *PULLED)
    stop_before_writing(monkeypatch, given)
    with caplog.at_level("INFO", "absl"):
        launch(*given)
    assert "goes on after step 4" in caplog.text
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (undisturbed / "out" / WEIGHTS).read_bytes()


def test_7_states_of_another_base_are_refused(material, tmp_path, monkeypatch):
    other = tmp_path / "other"
    stop_before_writing(monkeypatch, flags(material, tmp_path, *PULLED))
    (mine,) = (tmp_path / "runs").iterdir()
    shutil.copytree(material / "base", other)
    tensors = load_file(other / WEIGHTS)
    save_file({name: tensor * np.float32(1.5) for name, tensor in tensors.items()}, other / WEIGHTS)
    given = flags(material, tmp_path, *PULLED, f"--base={other}")
    stop_before_writing(monkeypatch, given)
    (theirs,) = (path for path in (tmp_path / "runs").iterdir() if path != mine)
    theirs.rename(tmp_path / "aside")
    mine.rename(theirs)
    with pytest.raises(SystemExit, match="4: the state is of a run from another --base; give that base"):
        launch(*given)


def test_a_pull_of_one_is_refused_and_leaves_nothing(material, tmp_path):
    with pytest.raises(
        SystemExit, match=r"weight decay / vbar has reached .* --weight_decay or --learning_rate is too"
    ):
        launch(*flags(material, tmp_path, *PULLED, "--weight_decay=100"))
    assert not (tmp_path / "out").exists()
    assert not kept(tmp_path)


def test_a_decay_of_zero_is_told(material, tmp_path, caplog):
    launch(*flags(material, tmp_path, *PULLED, "--weight_decay=0", "--train_steps=1"))
    assert "--weight_decay is 0, so nothing pulls" in caplog.text
