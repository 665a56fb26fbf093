"""Which tensors share a coefficient, and coefficients by name."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dppa_jax.architecture.rules import first_match
from dppa_jax.architecture.specs import TensorSpec, layer_count
from dppa_jax.config.merge import MergeConfig
from dppa_jax.config.numbers import Coefficient

OUTSIDE = "outside the layers"


class Groups(NamedTuple):
    """What shares a coefficient.

    Attributes:
      names: of the groups: "all", "layer 3", a tensor's name.
      of_tensor: the group of every tensor, (tensors,) int32.
      tensors: the tensors' names.
    """

    names: tuple[str, ...]
    of_tensor: np.ndarray
    tensors: tuple[str, ...]


def groups_of(granularity: str, specs: Mapping[str, TensorSpec]) -> Groups:
    """Group the tensors: all together ("task"), by decoder layer ("layer"), or each by itself ("linear")."""
    tensors = tuple(specs)
    if granularity == "task":
        return Groups(("all",), np.zeros(len(specs), np.int32), tensors)
    if granularity == "linear":
        return Groups(tensors, np.arange(len(specs), dtype=np.int32), tensors)
    layers = layer_count(specs)
    of_tensor = [layers if spec.layer is None else spec.layer for spec in specs.values()]
    return Groups((*(f"layer {i}" for i in range(layers)), OUTSIDE), np.array(of_tensor, np.int32), tensors)


def fixed_coefficients(merge: MergeConfig, specs: Mapping[str, TensorSpec]) -> np.ndarray:
    """Return what `--tensor_coefficient` rules decide for all experts, (tensors,), NaN where they are silent."""
    decided = (first_match(merge.tensor_coefficients, name) for name in specs)
    return np.array([math.nan if value is None else value for value in decided], np.float32)


def named_coefficients(values: np.ndarray, groups: Groups, experts: Sequence[str]) -> dict[str, Coefficient]:
    """Name (groups, experts) coefficients as `MergeConfig.coefficients` takes them."""
    numbers = short_floats(values)
    if len(groups.names) == 1:
        return {name: numbers[0][k] for k, name in enumerate(experts)}
    pairs = list(zip(groups.tensors, groups.of_tensor, strict=True))
    return {name: {tensor: numbers[group][k] for tensor, group in pairs} for k, name in enumerate(experts)}


def clip(raw: np.ndarray) -> np.ndarray:
    """Keep coefficients in [0, 1]."""
    return np.clip(raw, 0.0, 1.0)


def short_floats(array: np.ndarray) -> list:
    """Return nested lists of the shortest decimals that round to the same float32 numbers; float64 as they are."""
    if array.dtype != np.float32:
        return array.tolist()
    return np.vectorize(lambda x: float(str(x)), otypes=[object])(array).tolist() if array.size else array.tolist()
