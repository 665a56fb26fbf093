"""Directories that the program takes over are its own: no links, no other user's, one run at a time."""

import os

import pytest

from dppa_jax.architecture.specs import CheckpointError
from dppa_jax.runtime import directories
from dppa_jax.runtime.directories import (
    BusyError,
    claim_directory,
    empty_directory,
    open_directory,
    scratch_directory,
    still_there,
)

TAKEN = (claim_directory, empty_directory)


@pytest.fixture
def place(tmp_path):
    return tmp_path / "aside"


@pytest.fixture
def precious(tmp_path):
    """A directory of the user's with a file in it."""
    directory = tmp_path / "base"
    directory.mkdir()
    (directory / "model.safetensors").write_text("weights")
    return directory


@pytest.mark.parametrize("take", TAKEN)
def test_a_link_is_refused_and_what_it_leads_to_stays(place, precious, take):
    place.symlink_to(precious)
    with pytest.raises(CheckpointError, match=f"{place} is a link to {precious} in place of a directory; remove it"):
        take(place, CheckpointError)
    assert (precious / "model.safetensors").read_text() == "weights"


@pytest.mark.parametrize("take", TAKEN)
def test_a_file_is_refused(place, take):
    place.write_text("mine")
    with pytest.raises(ValueError, match=f"{place} is a file in place of a directory"):
        take(place)
    assert place.read_text() == "mine"


@pytest.mark.parametrize("take", TAKEN)
def test_a_directory_of_another_user_is_refused(place, precious, take, monkeypatch):
    monkeypatch.setattr(directories.os, "geteuid", lambda: precious.stat().st_uid + 1)
    with pytest.raises(ValueError, match=rf"{precious} belongs to another user \(uid {precious.stat().st_uid}\)"):
        take(precious)
    assert (precious / "model.safetensors").exists()


def test_one_run_at_a_time_takes_a_directory(place):
    lock = claim_directory(place)
    with pytest.raises(BusyError, match=f"{place} is in use by another run"):
        claim_directory(place)
    os.close(lock)
    os.close(claim_directory(place))


def test_a_refused_directory_is_not_kept_open(place):
    lock, before = claim_directory(place), os.listdir("/proc/self/fd")
    with pytest.raises(BusyError):
        claim_directory(place)
    assert os.listdir("/proc/self/fd") == before
    os.close(lock)


def test_the_parent_must_be_there(place):
    with pytest.raises(FileNotFoundError, match="aside/more"):
        claim_directory(place / "more")


def test_only_links_are_removed_from_a_directory_that_is_emptied(place, precious):
    (place / "deep" / "deeper").mkdir(parents=True)
    (place / "deep" / "deeper" / "file").write_text("left by a killed run")
    (place / "out").symlink_to(precious)
    (place / "deep" / "out").symlink_to(precious)
    os.close(empty_directory(place))
    assert list(place.iterdir()) == []
    assert (precious / "model.safetensors").exists()


def test_a_scratch_directory_is_removed_also_after_an_error(place):
    with scratch_directory(place), pytest.raises(BusyError), scratch_directory(place):
        pass
    assert not place.exists()
    with pytest.raises(FileNotFoundError), scratch_directory(place):
        (place / "out" / "model").mkdir()
    assert not place.exists()


def test_another_directory_at_a_place_is_noticed(place, precious):
    place.mkdir()
    descriptor = open_directory(place)
    assert still_there(place, descriptor)
    place.rename(place.with_name("moved"))
    assert not still_there(place, descriptor)
    place.symlink_to("moved")
    assert not still_there(place, descriptor)
    os.close(descriptor)
