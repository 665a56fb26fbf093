"""What models have beside the tensors that are merged: heads of their own tasks, the parts that see images, copies.

Nothing is dropped in silence. A tensor is merged, or copied from one model, or a warning or an error names it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from absl import logging

from dppa_jax.architecture.row import Role
from dppa_jax.architecture.specs import CheckpointError, tensor_specs
from dppa_jax.architecture.table import known
from dppa_jax.checkpoint.laid_out import copy_tensors, rest_of
from dppa_jax.checkpoint.matched import Part
from dppa_jax.checkpoint.promised import same_bits
from dppa_jax.checkpoint.safetensors_writer import SafetensorsWriter
from dppa_jax.runtime import processes


@dataclass(frozen=True)
class Rest:
    """What the output has beside the merged tensors.

    Attributes:
      source: the model from which these are copied.
      names: of the tensors in its files.
      config: the content of the output's config.json, but for its dtype.
    """

    source: Any
    names: tuple[str, ...] = ()
    config: Mapping = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, tuple]:
        """Shape and dtype of what is copied, by name."""
        return {name: (self.source.tensors[name].shape, self.source.tensors[name].dtype) for name in self.names}


def settle_rest(base: Any, experts: Mapping[str, Any], quiet: bool = False) -> tuple[Any, dict[str, Any], Rest]:
    """Return base and experts with the tensors that are merged, and what is copied.

    Where the weights are not there yet, a head that only one model has is taken for a copy of the embeddings.

    Raises:
      CheckpointError: several experts have heads of their own.
    """
    models = {"base": base, **experts}
    row = known(base.config)
    if row and row.own_heads:
        models, rest = _settle_heads(models, quiet)
    else:
        models = models if row else _settle_copies(models)
        names = rest_of(base)
        if not quiet:
            _tell(names, experts)
        rest = Rest(base, names, base.config)
    return models.pop("base"), models, rest


def _settle_heads(models: Mapping[str, Any], quiet: bool) -> tuple[dict[str, Any], Rest]:
    """Take the head of the one expert that has its own; what all models have alike, such as a pooler, is merged.

    The output then has the names of the expert's files.
    """
    whole = {name: _heads(model) for name, model in models.items()}
    shared = set.intersection(*(set(own.items()) for own in whole.values()))
    heads = {name: {t: shape for t, shape in own.items() if (t, shape) not in shared} for name, own in whole.items()}
    base = models["base"]
    other = [name for name in models if heads[name] != heads["base"]]
    if not other:
        return dict(models), Rest(base, (), base.config)
    if len(other) > 1:
        said = "; ".join(f"{name!r}: {', '.join(list(heads[name])[:2]) or 'none'}" for name in other)
        raise CheckpointError(
            f"{len(other)} experts have heads that the base has not ({said}), and a model has one head: merge one such "
            f"expert at a time, with others that have the base's."
        )
    (owner,) = other
    parts = {}
    for name, model in models.items():
        parts[name] = Part(model, {tensor: spec for tensor, spec in model.specs.items() if tensor not in heads[name]})
        lost = [] if quiet else [tensor for tensor in heads[name] if tensor not in heads[owner]]
        if lost:
            logging.warning("%r: %d tensors of its head are not in the output, first %s", name, len(lost), lost[0])
    if layout := getattr(models[owner], "layout", None):
        parts["base"].layout = layout
    if not quiet:
        logging.info("the head of %r is copied: %s", owner, ", ".join(heads[owner]) or "none")
    return parts, Rest(models[owner], tuple(heads[owner]), models[owner].config)


def _heads(model: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a model that are no part of its row."""
    backbone = tensor_specs(model.config)
    return {name: spec.shape for name, spec in model.specs.items() if name not in backbone}


def _settle_copies(models: Mapping[str, Any]) -> dict[str, Any]:
    """Let models agree on heads that only some files have, where they are copies of the embeddings."""
    base, settled = models["base"], dict(models)
    for name, model in models.items():
        own = dict(model.specs)
        more = [tensor for tensor in _vocabulary(model) if tensor not in base.specs and _copied_from(model, tensor)]
        lacks = {tensor: _copied_from(base, tensor) for tensor in _vocabulary(base) if tensor not in own}
        lacks = {tensor: of for tensor, of in lacks.items() if of in own}
        if more or lacks:
            own = {tensor: spec for tensor, spec in own.items() if tensor not in more}
            own |= {tensor: replace(own[of], name=tensor, kind=base.specs[tensor].kind) for tensor, of in lacks.items()}
            settled[name] = Part(model, own, lacks)
    return settled


def _vocabulary(model: Any) -> list[str]:
    return [name for name, spec in model.specs.items() if spec.role is Role.VOCABULARY]


def _copied_from(model: Any, name: str) -> str | None:
    """Return another matrix of the vocabulary with the same bits; with the same shape, where there are no bits yet."""
    others = [
        other for other in _vocabulary(model) if other != name and model.specs[other].shape == model.specs[name].shape
    ]
    if not hasattr(model, "read_rows"):
        return others[0] if others else None
    return next((other for other in others if same_bits((model, other), (model, name))), None)


def _tell(rest: Sequence[str], experts: Mapping[str, Any]) -> None:
    """Say what is copied from the base, and what experts have that goes nowhere."""
    if rest:
        logging.info("%d tensors are copied from the base, first %s", len(rest), rest[0])
    ours = set(map(_plain, rest))
    for name, expert in experts.items():
        if lost := [tensor for tensor in rest_of(expert) if _plain(tensor) not in ours]:
            logging.warning(
                "expert %r: %d tensors that the base has not are not in the output, first %s", name, len(lost), lost[0]
            )


def copy_rest(rest: Rest, experts: Mapping[str, Any], sink: SafetensorsWriter) -> None:
    """Copy what is not merged, in the first process; warn where an expert has trained a tensor that is copied."""
    if processes.index() == 0:
        copy_tensors(rest.source, rest.names, sink)
        _tell_differences(rest, experts)


def _tell_differences(rest: Rest, experts: Mapping[str, Any]) -> None:
    for name, expert in experts.items():
        theirs = {_plain(tensor): tensor for tensor in rest_of(expert)}
        pairs = [(tensor, theirs[_plain(tensor)]) for tensor in rest.names if _plain(tensor) in theirs]
        different = [ours for ours, own in pairs if not same_bits((rest.source, ours), (expert, own))]
        if different:
            logging.warning(
                "expert %r: %d tensors that are copied from the base differ there, first %s; what the expert learned "
                "in them is not in the output",
                *(name, len(different), different[0]),
            )


def _plain(name: str) -> str:
    """Return a name as all programs' spellings of it have it."""
    return name.removeprefix("model.").replace("vision_tower.vision_model.", "vision_tower.")
