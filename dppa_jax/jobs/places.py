"""Where a job reads and writes: models, outputs and the directory of its work must not lie in each other."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dppa_jax.architecture.specs import CheckpointError
from dppa_jax.checkpoint.output import aside_of


def check_apart(outputs: Mapping[str, str], inputs: Mapping[str, Path], workdir: str = "") -> None:
    """Refuse an output that is, contains or lies in an input or another output, and a --workdir in one of them.

    Outputs and inputs may lie in --workdir, and often do.

    Args:
      outputs: where the job writes models, by the flag that says so.
      inputs: the directories of the models that it reads, by name.
      workdir: where else it writes; empty where it does not.

    Raises:
      CheckpointError: two of them are not apart.
    """
    taken = {f"the model {name!r}": _resolved(path) for name, path in inputs.items()}
    for flag, given in outputs.items():
        path = _resolved(given)
        for what, other in taken.items():
            for place in (path, _resolved(aside_of(path))):
                if place.is_relative_to(other) or other.is_relative_to(place):
                    raise CheckpointError(
                        f"{flag}: {given} and {what} in {other} are the same or one contains the other; choose a "
                        f"directory apart from it."
                    )
        taken[f"the output of {flag}"] = path
    work = _resolved(workdir) if workdir else None
    for what, other in taken.items() if work else ():
        if any(work.is_relative_to(place) for place in (other, _resolved(aside_of(other)))):
            raise CheckpointError(
                f"--workdir: {workdir} is or lies in {what} in {other}, where no other files may be; choose another "
                f"directory."
            )


def directories(models: Mapping[str, Any]) -> dict[str, Path]:
    """Return the directories that models are read from, by name; one that is made of others has several."""
    found = {}
    for name, model in models.items():
        for place, directory in enumerate(getattr(model, "directories", (model.directory,))):
            found[f"{name} ({place + 1})" if place else name] = directory
    return found


def _resolved(path: Path | str) -> Path:
    """Return a path without links; a link that leads back to itself stays, where Path.resolve raises RuntimeError."""
    return Path(os.path.realpath(path))
