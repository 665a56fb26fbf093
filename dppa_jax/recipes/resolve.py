"""Resolve a recipe: the value of every parameter for every tensor and model. Functions of names and layer numbers.

- A parameter is looked up with the source, then the slice, then the recipe: the first level where a rule matches.
- A gradient runs linearly over the layers of a slice: layer i of n has t = i/(n − 1), and t = 1 where n is 1.
- Tensors before the layers are those of the first slice, tensors after them those of the last; both have t = 0.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from dppa_jax.architecture.rules import nearest
from dppa_jax.recipes.document import RecipeError
from dppa_jax.recipes.methods import MERGE_METHODS, parameter
from dppa_jax.recipes.recipe import Recipe, Scalar, Setting, Slice

NEAR = 1e-9  # to a number of a gradient: a list with a number for each layer gives each its own


class Tensor(NamedTuple):
    """A tensor of the output.

    Attributes:
      names: its name here, and in files where that is another; a filter may be a part of either.
      kind: its name within a layer; the whole name outside the layers.
      layer: its layer; None outside the layers.
      after: does it come after the layers, as the head does?
    """

    names: tuple[str, ...]
    kind: str
    layer: int | None = None
    after: bool = False

    @property
    def name(self) -> str:
        """Its name here."""
        return self.names[0]


class Resolved(NamedTuple):
    """The value of every parameter.

    Attributes:
      merge: of parameters that are one for all models, by parameter and tensor.
      models: of parameters that each model has, by parameter, model and tensor; models are counted from 0, as their
        places in each slice.
    """

    merge: Mapping[str, Mapping[str, Scalar]]
    models: Mapping[str, Sequence[Mapping[str, Scalar]]]


def resolve(recipe: Recipe, tensors: Sequence[Tensor], layers: int, models: Sequence[str]) -> Resolved:
    """Return the value of every parameter of the recipe's method, for every tensor.

    Args:
      tensors: of the output.
      layers: of the output.
      models: the names of the models of a slice; "" for one that needs no parameters, as the base.

    Raises:
      RecipeError: a parameter is missing, or a filter is a part of no tensor's name.
    """
    _check_filters(recipe, tensors)
    places = [(tensor, *_place(recipe, tensor, layers)) for tensor in tensors]
    merge: dict[str, dict[str, Scalar]] = {}
    own: dict[str, list[dict[str, Scalar]]] = {}
    for name, default in MERGE_METHODS[recipe.method].parameters.items():
        if not parameter(recipe.method, name).of_model:
            merge[name] = {
                tensor.name: _looked_up(name, default, tensor, t, (one.parameters, recipe.parameters), recipe.place)
                for tensor, one, t in places
            }
            continue
        own[name] = [
            {
                tensor.name: _looked_up(
                    name,
                    default if models[place] else default or 1.0,
                    tensor,
                    t,
                    (one.parts[place].parameters, one.parameters, recipe.parameters),
                    one.parts[place].place,
                    one.parts[place].model,
                )
                for tensor, one, t in places
            }
            for place in range(len(models))
        ]
    return Resolved(merge, own)


def lengths(recipe: Recipe, layers: int) -> list[int]:
    """Return how many layers each slice gives the output; the models of a recipe without slices give all."""
    ranges = [one.parts[0].layers or (0, layers) for one in recipe.slices]
    return [last - first for first, last in ranges]


def _place(recipe: Recipe, tensor: Tensor, layers: int) -> tuple[Slice, float]:
    """Return the slice that a tensor of the output is of, and how far it lies between the ends of its gradients."""
    if tensor.layer is None:
        return recipe.slices[-1 if tensor.after else 0], 0.0
    i = tensor.layer
    for one, count in zip(recipe.slices, lengths(recipe, layers), strict=True):
        if i < count:
            return one, i / (count - 1) if count > 1 else 1.0
        i -= count
    raise ValueError(f"{tensor.name}: the recipe makes fewer layers.")


def _looked_up(
    name: str,
    default: Scalar | None,
    tensor: Tensor,
    t: float,
    levels: Iterable[Mapping[str, Setting]],
    place: str,
    model: str = "",
) -> Scalar:
    """Return a parameter's value from the first level that says one for a tensor."""
    for settings in levels:
        if name in settings and (found := value_of(settings[name], tensor.names, t)) is not None:
            return found
    if default is None:
        whose = f"of {model} " if model else ""
        raise RecipeError(f"{place}: the parameter {name} {whose}is missing for {tensor.name}; give it.")
    return default


def value_of(setting: Setting, names: Sequence[str], t: float) -> Scalar | None:
    """Return the value of the first rule that matches a tensor; None where none does.

    >>> value_of(Setting((("mlp", (1.0, 0.0)), ("*", (0.5,))), ""), ["model.layers.1.mlp.up_proj.weight"], 0.25)
    0.75
    """
    for pattern, numbers in setting.rules:
        if pattern == "*" or any(pattern in name for name in names):
            return _between(numbers, t)
    return None


def _between(numbers: Sequence[Scalar], t: float) -> Scalar:
    """Return the number at t, between the first (0) and the last (1) of evenly spaced numbers."""
    if len(numbers) == 1:
        return numbers[0]
    at = t * (len(numbers) - 1)
    if abs(at - round(at)) < NEAR:
        return numbers[round(at)]
    first = min(int(at), len(numbers) - 2)
    share = at - first
    return (1 - share) * numbers[first] + share * numbers[first + 1]


def _check_filters(recipe: Recipe, tensors: Sequence[Tensor]) -> None:
    """Refuse a filter that is a part of no tensor's name; mergekit leaves it out in silence."""
    names = [name for tensor in tensors for name in tensor.names]
    for setting in (setting for parameters in recipe.levels for setting in parameters.values()):
        for pattern, _ in setting.rules:
            if pattern != "*" and not any(pattern in name for name in names):
                words = {word for name in names for word in name.split(".") if not word.isdigit()}
                raise RecipeError(f"{setting.place}: no tensor has {pattern!r} in its name.{nearest(pattern, words)}")
