"""Directories appear under their final name when complete, replace others safely, and clean up when they fail."""

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from command import tree
from families import DTYPES, llama_config, random_weights, read_json
from safetensors import safe_open

from dppa_jax.checkpoint import CheckpointError, SafetensorsWriter, save_tree, unfinished
from dppa_jax.checkpoint.output import check_space
from dppa_jax.checkpoint.unfinished import MARK
from dppa_jax.runtime.files import write_whole

BF16 = np.dtype(DTYPES["bfloat16"])
TENSORS = {"a": ((8, 4), BF16), "b": ((4,), np.dtype(np.float32)), "c": ((16, 4), BF16)}
FAST = "--method=task_arithmetic"
SLOW = pytest.mark.slow


def open_writer(directory, **options):
    return SafetensorsWriter(directory, TENSORS, **options)


def write_all(writer):
    for name, (shape, dtype) in TENSORS.items():
        writer.write_rows(name, 0, np.full(shape, ord(name), dtype))


# ---- shards


@pytest.mark.parametrize("size", [*(pytest.param(size, marks=SLOW) for size in (1, 2048)), 10_000, 10**9])
def test_shards_hold_at_most_the_size_asked_for(merge, size):
    merge(FAST, f"--max_shard_size={size}")
    index = merge.output / "model.safetensors.index.json"
    files = sorted(merge.output.glob("*.safetensors"))
    found = {}
    for file in files:
        with safe_open(file, "np") as shard:
            assert shard.metadata() == {"format": "pt"}
            tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
        assert len(tensors) == 1 or sum(array.nbytes for array in tensors.values()) <= size
        found |= dict.fromkeys(tensors, file.name)
    assert found.keys() == random_weights(llama_config()).keys()
    if size == 10**9:
        assert [file.name for file in files] == ["model.safetensors"]
        assert not index.exists()
    else:
        names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
        assert [file.name for file in files] == names
        content = read_json(index)
        assert content["weight_map"] == found
        assert content["metadata"]["total_size"] == sum(a.nbytes for a in random_weights(llama_config()).values())


def test_rows_in_any_order(tmp_path):
    rows = np.arange(64, dtype=np.float32).reshape(16, 4).astype(BF16)
    with open_writer(tmp_path / "out") as writer:
        write_all(writer)
        for start in (12, 0, 8, 4):
            writer.write_rows("c", start, rows[start : start + 4])
        writer.commit({})
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        np.testing.assert_array_equal(file.get_tensor("c"), rows)


# ---- the final name


def test_nothing_has_a_final_name_before_commit(tmp_path):
    with open_writer(tmp_path / "out", max_shard_size=40) as writer:
        write_all(writer)
        assert not (tmp_path / "out").exists()
        unfinished = {path.name for path in tmp_path.rglob("*") if path.is_file()}
        assert unfinished - {MARK} == {f"model-0000{i}-of-00003.safetensors.incomplete" for i in (1, 2, 3)}
        writer.commit({})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_leaving_before_commit_removes_everything(tmp_path):
    def failing():
        with open_writer(tmp_path / "out") as writer:
            write_all(writer)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_cleared(merge):
    aside = merge.output.with_name("out.incomplete")
    (aside / "folder").mkdir(parents=True)
    (aside / "model-00007-of-00009.safetensors.incomplete").write_text("half")
    (aside / MARK).write_text("damaged")
    merge(FAST)
    assert not aside.exists()
    assert "model-00007-of-00009.safetensors.incomplete" not in os.listdir(merge.output)


def test_two_runs_to_one_place(tmp_path):
    with open_writer(tmp_path / "out") as first:
        write_all(first)
        with pytest.raises(CheckpointError, match=r"out\.incomplete is being written by another run"):
            open_writer(tmp_path / "out")
        first.commit({})
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]


# ---- replacing


