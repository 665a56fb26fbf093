"""Fine-tuning with adapters: factors learn as the gradients of the weights say, and peft loads what is written."""

import json
import os
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import launch
from jax.sharding import Mesh
from safetensors.numpy import load_file
from small_models import model_of
from training import SMALL, STEPS, flags, kept

from dppa_jax.config.finetune import AdamW, Lora, TrainConfig
from dppa_jax.finetune.data import Rows, batches
from dppa_jax.finetune.lora import first_factors, trained_tree, whole_tree, with_targets
from dppa_jax.finetune.train import TRAIN_AXES, State, Trainer, loss_sums
from dppa_jax.model import DecoderConfig, forward, init_tree
from dppa_jax.where import load

LORA = Lora(rank=4, alpha=6, targets=("q_proj", "down_proj"))
OPTIONS = TrainConfig(steps=5, learning_rate=1e-2, batch_size=8, lora=LORA)
GIVEN = ("--lora_rank=4", "--lora_alpha=8")


@pytest.fixture(scope="module")
def base() -> dict:
    return init_tree(SMALL, jax.random.key(0), stddev=0.2)


@pytest.fixture(scope="module")
def written(material, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("written")
    launch(*flags(material, root, *GIVEN, "--learning_rate=2e-2"))
    return root


def factors_of(seed: int = 0) -> dict:
    """Factors of which none is zero."""
    return jax.tree.map(lambda factor: factor + 0.1, first_factors(SMALL, LORA, seed))


def merged(base: dict, factors: dict) -> dict:
    """The base with W + scale · B · A in place of W."""
    tree = jax.tree.map(lambda weight: weight, base)
    for block, name in (("self_attn", "q_proj"), ("mlp", "down_proj")):
        a, b = (factors["layers"][block][f"{name}_lora_{letter}"] for letter in "ab")
        tree["layers"][block][name] = tree["layers"][block][name] + 6 / 4 * jnp.einsum("lor,lri->loi", b, a)
    return tree


def leaves(tree: dict) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


# ---- the factors


def test_factors_compute_what_the_merged_weights_compute(base, rows):
    found = forward(SMALL, whole_tree(base, factors_of(), LORA), rows.tokens)
    np.testing.assert_allclose(found, forward(SMALL, merged(base, factors_of()), rows.tokens), atol=2e-5)


def test_gradients_of_factors_are_those_of_the_weights(base, rows):
    loss = lambda tree: loss_sums(SMALL, tree, rows)[0]  # noqa: E731
    found = jax.grad(lambda factors: loss(whole_tree(base, factors, LORA)))(factors_of())
    wanted = jax.grad(lambda factors: loss(merged(base, factors)))(factors_of())
    for one, other in zip(leaves(found), leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max())
        assert np.abs(other).max() > 0


def test_scale():
    assert replace(LORA, rank=16, alpha=10).scale == 10 / 16
    assert replace(LORA, rank=16, alpha=10, rslora=True).scale == 2.5


def test_nothing_changes_before_the_first_step_and_the_base_never(base, rows):
    trainer = Trainer(SMALL, OPTIONS, base=base)
    state = trainer.start(base)
    before = trainer.loss(state, rows)
    total, count = loss_sums(SMALL, base, rows)
    assert before == pytest.approx(float(total / count), rel=1e-6)
    kept = [leaf.copy() for leaf in leaves(trainer._anchor)]
    for step, batch in enumerate(batches(rows.count, 8, 5, 0)):
        state, _ = trainer.step(state, step, rows.take(batch))
    assert trainer.loss(state, rows) < before
    assert all(np.array_equal(a, b) for a, b in zip(kept, leaves(trainer._anchor), strict=True))
    assert [leaf.shape for leaf in leaves(state.tree)] == [leaf.shape for leaf in leaves(first_factors(SMALL, LORA, 0))]


def on_mesh(base: dict, rows: Rows, data: int, fsdp: int) -> tuple[State, list[float]]:
    mesh = Mesh(np.array(jax.devices()[: data * fsdp]).reshape(data, fsdp), TRAIN_AXES)
    trainer = Trainer(SMALL, OPTIONS, mesh, base)
    state, losses = trainer.start(base), []
    for step, batch in enumerate(batches(rows.count, 8, 5, 0)):
        state, loss = trainer.step(state, step, rows.take(batch))
        losses.append(float(loss))
    return state, losses


def test_devices_give_the_losses_of_one_and_hold_their_shares(base, rows):
    _, wanted = on_mesh(base, rows, 1, 1)
    state, found = on_mesh(base, rows, 2, 2)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    factor = state.tree["layers"]["self_attn"]["q_proj_lora_a"]
    assert factor.addressable_shards[0].data.size == factor.size / 2


# ---- the job


def test_the_adapter_is_read_as_the_expert_that_was_trained(material, written):
    log = json.loads((written / "out/finetune.json").read_text())["log"]
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]
    config = json.loads((written / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8, "LORA")
    assert config["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    names = {path.name for path in (written / "out").iterdir()}
    assert {"adapter_model.safetensors", "tokenizer.json", "finetune.json"} < names
    assert not {"config.json", "model.safetensors"} & names
    again = written / "again"
    launch(*flags(material, again, "--learning_rate=0", "--train_steps=1", f"--base={material}/base+{written}/out"))
    first = json.loads((again / "out/finetune.json").read_text())["log"][0]
    assert first["eval_loss"] == pytest.approx(log[-1]["eval_loss"], rel=1e-5)


def test_peft_loads_it_and_computes_the_same(material, written):
    peft = pytest.importorskip("peft", reason="peft is not installed: nobody else reads the adapter that was trained")
    import torch
    from transformers import AutoModelForCausalLM

    network = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(material / "base"), written / "out")
    tokens = np.arange(3, 15)[None]
    with torch.no_grad():
        wanted = network(torch.tensor(tokens)).logits.numpy()
    model = load(f"{material / 'base'}+{written / 'out'}")
    found = forward(DecoderConfig.from_hf(model.config), model.tree, tokens)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert np.abs(wanted).max() > 0.1


@pytest.mark.slow
def test_a_run_that_stopped_goes_on_to_the_same_bits(material, written, tmp_path, monkeypatch):
    def fail(*given):
        raise OSError("the disk is full")

    given = flags(material, tmp_path, *GIVEN, "--learning_rate=2e-2")
    with monkeypatch.context() as patch:
        patch.setattr("dppa_jax.jobs.finetune.write_adapter", fail)
        with pytest.raises(SystemExit, match="the disk is full"):
            launch(*given)
    assert kept(tmp_path)[-1] == STEPS - 5
    launch(*given)
    name = "out/adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (written / name).read_bytes()
    before = os.stat(tmp_path / "out").st_ino
    launch(*given, "--overwrite", "--lora_rank=2", "--lora_targets=v_proj", "--lora_rslora", "--output_dtype=bfloat16")
    tensors = load_file(tmp_path / name)
    assert {name.split(".")[-3] for name in tensors} == {"v_proj"}
    assert {tensor.dtype.name for tensor in tensors.values()} == {"bfloat16"}
    assert os.stat(tmp_path / "out").st_ino != before


@pytest.mark.slow
def test_evaluation_is_that_of_the_whole_model(material, written, tmp_path):
    adapter, whole = written / "out", tmp_path / "whole"
    launch("--job=convert", f"--base={material}/base+{adapter}", f"--output={whole}")
    asked = {}
    for name, place in (("adapter", adapter), ("whole", whole)):
        for job in ("evaluate", "merge"):
            work = tmp_path / f"{job}-{name}"
            given = [f"--base={material}/base", f"--expert=math={place}", f"--workdir={work}"]
            if job == "merge":
                given += ["--method=ties", "--rate=0.5", f"--output={work / 'out'}"]
            launch(f"--job={job}", *given, "--evaluate=addition", "--limit=6", "--max_new_tokens=4")
            files = sorted((work / "responses").rglob("*.jsonl"))
            asked[job, name] = sorted(tuple(responses(file)) for file in files)
    assert len(asked["merge", "whole"]) == 3
    for job in ("evaluate", "merge"):
        assert asked[job, "adapter"] == asked[job, "whole"]


def responses(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if "weights" not in line]


# ---- refusals


def test_what_is_refused(material, tmp_path):
    def refusal(*given) -> str:
        with pytest.raises(SystemExit) as error:
            launch(*flags(material, tmp_path, *given))
        return error.value.code

    assert "--lora_targets=q_pro: not one of q_proj, " in refusal("--lora_rank=4", "--lora_targets=q_pro")
    assert "give its --lora_rank, too" in refusal("--lora_targets=q_proj")
    assert "an adapter has no weights of a base" in refusal("--lora_rank=4", "--decay_toward=base")
    assert "--lora_rank=-1" in refusal("--lora_rank=-1")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="the trainer is given no base"):
        Trainer(SMALL, OPTIONS)
    with pytest.raises(ValueError, match="leave --decay_toward"):
        replace(OPTIONS, optimizer=AdamW(decay_toward="base"))


def test_linears_that_peft_knows_under_another_name():
    config = model_of("Phi3", 0).config.to_dict()
    assert with_targets(Lora(rank=2), config).targets == ("o_proj", "down_proj")
    with pytest.raises(ValueError, match=r"q_proj: it is a part of self_attn\.qkv_proj\.weight"):
        with_targets(Lora(rank=2, targets=("q_proj",)), config)
    mixture = model_of("Mixtral", 0).config.to_dict()
    assert with_targets(Lora(rank=2), mixture).targets == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert "mlp" not in trained_tree(DecoderConfig.from_hf(mixture), Lora(rank=2))["layers"]
