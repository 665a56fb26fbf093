"""AdamR: the authors' steps, one sum on any mesh, the trainer and the job, and experts that survive DARE."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from command import launch
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file
from training import SMALL, WEIGHTS, flags, kept, random_rows, stop_before_writing

import dppa_jax
from dppa_jax.checkpoint import save_tree
from dppa_jax.config.evaluation import EvaluationConfig, TaskOptions
from dppa_jax.config.finetune import AdamW, TrainConfig
from dppa_jax.config.run import EvaluateConfig
from dppa_jax.demo.family import FINE_TUNING, MAX_LENGTH, examples
from dppa_jax.demo.text import TASKS
from dppa_jax.demo.tokenizer import Encoder
from dppa_jax.finetune.data import Rows, batches, encode
from dppa_jax.finetune.optimizer import PullError, ordered_sum, pull_of, root_mean, scale_by_adamr
from dppa_jax.finetune.train import TRAIN_AXES, Trainer, train
from dppa_jax.jobs.evaluate import run_evaluate
from dppa_jax.model import DecoderConfig, init_tree
from dppa_jax.where import load_tree

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


# ---- the trainer


ADAMR = AdamW(weight_decay=0.4, decay_toward="base", max_gradient_norm=float("inf"))


OPTIONS = TrainConfig(steps=5, learning_rate=1e-2, batch_size=8, optimizer=ADAMR)


PULLED = ("--train_steps=6", "--checkpoint_every=2", "--decay_toward=base", "--weight_decay=0.02")


@pytest.fixture(scope="module")
def rows() -> Rows:
    return random_rows()


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_pull_of_one_is_refused_and_leaves_nothing(material, tmp_path):
    with pytest.raises(
        SystemExit, match=r"weight decay / vbar has reached .* --weight_decay or --learning_rate is too"
    ):
        launch(*flags(material, tmp_path, *PULLED, "--weight_decay=100"))
    assert not (tmp_path / "out").exists()
    assert not kept(tmp_path)


@pytest.mark.slow
def test_a_decay_of_zero_is_told(material, tmp_path, caplog):
    launch(*flags(material, tmp_path, *PULLED, "--weight_decay=0", "--train_steps=1"))
    assert "--weight_decay is 0, so nothing pulls" in caplog.text


# ---- the law expert of the demo family


SEEDS = (0, 1, 2)


DECAYS = {"without": AdamW(), "pulled": AdamW(weight_decay=0.03, decay_toward="base")}


@pytest.mark.slow
def test_7_deltas_of_adamr_are_half_as_large_and_survive_dare_where_others_do_not(trained: Path, tmp_path):
    base = trained / "base"
    hf_config, tree = load_tree(base)
    rows = encode(examples("law", 0), Encoder(base), MAX_LENGTH)
    models, sizes = {}, {}
    for name, optimizer in DECAYS.items():
        expert, _ = train(DecoderConfig.from_hf(hf_config), tree, rows, replace(FINE_TUNING, optimizer=optimizer))
        deltas = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).ravel(), expert, tree)
        sizes[name] = np.concatenate(jax.tree.leaves(deltas)).mean()
        models[name] = str(tmp_path / name)
        save_tree(tmp_path / name, jax.tree.map(np.asarray, expert), hf_config, base)
        for seed in SEEDS:
            opened = {"law": dppa_jax.load(models[name])}
            models[f"{name} {seed}"] = str(tmp_path / f"{name}-{seed}")
            merged = dppa_jax.merge(dppa_jax.load(str(base)), opened, "dare", rate=0.9, seed=seed)
            dppa_jax.save(merged, models[f"{name} {seed}"])
    evaluation = EvaluationConfig(tuple(TASKS["law"]), options=TaskOptions(limit=150))
    scores = run_evaluate(EvaluateConfig(models, evaluation, workdir=str(tmp_path / "runs")))
    found = {name: 100 * np.mean([score.accuracy for score in one.values()]) for name, one in scores.items()}
    dare = {name: np.mean([found[f"{name} {seed}"] for seed in SEEDS]) for name in DECAYS}
    assert found["pulled"] >= 97
    assert sizes["pulled"] < 0.6 * sizes["without"]
    assert dare["pulled"] >= dare["without"] + 20