def test_output_that_is_not_empty(merge):
    merge.output.mkdir()
    (merge.output / "notes.txt").write_text("mine")
    message = merge.refusal(FAST)
    assert f"{merge.output} is not empty; choose another --output, or --overwrite to replace it" in message


def test_empty_output_directory_is_used(merge):
    merge.output.mkdir()
    assert (merge(FAST) / "config.json").is_file()


def test_overwrite_replaces_a_model(merge):
    merge(FAST, "--max_shard_size=1")
    merge(FAST, "--overwrite")
    assert not list(merge.output.glob("model-*"))
    assert (merge.output / "model.safetensors").is_file()
    assert not [path for path in merge.root.iterdir() if path.name.startswith("out.")]


def test_overwrite_does_not_replace_what_is_no_model(merge):
    merge.output.mkdir()
    (merge.output / "thesis.tex").write_text("years of work")
    assert f"{merge.output} is not empty and holds no model (config.json of a model and its weights)" in merge.refusal(
        FAST, "--overwrite"
    )


def test_overwrite_does_not_replace_a_file(merge):
    merge.output.write_text("a file")
    assert f"{merge.output} is a file" in merge.refusal(FAST, "--overwrite")


def test_mount_points_cannot_be_replaced(merge):
    assert "/proc is a mount point" in merge.refusal(FAST, "--output=/proc", "--overwrite")


def test_output_that_is_a_link_replaces_where_it_leads(merge):
    merge(FAST)
    merge.output.rename(merge.root / "elsewhere")
    merge.output.symlink_to("elsewhere")
    merge(FAST, "--overwrite", "--max_shard_size=1")
    assert merge.output.is_symlink()
    assert (merge.root / "elsewhere" / "model.safetensors.index.json").is_file()


def test_old_directory_survives_a_failure_of_the_rename(merge, monkeypatch):
    merge(FAST)
    before = tree(merge.output)

    def failing(source, target):
        raise OSError(errno.EIO, "Input/output error", str(source))

    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "_exchange_at_once", failing)
        assert "Input/output error" in merge.failure(FAST, "--overwrite", "--coefficient=0.5")
    assert tree(merge.output) == before
    merge(FAST, "--overwrite", "--coefficient=0.5")
    assert tree(merge.output) != before


def test_old_directory_survives_a_failure_of_the_merge(merge):
    merge(FAST)
    (merge.law / "model.safetensors").unlink()
    assert "model.safetensors" in merge.refusal(FAST, "--overwrite")


def test_save_tree_does_not_replace_unasked(tmp_path):
    config = llama_config(num_hidden_layers=1)
    save_tree(tmp_path / "out", model_tree(), config)
    with pytest.raises(CheckpointError, match="out is not empty"):
        save_tree(tmp_path / "out", model_tree(), config)
    save_tree(tmp_path / "out", model_tree(), config, overwrite=True)


def test_save_tree_names_what_does_not_fit_its_config(tmp_path):
    config = llama_config(num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"the tree's model.norm.weight has shape \(31,\), config says \(32,\)"):
        save_tree(tmp_path / "out", {**model_tree(), "norm": np.ones(31, np.float32)}, config)
    with pytest.raises(CheckpointError, match="the tree has no lm_head, which config says the model has"):
        save_tree(tmp_path / "out", {k: v for k, v in model_tree().items() if k != "lm_head"}, config)
    with pytest.raises(CheckpointError, match=r"the tree's model.norm.weight is float64; weights must be float32"):
        save_tree(tmp_path / "out", {**model_tree(), "norm": np.ones(32)}, config)
    assert list(tmp_path.iterdir()) == []


def model_tree():
    weights = random_weights(llama_config(num_hidden_layers=1), dtype="float32")
    found = {"layers": {"self_attn": {}, "mlp": {}}}
    for name, array in weights.items():
        *parents, leaf, _ = name.removeprefix("model.").replace("layers.0", "layers").split(".")
        node = found
        for parent in parents:
            node = node[parent]
        node[leaf] = array[None] if parents else array
    return found


