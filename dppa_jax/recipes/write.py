"""From the config of a merge to a recipe: the YAML with which mergekit would make the same merge, where it can."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from dppa_jax.architecture.rules import first_match
from dppa_jax.architecture.specs import TensorSpec, layer_count
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.method_options import option_of
from dppa_jax.config.numbers import Coefficient, rate_of_density
from dppa_jax.config.run import JobConfig
from dppa_jax.delta.presets import COMPARISONS
from dppa_jax.recipes.configs import MEANINGS, OF_DELTAS, Meaning, meaning_of, numbers_of
from dppa_jax.recipes.document import parse_documents
from dppa_jax.recipes.grammar import recipe_of
from dppa_jax.recipes.methods import MERGE_METHODS, PARAMETERS, parameter
from dppa_jax.recipes.models import BASE, models_of, tensors_of
from dppa_jax.recipes.resolve import resolve

COMPARED = (
    *("score", "allocate", "scale", "combine", "divide", "lambda_", "arithmetic", "compare", "method_options"),
    *("depth_scaling", "delta_dtype", "lora_factors"),
)
PRUNING = ("prune", "ties")  # compared where something is pruned

Written = dict[str, Any]


class Unsayable(Exception):
    """A merge that no recipe can say; the message is the reason, a sentence."""


def recipe_of_job(job: JobConfig, specs: Mapping[str, TensorSpec], dtype: str) -> str:
    """Return the recipe of a merge as YAML. It is read again, and must mean the same merge.

    Args:
      specs: of the base.
      dtype: of the base, which the output has if nothing else is said.

    Raises:
      Unsayable: mergekit would make another merge, or cannot read the models.
    """
    merge = job.merge
    found = [
        (name, one) for table in (OF_DELTAS, MEANINGS) for name, one in table.items() if one.method == merge.method
    ]
    if not found:
        raise Unsayable(f"mergekit has no method like --method={merge.method}.")
    for where in (job.base, *job.experts.values()):
        if ":" in where:
            raise Unsayable(f"mergekit does not read {where}.")
    writer = _Writer(job, *found[0], specs)
    said: Written = {"merge_method": writer.name, **writer.models()}
    if own := writer.of_merge():
        said["parameters"] = own
    said["dtype"], said["out_dtype"] = merge.arithmetic, merge.output_dtype or dtype
    if said["dtype"] == said["out_dtype"]:
        del said["out_dtype"]
    elif said["dtype"] == "inputs":
        del said["dtype"]
    if job.vocabulary != BASE or job.tokenizer != BASE:
        said["tokenizer_source"] = "union" if job.vocabulary == "union" else job.experts[job.tokenizer]
    text = yaml.safe_dump(said, sort_keys=False, allow_unicode=True)
    _check_same(merge, text, specs)
    return text


@dataclass(frozen=True)
class _Writer:
    """Says the models and parameters of a job by a method of recipes, which has a name and a meaning here."""

    job: JobConfig
    name: str
    meaning: Meaning
    specs: Mapping[str, TensorSpec]

    def models(self) -> Written:
        """Return base_model and models, with the parameters that each has."""
        job, method = self.job, MERGE_METHODS[self.name]
        experts = [{"model": where, **self.of_model(expert)} for expert, where in job.experts.items()]
        if self.meaning.base:  # a model like the others, and the first
            return {"models": [{"model": job.base, **self.of_model(BASE)}, *experts]}
        if method.models == (1, 1):
            return {"models": experts}
        first = [{"model": job.base}] if method.base == "named" else []
        return {"base_model": job.base, "models": [*first, *experts]}

    def of_model(self, model: str) -> Written:
        """Return the parameters of a model."""
        merge, own = self.job.merge, self.options(model)
        if self.is_of_model(self.meaning.coefficient):
            own[self.meaning.coefficient] = self.setting(coefficients_of(merge, model, self.specs))
        if merge.score:
            rates = rates_of(merge, model, self.specs)
            own["density"] = self.setting({tensor: rate_of_density("rate", rate) for tensor, rate in rates.items()})
        return {"parameters": own} if own else {}

    def of_merge(self) -> Written:
        """Return the parameters that are one for all models, where they are not the defaults."""
        merge, meaning, has = self.job.merge, self.meaning, MERGE_METHODS[self.name].parameters
        own = self.options()
        if meaning.coefficient and not self.is_of_model(meaning.coefficient):
            own[meaning.coefficient] = self.setting(coefficients_of(merge, merge.experts[0], self.specs))
        if "lambda" in has:
            own |= {"lambda": self.option("lambda"), "normalize": self.flag("divide", merge.divide == "weights")}
        if meaning.scales:
            scaled = next((key for key, scale in meaning.scales.items() if scale == merge.scale), False)
            own["rescale"] = self.flag("rescale", scaled)
        if meaning.by_row:
            key, by_row = meaning.by_row
            own[key] = by_row == COMPARISONS[merge.compare]
        return {key: value for key, value in own.items() if value != has[key]}

    def options(self, model: str = "") -> Written:
        """Return the options of the method that a model has or, without one, that are one for all."""
        said = {}
        for key, (name, factor) in self.meaning.options.items():
            if self.is_of_model(key) == bool(model):
                said[key] = self.flag(name) if PARAMETERS[key].flag else self.option(name, model, factor)
        return said

    def option(self, name: str, model: str = "", factor: float = 1.0) -> Any:
        """Say an option, over a factor."""
        return self.setting({tensor: option_of(self.job.merge, name, tensor, model) / factor for tensor in self.specs})

    def flag(self, name: str, anywhere: bool = True) -> Any:
        """Say for which tensors something is done, if it is done for any."""
        return self.setting(
            {tensor: anywhere and bool(option_of(self.job.merge, name, tensor)) for tensor in self.specs}
        )

    def is_of_model(self, key: str) -> bool:
        """Return whether each model has a parameter."""
        return bool(key) and parameter(self.name, key).of_model

    def setting(self, values: Mapping[str, float]) -> Any:
        """Say a number for each tensor: one for all, or rules by kind, each with a gradient over the layers."""
        if len(set(values.values())) == 1:
            return next(iter(values.values()))
        layers, by_kind = layer_count(self.specs), {}
        for spec in self.specs.values():
            by_kind.setdefault(spec.kind if spec.layer is not None else spec.name, []).append(values[spec.name])
        longest_first = sorted(by_kind.items(), key=lambda item: (-len(item[0]), item[0]))  # one may be part of another
        return [{"filter": kind, "value": _gradient(numbers, layers)} for kind, numbers in longest_first]


def _check_same(merge: MergeConfig, text: str, specs: Mapping[str, TensorSpec]) -> None:
    """Refuse a recipe that means another merge when it is read."""
    try:
        [(value, _)] = parse_documents(text, "the recipe")
        recipe = recipe_of(value)
        found = models_of(recipe, {})
        tensors, layers = tensors_of(specs, {})
        numbers = numbers_of(recipe, found, resolve(recipe, tensors, layers, found.names))
        again = MergeConfig(tuple(found.experts), meaning_of(recipe).method, **numbers)
    except ValueError as error:
        raise Unsayable(str(error)) from None
    if len(again.experts) != len(merge.experts):
        raise Unsayable("two of the models are in one place, which a recipe takes for one model.")
    for name in (*COMPARED, *(PRUNING if merge.score else ())):
        if getattr(again, name) != getattr(merge, name):
            flag = name.rstrip("_")
            raise Unsayable(f"with it {flag} is {getattr(again, name)}, and here {getattr(merge, name)}.")
    names = dict(zip(merge.experts, again.experts, strict=True)) | ({BASE: BASE} if BASE in merge.coefficients else {})
    for name in merge.tensor_options.keys() | again.tensor_options.keys():
        of_each = [(ours, theirs, tensor) for ours, theirs in {"": "", **names}.items() for tensor in specs]
        if any(option_of(merge, name, tensor, a) != option_of(again, name, tensor, b) for a, b, tensor in of_each):
            raise Unsayable(f"{name} differs by tensor in a way that no gradient says.")
    for ours, theirs in names.items():
        if coefficients_of(merge, ours, specs) != coefficients_of(again, theirs, specs):
            raise Unsayable(f"the coefficients of {ours} differ by tensor in a way that no gradient says.")
        if merge.score and rates_of(merge, ours, specs) != rates_of(again, theirs, specs):
            raise Unsayable(f"the rates of {ours} differ by tensor in a way that no gradient says.")


def coefficients_of(merge: MergeConfig, model: str, specs: Mapping[str, TensorSpec]) -> dict[str, float]:
    """Return the coefficient of every tensor of a model."""
    return _by_tensor(merge.tensor_coefficients, merge.coefficients.get(model, 1.0), specs)


def rates_of(merge: MergeConfig, model: str, specs: Mapping[str, TensorSpec]) -> dict[str, float]:
    """Return the rate of every tensor of an expert."""
    return _by_tensor(merge.tensor_rates, merge.expert_rates.get(model, merge.rate), specs)


def _by_tensor(
    rules: Sequence[tuple[str, float]], own: Coefficient, specs: Mapping[str, TensorSpec]
) -> dict[str, float]:
    """Return the number of every tensor: a rule's, the tensor's own, or the model's."""
    found = {}
    for name in specs:
        rule = first_match(rules, name)
        found[name] = rule if rule is not None else own[name] if isinstance(own, Mapping) else own
    return found


def _gradient(numbers: Sequence[float], layers: int) -> Any:
    """Return the one number of all layers, or a list with that of each."""
    if len(set(numbers)) == 1:
        return numbers[0]
    if len(numbers) != layers:
        raise Unsayable("numbers differ within a kind of tensors of a layer.")
    return list(numbers)
