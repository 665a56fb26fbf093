"""Inputs that are written to during a run, or between a run that was killed and the next."""

import os
import shutil
from pathlib import Path

import pytest
from command import Merge, launch, tree

from dppa_jax.checkpoint.safetensors_writer import SafetensorsWriter
from dppa_jax.runtime import signals

FAST = "--method=task_arithmetic"


def rewrite(file: Path) -> None:
    """Another content, of the same size and the same time of writing: only inode or time of change tell."""
    stat, raw = file.stat(), bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def replace(file: Path) -> None:
    """The same content in another file, as a download writes it."""
    shutil.copy2(file, file.with_name("aside"))
    file.with_name("aside").rename(file)


def after_some_rows(monkeypatch, act) -> None:
    """Act once when a part of the output is written."""
    write_rows, left = SafetensorsWriter.write_rows, [5]

    def then(self, *arguments):
        write_rows(self, *arguments)
        left[0] -= 1
        if not left[0]:
            act()

    monkeypatch.setattr(SafetensorsWriter, "write_rows", then)


@pytest.mark.parametrize("change", [rewrite, replace])
@pytest.mark.parametrize("job", ["merge", "convert"])
def test_input_that_is_written_to_during_the_run(merge, monkeypatch, change, job):
    file = (merge.base if job == "convert" else merge.law) / "model.safetensors"
    after_some_rows(monkeypatch, lambda: change(file))
    of = ["--job=convert", f"--base={merge.base}", f"--output={merge.output}"] if job == "convert" else None
    message = merge.failure(*([] if of else [FAST]), of=of)
    assert f"{file} of {'base' if of else 'law'!r} was written to or replaced during the run" in message
    assert [path.name for path in merge.root.iterdir() if path.name.startswith("out")] == []


def test_input_that_was_changed_after_a_kill_starts_the_merge_anew(merge, monkeypatch):
    with monkeypatch.context() as patch:
        after_some_rows(patch, lambda: signals.stop(SystemExit(143)))
        with pytest.raises(SystemExit):
            merge(FAST)
        signals._received.clear()
    assert merge.output.with_name("out.incomplete").is_dir()
    rewrite(merge.law / "model.safetensors")
    merge(FAST)
    launch(*merge.flags(), FAST, f"--output={merge.root / 'other'}")
    name = "model.safetensors"
    assert tree(merge.output)[name] == tree(merge.root / "other")[name]


def test_output_that_someone_made_during_the_merge(merge: Merge, monkeypatch):
    with monkeypatch.context() as patch:
        after_some_rows(patch, lambda: shutil.copytree(merge.law, merge.output))
        message = merge.failure(FAST)
    assert f"{merge.output} came to stand there during the run" in message
    assert tree(merge.output) == tree(merge.law)
    shutil.rmtree(merge.output)
    merge(FAST)
    assert not list(merge.root.glob("*.incomplete"))
