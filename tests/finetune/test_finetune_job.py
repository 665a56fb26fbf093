"""--job=finetune from the command line: an expert out of a checkpoint and files of examples, whatever interrupts it."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from command import Merge, launch
from training import STEPS, WEIGHTS, flags, kept, stop_before_writing

from dppa_jax.finetune.data import read_examples


@pytest.fixture(scope="module")
def undisturbed(material, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    launch(*flags(material, root, "--eval_every=10"))
    return root


def loss_by_transformers(model: Path, file: Path) -> float:
    """Of the completions, an example at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    total = count = 0.0
    for prompt, completion in read_examples(file):
        text = torch.tensor([[*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]])
        start = len(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            shares = torch.log_softmax(network(text).logits[0, start - 1 : -1].double(), -1)
        total -= float(shares.gather(1, text[0, start:, None]).sum())
        count += text.shape[1] - start
    return total / count


# ---- the expert


def test_the_expert_loads_in_transformers_and_knows_more_than_the_base(material, undisturbed):
    before, after = (
        loss_by_transformers(at, material / "eval.jsonl") for at in (material / "base", undisturbed / "out")
    )
    assert after < 0.6 * before


def test_the_loss_on_eval_data_is_that_of_transformers(material, undisturbed):
    log = json.loads((undisturbed / "out/finetune.json").read_text())["log"]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [10, 20, 30]
    wanted = loss_by_transformers(undisturbed / "out", material / "eval.jsonl")
    assert log[-1]["eval_loss"] == pytest.approx(wanted, rel=1e-5)


def test_the_record_says_how_it_was_made(material, undisturbed):
    record = json.loads((undisturbed / "out/finetune.json").read_text())
    assert record["flags"]["learning_rate"] == 3e-3
    assert record["training"]["steps"] == STEPS
    assert record["base"]["where"] == f"{material}/base"
    assert all(entry["tokens_per_second"] > 0 and math.isfinite(entry["loss"]) for entry in record["log"])


def test_nothing_is_left_beside_the_expert(undisturbed):
    assert [path.name for path in undisturbed.iterdir() if path.name != "runs"] == ["out"]
    assert not list((undisturbed / "runs").iterdir())


@pytest.mark.slow
def test_bfloat16_with_parts_and_remat_in_single_rows_learns_as_well(material, tmp_path):
    launch(*flags(material, tmp_path, "--train_dtype=bfloat16", "--remat", "--accumulate=2", "--nopack", "--epochs=1"),
           "--output_dtype=bfloat16", "--checkpoint_every=0")  # fmt: skip
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    before, after = (loss_by_transformers(at, material / "eval.jsonl") for at in (material / "base", tmp_path / "out"))
    assert after < 0.6 * before
    assert not (tmp_path / "runs").exists()


# ---- interruptions


def started(given: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "dppa_jax.launch", *given]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def until(run: subprocess.Popen, condition, seconds: float = 240) -> None:
    """Wait for it as closely as a file system lets one."""
    end = time.monotonic() + seconds
    while not condition():
        assert run.poll() is None, run.stderr.read()
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.002)


def weights(root: Path) -> bytes:
    return (root / "out" / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(material, undisturbed, tmp_path):
    given = flags(material, tmp_path, "--checkpoint_every=3", "--eval_every=10")
    with started(given) as run:
        until(run, lambda: kept(tmp_path))
        time.sleep(random.random() / 2)
        run.kill()
    assert not (tmp_path / "out").exists()
    before = kept(tmp_path)
    with started(given) as run:
        said = run.stderr.read()
    assert run.returncode == 0, said
    assert f"goes on after step {before[-1]}" in said
    assert weights(tmp_path) == weights(undisturbed)
    assert not kept(tmp_path)


@pytest.mark.slow
def test_a_terminated_run_keeps_where_it_was_and_another_mesh_goes_on(material, undisturbed, tmp_path, caplog):
    given = flags(material, tmp_path, "--checkpoint_every=1000", "--eval_every=10", "--train_steps=30")
    with started(given) as run:
        until(run, lambda: list(tmp_path.glob("runs/*")))
        for line in run.stderr:
            if "step 10 of" in line:
                break
        run.send_signal(signal.SIGTERM)
        said = run.stderr.read()
    assert run.returncode == 128 + signal.SIGTERM, said
    (step,) = kept(tmp_path)
    assert f"kept the state after step {step}" in said
    assert 10 <= step < STEPS
    with caplog.at_level("INFO", "absl"):
        launch(*given, "--mesh=data=2,fsdp=2")
    assert f"goes on after step {step}" in caplog.text
    from safetensors.numpy import load_file

    found, wanted = (load_file(root / "out" / WEIGHTS) for root in (tmp_path, undisturbed))
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-4, err_msg=name)


@pytest.mark.parametrize("changed", ["--learning_rate=1e-3", "data"])
def test_a_change_starts_anew(material, tmp_path, caplog, monkeypatch, changed):
    data = tmp_path / "own.jsonl"
    data.write_text((material / "train.jsonl").read_text())
    given = flags(material, tmp_path, f"--train_data={data}", "--train_steps=6", "--checkpoint_every=2")
    stop_before_writing(monkeypatch, given)
    assert kept(tmp_path)
    if changed == "data":
        data.write_text(data.read_text().replace("1", "2", 1))
    else:
        given.append(changed)
    with caplog.at_level("INFO", "absl"):
        launch(*given)
    assert "goes on" not in caplog.text
    log = json.loads((tmp_path / "out/finetune.json").read_text())["log"]
    assert [entry["step"] for entry in log] == [2, 4, 6]


