"""What is refused before a merge begins: models that do not fit each other, outputs that overlap inputs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from dppa_jax.architecture.specs import CheckpointError, Role, TensorSpec, layer_count
from dppa_jax.architecture.table import architecture_of
from dppa_jax.checkpoint import Checkpoint
from dppa_jax.runtime import processes

OTHER_BASE = 1.0  # ‖δ‖/‖base‖; unrelated models of equal norm have √2, fine-tunes stay far below 1
PROBED_ROWS = 16  # of each linear of the first, middle and last layer


def check_compatible(base: Any, experts: Mapping[str, Any], quiet: bool = False) -> Mapping[str, TensorSpec]:
    """Return the tensors to merge: the base's. Experts must have them all, in its shapes but for added vocabulary.

    Of base and experts only `config` and `specs` are looked at, so that a plan needs no weights.
    """
    wanted = layer_count(base.specs)
    for name, expert in experts.items():
        ours, theirs = (_class(model.config) for model in (base, expert))
        if ours and theirs and ours != theirs:
            raise CheckpointError(f"expert {name!r} is a {theirs}, the base a {ours}: a different base model?")
        layers = layer_count(expert.specs)
        if layers != wanted:
            raise CheckpointError(
                f"expert {name!r} has {layers} decoder layers, the base {wanted}: a different base model?"
            )
        for tensor, spec in base.specs.items():
            found = expert.specs.get(tensor)
            if found is None:
                raise CheckpointError(
                    f"expert {name!r} has no {tensor}, the base has; tie_word_embeddings is "
                    f"{expert.config.get('tie_word_embeddings', False)} there and "
                    f"{base.config.get('tie_word_embeddings', False)} in the base. Export it like the base."
                )
            if found.shape == spec.shape:
                continue
            if spec.role is Role.VOCABULARY and found.shape[1:] == spec.shape[1:] and found.shape[0] > spec.shape[0]:
                extra = found.shape[0] - spec.shape[0]
                if not quiet:
                    logging.warning("expert %r: %d rows of %s beyond the base's are dropped", name, extra, tensor)
                continue
            raise CheckpointError(
                f"expert {name!r}: {tensor} has shape {found.shape}, base has {spec.shape}: different base model? "
                f"Experts must be fine-tuned from --base."
            )
        extra = [tensor for tensor in expert.specs if tensor not in base.specs]
        if extra:
            raise CheckpointError(f"expert {name!r} has {extra[0]}, which the base has not; a different base model?")
    return base.specs


def _class(config: Mapping) -> str:
    """The first class of the row that a config.json belongs to; empty for a model in memory without one."""
    return architecture_of(config).classes[0] if config else ""


def check_apart(outputs: Mapping[str, str], inputs: Mapping[str, Path]) -> None:
    """Refuse an output that is, contains or lies in an input or another output."""
    taken = {f"the model {name!r}": path.resolve() for name, path in inputs.items()}
    for flag, given in outputs.items():
        path = Path(given).resolve()
        for what, other in taken.items():
            for place in (path, path.with_name(path.name + ".incomplete")):
                if place.is_relative_to(other) or other.is_relative_to(place):
                    raise CheckpointError(
                        f"{flag}: {given} and {what} in {other} are the same or one contains the other; choose a "
                        f"directory apart from it."
                    )
        taken[f"the output of {flag}"] = path


def check_same_base(base: Checkpoint, expert: Checkpoint, name: str) -> None:
    """Refuse an expert whose delta is as large as the weights, on a few rows of every kind of linear.

    Each process looks at layers of its own.
    """
    own = processes.share(layer_count(base.specs), processes.count(), processes.index())
    if not own:
        return
    difference = norm = 0.0
    for spec in base.specs.values():
        if spec.linear is None or spec.layer not in (own[0], own[len(own) // 2], own[-1]):
            continue
        for row in np.linspace(0, spec.rows - 1, PROBED_ROWS).astype(int):
            b, e = (_row(source, spec.name, int(row)) for source in (base, expert))
            finite = np.isfinite(b) & np.isfinite(e)  # the merge tells where they are not
            difference += np.square(e[finite] - b[finite]).sum()
            norm += np.square(b[finite]).sum()
    relative = np.sqrt(difference / norm) if norm else 0.0
    if relative == 0:
        logging.warning("expert %r equals the base where it was probed; is %s fine-tuned?", name, expert.directory)
    if relative > OTHER_BASE:
        raise CheckpointError(
            f"expert {name!r}: its delta is {relative:.2f} times as large as the base's weights, that of a fine-tune "
            f"is a small part of them: other base? Was {expert.directory} made from {base.directory}? "
            f"--allow_other_base merges it."
        )


def _row(source: Checkpoint, name: str, row: int) -> np.ndarray:
    tensor = source.tensors[name]
    out = np.empty(tensor.shape[-1], tensor.dtype)
    source.read_rows(name, row, row + 1, out)
    return out.astype(np.float64)