# ---- full disks


@contextmanager
def largest_file(size: int):
    """No file of this process may grow beyond `size`: what a full disk looks like, without one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("flags", [[], pytest.param(["--save_delta={}/deltas"], marks=SLOW)], ids=str)
def test_disk_full_while_writing(merge, flags):
    flags = [flag.format(merge.root) for flag in flags]
    merge(FAST, *flags)  # compiled now: the limit below is for the output alone
    shutil.rmtree(merge.output)
    shutil.rmtree(merge.root / "deltas", ignore_errors=True)
    (merge.root / "deltas").mkdir()
    with largest_file(30_000):
        message = merge.failure(FAST, *flags)
    written = rf"writing model\.\S+ to {merge.root}/\S+\.incomplete failed: File too large\. What is written stays"
    assert re.search(written, message)
    assert re.search(r"needs 0\.\d+ GB: make room", message)
    assert not merge.output.exists()
    merge(FAST, *flags)
    assert not list(merge.root.glob("**/*.incomplete"))


def test_disk_full_while_writing_the_last_files(tmp_path):
    def write():
        with open_writer(tmp_path / "out") as writer:
            write_all(writer)
            writer.commit({}, texts={"recipe.json": "x" * 10_000})

    with largest_file(5000), pytest.raises(OSError, match=r"writing the last files to .* failed: File too large"):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [[], ["--save_delta={}/deltas"]], ids=str)
def test_disk_too_full_is_seen_before_writing(merge, monkeypatch, flags):
    """One model in bfloat16, and twice its bytes in float32 for each of two deltas."""
    needed = sum(array.nbytes for array in random_weights(llama_config()).values()) * (5 if flags else 1)
    usage = shutil.disk_usage(merge.root)._replace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = merge.refusal(FAST, *(flag.format(merge.root) for flag in flags))
    assert f"{merge.root} has 0.00 GB free, the output needs 0.00 GB. Make room" in message


def test_room_is_looked_at_while_another_process_writes_its_mark(tmp_path):
    """Process 0 of several may be writing its mark, under another name first, when process 1 adds up what is there."""
    aside, done = tmp_path / "out.incomplete", threading.Event()
    aside.mkdir()

    def write() -> None:
        while not done.is_set():
            write_whole(aside / MARK, b"{}")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(3000):
            check_space({tmp_path / "out": 1})
    finally:
        done.set()
        writer.join()


# ---- interrupted runs

STALLING = """
import time
from dppa_jax import launch
from dppa_jax.checkpoint import SafetensorsWriter

write_rows = SafetensorsWriter.write_rows

def slowly(self, *arguments):
    write_rows(self, *arguments)
    print("wrote", arguments[0], flush=True)
    time.sleep(0.3)

SafetensorsWriter.write_rows = slowly
launch.run()
"""


@pytest.mark.parametrize("name", [pytest.param("SIGKILL", marks=SLOW), "SIGTERM", pytest.param("SIGINT", marks=SLOW)])
def test_interrupted_while_writing(merge, name):
    transformers = pytest.importorskip("transformers")
    run = subprocess.Popen(
        [sys.executable, "-c", STALLING, *merge.flags(), FAST],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with run:
        assert run.stdout.readline().startswith("wrote model."), run.stderr.read()
        run.send_signal(getattr(signal, name))
        said = run.communicate(timeout=60)[1]
    assert run.returncode == {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 1}[name], said

    aside = merge.output.with_name("out.incomplete")
    assert not merge.output.exists()
    assert "model.safetensors.incomplete" in [path.name for path in aside.iterdir()], "what a second run goes on with"
    for left in (merge.output, aside):
        with pytest.raises((OSError, ValueError)):
            transformers.AutoModelForCausalLM.from_pretrained(left, local_files_only=True)

    assert "recipe.json" in tree(merge(FAST)), "a second run succeeds"
    assert not aside.exists()
