"""What is refused before a merge begins: models that do not belong together, by their tensors and their weights."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from dppa_jax.architecture.row import Architecture
from dppa_jax.architecture.specs import CheckpointError, Role, TensorSpec, layer_count
from dppa_jax.architecture.table import known
from dppa_jax.checkpoint import Checkpoint
from dppa_jax.merging.configs import compare_configs
from dppa_jax.runtime import processes
from dppa_jax.runtime.reading import printable

OTHER_BASE = 1.0  # ‖δ‖/‖base‖; unrelated models of equal norm have √2, fine-tunes stay far below 1
PROBED_ROWS = 16  # of each linear of the first, middle and last layer


def check_compatible(base: Any, experts: Mapping[str, Any], quiet: bool = False) -> Mapping[str, TensorSpec]:
    """Return the tensors to merge: the base's. Experts must have them all, in its shapes but for added vocabulary.

    Of base and experts only `config` and `specs` are looked at, so that a plan needs no weights.

    Args:
      quiet: no warnings.

    Raises:
      CheckpointError: an expert has other tensors than the base, or a config.json of another meaning.
    """
    check_same_tensors(base, experts)
    for name, expert in experts.items():
        for tensor, spec in base.specs.items():
            extra = _extra_rows(spec, expert.specs[tensor], name)
            if extra and not quiet:
                logging.warning("expert %r: %d rows of %s beyond the base's are dropped", name, extra, tensor)
        if base.config and expert.config:  # a model in memory may have none
            compare_configs(base.config, expert.config, name, quiet)
    return base.specs


def check_same_tensors(base: Any, experts: Mapping[str, Any]) -> None:
    """Refuse experts of another class of models than the base, or with tensors of other names.

    Raises:
      CheckpointError: names the expert and the first tensor.
    """
    check_classes(base, experts)
    for name, expert in experts.items():
        _check_names(base, expert, name)


def check_classes(base: Any, experts: Mapping[str, Any]) -> None:
    """Refuse experts of another row of the table of architectures than the base's.

    Models that are taken by the names and shapes of their tensors are not told apart so.
    """
    for name, expert in experts.items():
        if not (base.config and expert.config):
            continue
        rows = [None if getattr(model, "stated", None) else known(model.config) for model in (base, expert)]
        if rows[0] is not rows[1]:
            ours, theirs = (_class(row, model.config) for row, model in zip(rows, (base, expert), strict=True))
            hint = "" if all(rows) else " --architecture=generic merges models whose tensors have the same names."
            raise CheckpointError(
                f"expert {name!r} is a {theirs}, the base a {ours} (architectures in config.json): a different base "
                f"model?{hint}"
            )


def _class(row: Architecture | None, config: Mapping) -> str:
    """Return the class of a model, as a message can have it."""
    listed = config.get("architectures") or [config.get("model_type") or "model of an unknown class"]
    return row.classes[0] if row else printable(str(listed[0])[:99])


def _check_names(base: Any, expert: Any, name: str) -> None:
    """Refuse an expert with more or fewer tensors than the base."""
    ours, theirs = layer_count(base.specs), layer_count(expert.specs)
    if ours != theirs:
        raise CheckpointError(f"expert {name!r} has {theirs} decoder layers, the base {ours}: a different base model?")
    title = f"expert {name!r}"
    models = {"the base": base, title: expert}
    for one, other in ((title, "the base"), ("the base", title)):
        lacking = [tensor for tensor in models[other].specs if tensor not in models[one].specs]
        if lacking:
            spec = models[other].specs[lacking[0]]
            raise CheckpointError(f"{one} has no {spec.name}, {other} has{_reason(spec, one, other, models)}.")


def _reason(spec: TensorSpec, lacks: str, has: str, models: Mapping[str, Any]) -> str:
    """Return which key of config.json decides about a tensor that only one model has, and what to do."""
    architecture = known(models[has].config)
    if not architecture:
        return ": a different base model?"
    key = "tie_word_embeddings" if spec.kind in architecture.heads else _bias_key(architecture, spec)
    if not key:
        return ": a different base model?"
    values = (f"{architecture.said(models[model].config).get(key, False)} in {model}" for model in (lacks, has))
    fix = "Export both alike"
    if spec.kind in architecture.heads:
        fix = (
            f"If it is the right base, untie {lacks}: write its {architecture.embeddings[0]}.weight as {spec.name}, "
            f"too, and {key} false"
        )
    return f"; {key} is {' and '.join(values)}. {fix}"


def _bias_key(architecture: Architecture, spec: TensorSpec) -> str:
    """Return the key of config.json that says whether there is this bias; empty where no key does."""
    keys = {f"{linear.kind}.bias": linear.bias for linear in architecture.linears if isinstance(linear.bias, str)}
    return keys.get(spec.kind, "")


def _extra_rows(base: TensorSpec, expert: TensorSpec, name: str) -> int:
    """Return how many rows of the vocabulary an expert has beyond the base's; refuse any other difference of shape."""
    if expert.shape == base.shape:
        return 0
    if base.role is Role.VOCABULARY and expert.shape[1:] == base.shape[1:]:
        if expert.rows > base.rows:
            return expert.rows - base.rows
        raise CheckpointError(
            f"expert {name!r}: {base.name} has {expert.rows} rows, and the base {base.rows}, which are "
            f"{base.rows - expert.rows} tokens more. Give the base that it was fine-tuned from; or, if the others were "
            f"added to it, cut it to {expert.rows} rows (transformers: base.resize_token_embeddings({expert.rows}))."
        )
    raise CheckpointError(
        f"expert {name!r}: {base.name} has shape {expert.shape}, base has {base.shape}: different base model? "
        f"Experts must be fine-tuned from --base."
    )


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
    if difference == 0:
        logging.warning("expert %r equals the base where it was probed; is %s fine-tuned?", name, expert.directory)
    relative = np.sqrt(difference / norm) if norm else 0.0  # a base of zeros makes a merge of deltas
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
