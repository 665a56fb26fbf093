"""States of a training, kept on disk by Orbax: each restores to the same bits, onto any mesh."""

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import orbax.checkpoint as ocp

from dppa_jax.finetune.train import State, Trainer

KEPT = 2  # the older one where the newer was being written


class Checkpoints:
    """The newest states of one training, by the steps that were taken."""

    def __init__(self, directory: Path, manager: ocp.CheckpointManager):
        self.directory, self._manager = directory, manager

    def restore(self, trainer: Trainer) -> tuple[State, list[dict]] | None:
        """The newest state, on the trainer's mesh, with what was logged until then; None where there is none."""
        newest = self._manager.latest_step()
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
        shutil.rmtree(self.directory, ignore_errors=True)


@contextmanager
def checkpoints(directory: Path, every: int) -> Iterator[Checkpoints]:
    """Those in a directory, for one run at a time; it is made unless `every` is 0, where nothing is to be kept.

    Raises:
      ValueError: another run trains the same.
    """
    directory = directory.resolve()
    if every:
        directory.mkdir(parents=True, exist_ok=True)
    # Not async: the next step uses the state's memory again, so that all of it would have to be copied first.
    options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, create=False, enable_async_checkpointing=False)
    with _alone(directory), ocp.CheckpointManager(directory, options=options) as manager:
        yield Checkpoints(directory, manager)


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """The lock ends with the process, however that ends."""
    if not directory.is_dir():
        yield
        return
    lock = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{directory}: another run is training the same; wait for it, or end it.") from None
        yield
    finally:
        os.close(lock)
