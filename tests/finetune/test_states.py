"""The directory of a training run's states: one run at a time, its own, never through a link."""

import pytest

from dppa_jax.finetune.states import checkpoints


@pytest.fixture
def target(tmp_path):
    """A directory of the user, to which a link stands in the place of the states."""
    (tmp_path / "photos" / "1").mkdir(parents=True)
    (tmp_path / "finetune-abc").symlink_to(tmp_path / "photos")
    return tmp_path / "photos"


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("every", [0, 5])
def test_a_link_in_place_of_the_states_is_refused_and_its_target_kept(target, tmp_path, every, resume):
    with pytest.raises(ValueError, match=r"finetune-abc is a link to .*photos in place of a directory"):
        checkpoints(tmp_path / "finetune-abc", every, resume).__enter__()
    assert (target / "1").is_dir()


def test_a_run_at_a_time_and_none_that_keeps_nothing(tmp_path):
    directory = tmp_path / "work" / "finetune-abc"
    with checkpoints(directory, 0):
        assert not directory.parent.exists()
    with checkpoints(directory, 5) as kept:
        with pytest.raises(ValueError, match="is in use by another run"):
            checkpoints(directory, 5).__enter__()
        kept.finished()
    assert not directory.exists()
