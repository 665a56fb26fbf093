"""States of a training, kept on disk by Orbax: each restores to the same bits, onto any mesh."""

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import orbax.checkpoint as ocp
from absl import logging

from dppa_jax.finetune.train import State, Trainer
from dppa_jax.runtime import processes

KEPT = 2  # the older one where the newer was being written


class Checkpoints:
    """The newest states of one training, by the steps that were taken; of several processes each has its slices."""

    def __init__(self, directory: Path, manager: ocp.CheckpointManager):
        self.directory, self._manager = directory, manager

    def restore(self, trainer: Trainer) -> tuple[State, list[dict]] | None:
        """The newest state, on the trainer's mesh, with what was logged until then; None where there is none."""
        newest = processes.of_first("newest state", self._manager.latest_step)
        if newest is None:
            return None
        state = ocp.args.StandardRestore(trainer.abstract()._asdict())
        found = self._manager.restore(newest, args=ocp.args.Composite(state=state, log=ocp.args.JsonRestore()))
        return State(**found["state"]), found["log"]["entries"]

    def save(self, state: State, log: Sequence[Mapping]) -> None:
        """Keep a state, if it is not there already. Returns when it is on the disk."""
        if state.steps in self._manager.all_steps():
            return
        content = ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()), log=ocp.args.JsonSave({"entries": list(log)})
        )
        self._manager.save(state.steps, args=content, force=True)

    def finished(self) -> None:
        """The output is written: nothing is left to go on with."""
        self._manager.close()
        if processes.index() == 0:
            shutil.rmtree(self.directory, ignore_errors=True)


@contextmanager
def checkpoints(directory: Path, every: int, resume: bool = True) -> Iterator[Checkpoints]:
    """Those in a directory, for one run at a time; it is made unless `every` is 0, where nothing is to be kept.

    With resume=False those that are there are removed.

    Raises:
      ValueError: another run trains the same; of several processes some do not see the directory.
    """
    directory = directory.resolve()
    # Not async: the next step uses the state's memory again, so that all of it would have to be copied first.
    options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, create=False, enable_async_checkpointing=False)
    with _alone(directory, every, resume), ocp.CheckpointManager(directory, options=options) as manager:
        yield Checkpoints(directory, manager)


@contextmanager
def _alone(directory: Path, every: int, resume: bool) -> Iterator[None]:
    """The first process takes the lock for all. It ends with the process, however that ends."""
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
    """The lock of the directory, which is made and emptied as it should be; None where there is none."""
    if every:
        directory.mkdir(parents=True, exist_ok=True)
    if not directory.is_dir():
        return None
    lock = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(f"{directory}: another run is training the same; wait for it, or end it.") from None
    if not resume:
        for state in directory.iterdir():
            logging.info("--resume=false: %s is removed", state)
            shutil.rmtree(state)
    return lock
