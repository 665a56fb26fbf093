"""Save and restore the state of a training run with Orbax; a state restores to the same bits onto any mesh."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import orbax.checkpoint as ocp
from absl import logging

from dppa_jax.finetune.train import State, Trainer
from dppa_jax.runtime import processes
from dppa_jax.runtime.directories import claim_directory
from dppa_jax.runtime.reading import printable

KEPT = 2  # states on disk: if a run is killed while it writes the newer, the older one is whole


class Checkpoints:
    """The newest states of one training run, by the number of steps taken. Each process holds its own slices."""

    def __init__(self, directory: Path, manager: ocp.CheckpointManager, base: str = ""):
        self.directory, self._manager, self._base = directory, manager, base

    def restore(self, trainer: Trainer) -> tuple[State, list[dict]] | None:
        """Return the newest state, on the trainer's mesh, and the log up to it; None if nothing was saved.

        Raises:
          ValueError: the state cannot be read, or is of a run from another base.
        """
        newest = processes.of_first("newest state", self._manager.latest_step)
        if newest is None:
            return None
        state = ocp.args.StandardRestore(trainer.abstract()._asdict())
        try:
            restored = self._manager.restore(newest, args=ocp.args.Composite(state=state, log=ocp.args.JsonRestore()))
            state, kept = State(**restored["state"]), restored["log"]
            base, log = kept["base"], kept["entries"]
        except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
            reason = printable((str(error).strip() or type(error).__name__).splitlines()[0])[:300]
            raise ValueError(
                f"{self.directory / str(newest)}: the state cannot be read ({reason}); remove it to go on from the "
                f"state before, or give --resume=false to begin anew."
            ) from error
        if base != self._base:
            raise ValueError(
                f"{self.directory / str(newest)}: the state is of a run from another --base; give that base, or "
                f"--resume=false to begin anew."
            )
        return state, log

    def save(self, state: State, log: Sequence[Mapping]) -> None:
        """Save a state unless it is saved already. Return when it is on the disk."""
        if state.steps in self._manager.all_steps():
            return
        kept = {"entries": list(log), "base": self._base}
        content = ocp.args.Composite(state=ocp.args.StandardSave(state._asdict()), log=ocp.args.JsonSave(kept))
        self._manager.save(state.steps, args=content, force=True)

    def finished(self) -> None:
        """Remove all states, because the output is written and nothing is left to resume."""
        self._manager.close()
        if processes.index() == 0:
            shutil.rmtree(self.directory, ignore_errors=True)


@contextmanager
def checkpoints(directory: Path, every: int, resume: bool = True, base: str = "") -> Iterator[Checkpoints]:
    """Open the states in a directory, for one run at a time.

    Args:
      directory: made if it is missing, unless `every` is 0.
      every: steps between two saved states; 0 saves none.
      resume: False removes the states of an earlier run first.
      base: the fingerprint of the weights that training starts from; a state of another one is refused.

    Raises:
      ValueError: another run is training the same model, the directory is a link or another user's, or a process does
        not see it.
    """
    directory = directory.parent.resolve() / directory.name  # a link at its place is not followed, but refused
    # Not async: the next step reuses the state's memory, so an async save would have to copy all of it first.
    options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, create=False, enable_async_checkpointing=False)
    with _locked(directory, every, resume), ocp.CheckpointManager(directory, options=options) as manager:
        yield Checkpoints(directory, manager, base)


@contextmanager
def _locked(directory: Path, every: int, resume: bool) -> Iterator[None]:
    """Let the first process hold the lock for all. The system frees it when that process ends, however it ends."""
    lock = None
    try:
        with processes.first_alone("checkpoints"):
            if processes.index() == 0:
                lock = _prepared(directory, every, resume)
            elif every and not directory.is_dir():
                raise ValueError(
                    f"{directory} is not there as process 0 made it: all processes must see the same --workdir; give "
                    f"a directory on a file system that they share."
                )
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _prepared(directory: Path, every: int, resume: bool) -> int | None:
    """Make the directory if states are kept, lock it, and empty it unless resuming; return the lock, if any."""
    if every:
        directory.parent.mkdir(parents=True, exist_ok=True)
    elif not os.path.lexists(directory):
        return None
    lock = claim_directory(directory)
    for state in () if resume else directory.iterdir():
        logging.info("--resume=false: %s is removed", state)
        shutil.rmtree(state)
    return lock
