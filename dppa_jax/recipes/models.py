"""The models of a recipe: which is the base, where each is, what it is called, and what its tensors are."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dppa_jax.architecture.specs import TensorSpec, layer_count
from dppa_jax.recipes.document import RecipeError
from dppa_jax.recipes.methods import MERGE_METHODS
from dppa_jax.recipes.recipe import Part, Recipe
from dppa_jax.recipes.resolve import Tensor
from dppa_jax.where import LAYERS

BASE = "base"


@dataclass(frozen=True)
class Models:
    """The models of a recipe.

    Attributes:
      base: where the base is.
      place: which model of each slice is the base; None where it is in none.
      apart: is the base what the others are compared with, and no model like them?
      experts: where the others are, by name, in the order of the recipe.
      places: which model of each slice an expert is, by name.
    """

    base: str
    place: int | None
    apart: bool
    experts: Mapping[str, str]
    places: Mapping[str, int]

    @property
    def names(self) -> list[str]:
        """The name of each model of a slice, in their order; "" for one that has no parameters."""
        named = {place: name for name, place in self.places.items()}
        base = "" if self.apart else BASE
        return [named.get(place, base) for place in range(len(named) + (self.place is not None))]


def models_of(recipe: Recipe, named: Mapping[str, str]) -> Models:
    """Find the base and the experts.

    Where a method treats all models alike, the first is called the base.

    Args:
      named: where the results of earlier recipes of the file are, by name.

    Raises:
      RecipeError: the base is missing, or the slices or the number of models do not fit the method.
    """
    method, counts = MERGE_METHODS[recipe.method], {len(one.parts) for one in recipe.slices}
    if len(counts) > 1:
        raise RecipeError(f"{recipe.place}: the slices have {sorted(counts)} sources; give each slice as many.")
    if method.base in ("needed", "named") and not recipe.base:
        raise RecipeError(f"{recipe.place}: base_model is missing, which {recipe.method} needs.")
    columns = [[one.parts[place] for one in recipe.slices] for place in range(counts.pop())]
    place = next((i for i, parts in enumerate(columns) if {part.model for part in parts} == {recipe.base}), None)
    if recipe.slices[0].parts[0].layers and recipe.base and place is None:
        raise RecipeError(f"{recipe.place}: base_model {recipe.base} is not among the sources of every slice; add it.")
    _check_count(recipe, len(columns) + bool(recipe.base and place is None), method.models)
    places = {i: _where(parts, named) for i, parts in enumerate(columns)}
    base = named.get(recipe.base, recipe.base)
    if place is not None:
        base = places[place]
    elif not base:
        place, base = 0, places[0]
    others = [i for i in places if i != place] or [0]
    names = _names([columns[i][0].model for i in others])
    experts = {name: places[i] for name, i in zip(names, others, strict=True)}
    if len(columns) == 1 and place == 0:  # a model alone: it is the base and the expert
        place = None
    apart = method.base == "needed" or bool(recipe.base and method.base == "optional")
    return Models(base, place, apart, experts, dict(zip(names, others, strict=True)))


def _check_count(recipe: Recipe, count: int, allowed: tuple[int, int]) -> None:
    """Refuse more or fewer models than the method takes; the base counts."""
    least, most = allowed
    if least <= count <= most:
        return
    wanted = f"{least}" if least == most else f"at least {least}" if count < least else f"at most {most}"
    raise RecipeError(
        f"{recipe.slices[0].place}: {recipe.method} merges {wanted} models, the base among them, and these are {count}."
    )


def _where(parts: Sequence[Part], named: Mapping[str, str]) -> str:
    """Return where a model is: a place, or layers of several; runs of a model that follow one another are one."""
    if parts[0].layers is None:
        return named.get(parts[0].model, parts[0].model)
    runs: list[tuple[str, int, int]] = []
    for part in parts:
        model, (first, last) = named.get(part.model, part.model), part.layers
        if runs and runs[-1][0] == model and runs[-1][2] == first:
            runs[-1] = model, runs[-1][1], last
        else:
            runs.append((model, first, last))
    return LAYERS + ",".join(f"{model}[{first}:{last}]" for model, first, last in runs)


def _names(models: Sequence[str]) -> list[str]:
    """Name experts after the last part of where they are, each otherwise.

    >>> _names(["owner/law-7b@main", "models/law-7b", "./base/", "demo:math"])
    ['law-7b', 'law-7b-2', 'base-model', 'math']
    """
    names: list[str] = []
    for model in models:
        last = re.split(r"[/:]", re.sub(r"@[\w./-]+$", "", model.split("+")[-1]).rstrip("/"))[-1]
        plain = re.sub(r"[^\w.-]+", "-", last).lstrip(".-") or "model"
        plain = f"{plain}-model" if plain == BASE else plain
        count = sum(name == plain or re.fullmatch(rf"{re.escape(plain)}-\d+", name) is not None for name in names)
        names.append(f"{plain}-{count + 1}" if count else plain)
    return names


def tensors_of(specs: Mapping[str, TensorSpec], stored: Mapping[str, str]) -> tuple[list[Tensor], int]:
    """Return the tensors of a model as recipes see them, and the number of layers.

    Args:
      stored: the names of tensors in files, where these are others.
    """
    tensors, after = [], False
    for spec in specs.values():
        after = after or spec.layer is not None
        names = dict.fromkeys((spec.name, spec.stored, stored.get(spec.name, "")))
        tensors.append(Tensor(tuple(filter(None, names)), spec.kind, spec.layer, after and spec.layer is None))
    return tensors, layer_count(specs)