def test_the_same_command_goes_on(material, tmp_path, caplog, monkeypatch):
    """So that the tests above say something."""
    given = flags(material, tmp_path, "--train_steps=6", "--checkpoint_every=2")
    stop_before_writing(monkeypatch, given)
    with caplog.at_level("INFO", "absl"):
        launch(*given)
    assert "goes on after step 4" in caplog.text


@pytest.mark.slow
def test_two_runs_of_the_same_do_not_share_their_checkpoints(material, tmp_path):
    given = flags(material, tmp_path, "--train_steps=100000")
    with started(given) as run:
        until(run, lambda: kept(tmp_path))
        with pytest.raises(SystemExit, match="is in use by another run"):
            launch(*given)
        run.kill()


# ---- refusals


@pytest.fixture
def refusal(material, tmp_path):
    """refusal(*flags) is the message of a run that writes nothing."""
    root = tmp_path / "work"
    root.mkdir()

    def of(*given: str) -> str:
        return Merge(root).refusal(of=[*flags(material, root), *given])

    return of


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--base=", "--base is empty: give the model to fine-tune"),
        ("--output=", "--output is empty"),
        ("--train_data=", "--train_data is empty: give files of examples"),
        ("--train_data=nowhere.jsonl", "nowhere.jsonl"),
        ("--eval_data=nowhere.jsonl", "nowhere.jsonl"),
        ("--base=nowhere", "nowhere: no such directory"),
        ("--train_steps=-1", "--train_steps=-1"),
        ("--train_steps=0 --epochs=0", "--epochs=0, --train_steps=0: one of them must be above 0"),
        ("--train_batch_size=0", "--train_batch_size=0: it must be 1 or more"),
        ("--accumulate=3", "--accumulate=3: --train_batch_size=4 must be a multiple of it"),
        ("--train_length=1", "--train_length=1: a row has at least 2 tokens"),
        ("--train_length=2", "--train_length=2: no completion begins within a row"),
        ("--train_dtype=float16", "--train_dtype=float16: not one of float32, bfloat16"),
        ("--output_dtype=float61", "--output_dtype=float61: not one of"),
        ("--warmup=2", "--warmup=2.0: outside [0, 1]"),
        ("--learning_rate=-1", "--learning_rate=-1.0"),
        ("--weight_decay=-1", "--weight_decay=-1.0"),
        ("--max_gradient_norm=0", "--max_gradient_norm=0.0"),
        ("--checkpoint_every=-1", "--checkpoint_every=-1"),
        ("--eval_every=-5", "--eval_every=-5"),
        ("--mesh=layer=2", "--mesh=layer=2: 'layer=2' is not data=N or fsdp=N"),
        ("--mesh=data=64", "--mesh=data=64 asks for 64 devices"),
        ("--mesh=data=3", "must be a multiple of the 3 devices"),
        ("--evaluate=addition,gsm9k", "--evaluate=gsm9k: not one of"),
    ],
)
def test_a_bad_flag_is_refused_before_anything_is_written(refusal, given, message):
    assert message in refusal(*given.split())


def test_a_malformed_line_is_named_with_its_file(refusal, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n')
    assert "bad.jsonl:2 is not JSON" in refusal(f"--train_data={tmp_path}/bad.jsonl")


def test_an_empty_file_is_refused(refusal, tmp_path):
    (tmp_path / "none.jsonl").write_text("")
    assert "none.jsonl: no examples" in refusal(f"--train_data={tmp_path}/none.jsonl")


def test_completions_that_end_where_no_answer_does_are_told(material, tmp_path, caplog):
    base = tmp_path / "base"
    shutil.copytree(material / "base", base)
    (base / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    with pytest.raises(SystemExit, match="no completion begins within a row"):
        launch(*flags(material, tmp_path, f"--base={base}", "--train_length=2"))
    assert f"{base}: completions end with the token 2 of its tokenizer, but its answers with 5 or 6" in caplog.text


def test_an_output_that_holds_something_is_refused(refusal, material):
    assert "is not empty" in refusal(f"--output={material}")


def test_the_base_is_not_overwritten(refusal, material):
    assert "are the same or one contains the other" in refusal(f"--output={material}/base", "--overwrite")


@pytest.mark.parametrize("asked", ["{}", "Read this.\n{}\nNow answer."])
@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_held_out_item_is_refused_by_its_id_also_within_other_words(refusal, tmp_path, split, asked):
    from dppa_jax.config.evaluation import TaskOptions
    from dppa_jax.evaluate.tasks import TASKS

    item = TASKS["addition"].items(TaskOptions(), split)[42]
    leak = json.dumps({"prompt": asked.format(item.prompt), "completion": " 7"})
    (tmp_path / "leak.jsonl").write_text(f'{{"prompt": "a", "completion": "b"}}\n{leak}\n')
    message = refusal(f"--train_data={tmp_path}/leak.jsonl", "--evaluate=addition,trend", "--limit=3")
    assert f"the {split} item '{item.id}' of addition" in message


def test_a_loss_that_is_not_finite_ends_the_run(material, tmp_path):
    with pytest.raises(SystemExit, match=r"the loss is (nan|inf) at step \d+: --learning_rate is too high"):
        launch(*flags(material, tmp_path, "--learning_rate=1e30", "--checkpoint_every=0"))
    assert not (tmp_path / "out").exists()
