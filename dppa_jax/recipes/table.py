"""The resolved table of a recipe: tensors × parameters, with one row for all that have the same values."""

from collections.abc import Iterable, Sequence

from dppa_jax.recipes.recipe import Scalar
from dppa_jax.recipes.resolve import Resolved, Tensor

Row = dict[str, str]
Values = tuple[tuple[str, Scalar], ...]


def rows_of(resolved: Resolved, tensors: Sequence[Tensor], models: Sequence[str]) -> list[Row]:
    """Return the rows of the table.

    Args:
      tensors: as they were resolved.
      models: the names of the models, by their places in the recipe; "" for one that has no parameters.

    Returns:
      Of each row "tensors" and "layers", and the value of every parameter: "t", "weight of NAME".
    """
    groups: list[tuple[list[str], list[int], Values]] = []
    for kinds, layer, values in _by_layer(resolved, tensors, models):
        before = next((own for own in groups if own == (kinds, own[1], values) and own[1][-1] == layer - 1), None)
        if layer > 0 and before:
            before[1].append(layer)
        else:
            groups.append((kinds, [layer], values))
    every = list(dict.fromkeys(tensor.kind for tensor in tensors if tensor.layer is not None))
    return [
        {
            "tensors": "all of a layer" if kinds == every else ", ".join(kinds),
            "layers": "" if layers[0] < 0 else str(layers[0]) if len(layers) == 1 else f"{layers[0]}–{layers[-1]}",
            **{name: shown(value) for name, value in values},
        }
        for kinds, layers, values in groups
    ]


def _by_layer(
    resolved: Resolved, tensors: Sequence[Tensor], models: Sequence[str]
) -> Iterable[tuple[list[str], int, Values]]:
    """Yield the kinds of each layer that have the same values, with the layer and the values; -1 outside the layers."""
    found: dict[tuple[int, Values], list[str]] = {}
    for tensor in tensors:
        layer = -1 if tensor.layer is None else tensor.layer
        kinds = found.setdefault((layer, _values(resolved, tensor.name, models)), [])
        if tensor.kind not in kinds:
            kinds.append(tensor.kind)
    for (layer, values), kinds in sorted(found.items(), key=lambda item: item[0][0]):
        yield kinds, layer, values


def _values(resolved: Resolved, name: str, models: Sequence[str]) -> Values:
    """Return the value of every parameter for a tensor."""
    merge = [(parameter, values[name]) for parameter, values in resolved.merge.items()]
    own = [
        (f"{parameter} of {model}", values[name])
        for parameter, by_model in resolved.models.items()
        for model, values in zip(models, by_model, strict=True)
        if model
    ]
    return (*merge, *own)


def shown(value: Scalar) -> str:
    """Write a value as a recipe has it.

    >>> shown(True), shown(0.30000000000000004)
    ('true', '0.3')
    """
    return str(value).lower() if isinstance(value, bool) else f"{value:.6g}"
