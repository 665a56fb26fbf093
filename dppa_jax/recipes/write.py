"""From the config of a merge to a recipe: the YAML with which mergekit would make the same merge, where it can."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from dppa_jax.architecture.rules import first_match
from dppa_jax.architecture.specs import TensorSpec, layer_count
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.numbers import Coefficient
from dppa_jax.config.run import JobConfig
from dppa_jax.recipes.configs import MEANINGS
from dppa_jax.where import runs_of


class Unsayable(Exception):
    """A merge that no recipe can say; the message is the reason, a sentence."""


def recipe_of_job(job: JobConfig, specs: Mapping[str, TensorSpec]) -> str:
    """Return the recipe of a merge as YAML.

    Args:
      specs: of the base.

    Raises:
      Unsayable: mergekit would make another merge, or cannot read the models.
    """
    merge = job.merge
    names = [name for name, meaning in MEANINGS.items() if meaning.method == merge.method]
    if not names:
        raise Unsayable(f"mergekit has no method like --method={merge.method}.")
    _check_alike(job)
    models = [{"model": where, **_parameters(merge, name, specs)} for name, where in job.experts.items()]
    said: dict[str, Any] = {"merge_method": names[0], "base_model": job.base, "models": models}
    if merge.output_dtype:
        said["dtype"] = merge.output_dtype
    if job.vocabulary != "base" or job.tokenizer != "base":
        said["tokenizer_source"] = "union" if job.vocabulary == "union" else job.experts[job.tokenizer]
    return yaml.safe_dump(said, sort_keys=False, allow_unicode=True)


def _check_alike(job: JobConfig) -> None:
    """Refuse merges that mergekit would make otherwise."""
    merge = job.merge
    if merge.score:
        raise Unsayable(f"mergekit prunes otherwise than --method={merge.method} here.")
    for where in (job.base, *job.experts.values()):
        if ":" in where and not runs_of(where):
            raise Unsayable(f"mergekit does not read {where}.")


def _parameters(merge: MergeConfig, expert: str, specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """Return the parameters of an expert."""
    own = merge.coefficients[expert]
    if not merge.tensor_coefficients:
        return {"parameters": {"weight": _setting(own, specs)}}
    values = {}
    for name in specs:
        rule = first_match(merge.tensor_coefficients, name)
        values[name] = rule if rule is not None else own[name] if isinstance(own, Mapping) else own
    return {"parameters": {"weight": _setting(values, specs)}}


def _setting(values: Coefficient, specs: Mapping[str, TensorSpec]) -> Any:
    """Say a number for each tensor: one for all, or rules by kind, each with a gradient over the layers."""
    if not isinstance(values, Mapping):
        return values
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    layers, by_kind = layer_count(specs), {}
    for spec in specs.values():
        by_kind.setdefault(spec.kind if spec.layer is not None else spec.name, []).append(values[spec.name])
    longest_first = sorted(by_kind.items(), key=lambda item: (-len(item[0]), item[0]))  # one may be a part of another
    return [{"filter": kind, "value": _gradient(numbers, layers)} for kind, numbers in longest_first]


def _gradient(numbers: Sequence[float], layers: int) -> Any:
    """Return the one number of all layers, or a list with that of each."""
    if len(set(numbers)) == 1:
        return numbers[0]
    if len(numbers) != layers:
        raise Unsayable("coefficients differ within a kind of tensors of a layer.")
    return list(numbers)
