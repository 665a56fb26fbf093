"""Outputs get their names all or none, whenever a run is killed; what is not ours is never emptied or followed."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from command import tree

from dppa_jax.checkpoint import CheckpointError, output, unfinished
from dppa_jax.checkpoint.output import TakenError, Unfinished, output_directory, publish
from dppa_jax.checkpoint.unfinished import MARK

NAMES = ("delta", "merged")  # the main output last
CALLS = {"os.rename": (os, "rename"), "os.unlink": (os, "unlink"), "exchange": (unfinished, "_exchange_at_once")}


class Killed(BaseException):
    """Ends a run where no handler of an Exception sees it."""


def no_exchange(new, old):
    raise OSError(errno.EINVAL, "not on this file system")


def killed_at(monkeypatch, step: int) -> None:
    """Raise Killed in place of the call number `step` of those that change names."""
    left = [step]

    def counted(function):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return function(*arguments, **options)

        return call

    for module, name in CALLS.values():
        monkeypatch.setattr(module, name, counted(getattr(module, name)))


def write_model(directory: Path, content: str) -> None:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "model.safetensors").write_text(content)


def run(root: Path, content: str, overwrite: bool = True) -> None:
    """What a job does: claim, write, publish; a rerun of the same identity goes on from what is there."""
    claimed = []
    try:
        for name in NAMES:
            claimed.append(Unfinished(output_directory(root / name, overwrite), identity=content))
            if not claimed[-1].resumed:
                (claimed[-1].path / "model.safetensors").write_text(content)
                (claimed[-1].path / "rows-0.jsonl").write_text("notes")
            assert (claimed[-1].path / "model.safetensors").read_text() == content
            (claimed[-1].path / "config.json").write_text('{"model_type": "llama"}')
        publish(claimed, overwrite)
    finally:
        for one in claimed:
            one.close()


@pytest.mark.parametrize("at_once", [True, False], ids=["exchange", "three renames"])
@pytest.mark.parametrize("there", [True, False], ids=["replaced", "new"])
def test_killed_at_every_step_nothing_is_lost_and_a_rerun_goes_on(tmp_path, monkeypatch, at_once, there):
    steps = 0
    while True:
        steps += 1
        root = tmp_path / str(steps)
        for name in NAMES if there else ():
            write_model(root / name, "old")
        with monkeypatch.context() as patch:
            if not at_once:
                patch.setattr(unfinished, "_exchange_at_once", no_exchange)
            killed_at(patch, steps)
            try:
                run(root, "new")
            except Killed:
                pass
            else:
                break
        for name in NAMES:
            found = {file.parent.name: file.read_text() for file in root.glob(f"{name}*/model.safetensors")}
            assert "new" in found.values() or not there or found[name] == "old"
            assert not there or name not in found or found[name] in ("old", "new")
        with monkeypatch.context() as patch:
            if not at_once:
                patch.setattr(unfinished, "_exchange_at_once", no_exchange)
            run(root, "new")
        assert sorted(path.name for path in root.iterdir()) == sorted(NAMES)
        for name in NAMES:
            assert sorted(path.name for path in (root / name).iterdir()) == ["config.json", "model.safetensors"]
            assert (root / name / "model.safetensors").read_text() == "new"
    assert steps > 4


def test_deltas_that_have_their_names_are_taken_up_by_the_same_command_without_overwrite(tmp_path, monkeypatch):
    rename = os.rename

    def killed_after(new, old):
        rename(new, old)
        raise Killed

    monkeypatch.setattr(os, "rename", killed_after)
    with pytest.raises(Killed):
        run(tmp_path, "new", overwrite=False)
    monkeypatch.undo()
    assert (tmp_path / "delta").is_dir()
    assert not (tmp_path / "merged").exists()
    run(tmp_path, "new", overwrite=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        *((name, place) for name in ("out", "out.incomplete") for place in ("link", "file", "files of the user")),
        ("out", "mark of another directory"),
    ],
)
def test_what_is_not_ours_is_refused_and_stays(tmp_path, name, place):
    mine, at = tmp_path / "mine", tmp_path / name
    write_model(mine, "mine")
    if place == "link":
        at.symlink_to(mine)
    elif place == "file":
        at.write_text("mine")
    else:
        shutil.copytree(mine, at)
        if place == "mark of another directory":
            (at / MARK).write_text(json.dumps({"inode": 1, "outputs": [str(at)], "old": 2}))
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match="out"):
        output_directory(tmp_path / "out")
    assert tree(tmp_path) == before


def test_a_link_that_is_put_in_place_after_the_check_is_not_followed(tmp_path):
    directory = output_directory(tmp_path / "out")
    write_model(tmp_path / "mine", "mine")
    (tmp_path / "out.incomplete").symlink_to(tmp_path / "mine")
    with pytest.raises(CheckpointError, match=r"is a link to .*mine in place of a directory"):
        Unfinished(directory)
    assert (tmp_path / "mine" / "model.safetensors").read_text() == "mine"


def test_directory_of_another_user_is_not_taken_over(tmp_path, monkeypatch):
    (tmp_path / "out.incomplete").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    for refused in (output_directory, Unfinished):
        with pytest.raises(CheckpointError, match=r"out.incomplete belongs to another user \(uid \d+\)"):
            refused(tmp_path / "out")


def test_directory_that_is_swapped_for_another_during_the_run_is_not_published(tmp_path):
    claimed = Unfinished(output_directory(tmp_path / "out"))
    claimed.path.rename(tmp_path / "away")
    write_model(claimed.path, "of another")
    with pytest.raises(CheckpointError, match="moved or replaced during the run"):
        publish([claimed])
    claimed.remove()
    assert (claimed.path / "model.safetensors").read_text() == "of another"


@pytest.mark.parametrize("what", ["directory", "file"])
def test_output_that_someone_made_during_the_run_stays_beside_ours(tmp_path, what):
    claimed = Unfinished(output_directory(tmp_path / "out"), "identity")
    (claimed.path / "model.safetensors").write_text("new")
    if what == "file":
        (tmp_path / "out").write_text("mine")
    else:
        write_model(tmp_path / "out", "mine")
    before = tree(tmp_path / "out") if what == "directory" else "mine"
    with pytest.raises(TakenError, match=r"kept in .*out\.incomplete. Move .*out away and repeat"):
        publish([claimed])
    assert (tree(tmp_path / "out") if what == "directory" else (tmp_path / "out").read_text()) == before
    assert (claimed.path / "model.safetensors").read_text() == "new"


@pytest.mark.parametrize("config", ['{"editor": "vim"}', "[]", "no JSON"])
def test_overwrite_replaces_no_directory_whose_config_is_no_models(tmp_path, config):
    write_model(tmp_path / "out", "mine")
    (tmp_path / "out" / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match="holds no model"):
        output_directory(tmp_path / "out", overwrite=True)


def test_parent_that_may_not_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(output.os, "access", lambda path, mode: False)
    with pytest.raises(CheckpointError, match=rf"written beside its name first, and {tmp_path} may not be written to"):
        output_directory(tmp_path / "out")
