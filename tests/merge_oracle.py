"""Merges in numpy, from the formulas, of the tensors of files: what `test_families` holds merges against."""

from collections.abc import Mapping, Sequence

import numpy as np
from small_models import layer_of, linears_of

Tensors = Mapping[str, np.ndarray]
F32 = np.float32


def kept(delta: np.ndarray, rate: float) -> np.ndarray:
    """Elements whose |δ| is above sorted[int(n·rate)]."""
    size = np.abs(delta)
    if rate in (0, 1):
        return np.full(size.shape, rate == 0)
    return size > np.sort(size, axis=None)[int(size.size * rate)]


def split(deltas: Tensors, config: Mapping) -> dict[tuple[str, int], np.ndarray]:
    """The rows of every linear of an expert, by the tensor of the file and its number there."""
    cut = {}
    for name, delta in deltas.items():
        for number, rows in enumerate(linears_of(name, delta, config)):
            cut[name, number] = delta.reshape(-1, delta.shape[-1])[rows]
    return cut


def joined(deltas: Tensors, linears: Mapping[tuple[str, int], np.ndarray], config: Mapping) -> dict[str, np.ndarray]:
    """Deltas with these in place of their linears."""
    found = {name: delta.copy() for name, delta in deltas.items()}
    for (name, number), linear in linears.items():
        matrix = found[name].reshape(-1, found[name].shape[-1])
        matrix[linears_of(name, found[name], config)[number]] = linear
    return found


def dp_rates(linears: Mapping[tuple[str, int], np.ndarray], rate: float, multiple: float, most: float) -> dict:
    """The rate of every linear: Zhu et al. 2024, eqs. 1 to 5, sums of outlying magnitudes."""
    layers = sorted({layer_of(name) for name, _ in linears})
    size = {key: np.abs(delta).astype(np.float64) for key, delta in linears.items()}
    of_layer = {n: np.concatenate([s.ravel() for key, s in size.items() if layer_of(key[0]) == n]) for n in layers}
    outliers = np.array([s[s > F32(multiple) * F32(s.mean())].sum() for s in of_layer.values()])
    f = most * (outliers - outliers.mean()) / np.abs(outliers - outliers.mean()).max()
    own = np.array([s[s > F32(multiple) * F32(s.mean())].sum() / s.size for s in size.values()])
    own, numel = own / own.mean(), np.array([s.size for s in size.values()])
    centred = own - (own * numel).sum() / numel.sum()
    g = most * centred / np.abs(centred).max()
    rates = [rate - f[layers.index(layer_of(key[0]))] - g[i] for i, key in enumerate(size)]
    return dict(zip(size, np.clip(rates, 0, 1), strict=True))


def dppa(deltas: Tensors, config: Mapping, rates: Sequence[float], factors: Sequence[float]) -> dict[str, np.ndarray]:
    """DP, then DPA: an element takes the factor of the highest rate that keeps it; what is not pruned the highest's."""
    linears = split(deltas, config)
    weight = {key: np.zeros(delta.shape, F32) for key, delta in linears.items()}
    for rate, factor in reversed(list(zip(rates, factors, strict=True))):
        for key, own in dp_rates(linears, rate, 2.0, 0.08).items():
            weight[key][kept(linears[key], own)] = factor
    scaled = {key: weight[key] * delta for key, delta in linears.items()}
    return joined({name: F32(factors[0]) * delta for name, delta in deltas.items()}, scaled, config)


def trimmed(deltas: Tensors, config: Mapping, rate: float) -> dict[str, np.ndarray]:
    """Linears without their smallest elements."""
    linears = {key: np.where(kept(delta, rate), delta, F32(0)) for key, delta in split(deltas, config).items()}
    return joined(deltas, linears, config)


def elected(deltas: Sequence[np.ndarray]) -> np.ndarray:
    """Elect a sign by the sum, and average what has it: Yadav et al. 2023."""
    sign = np.where(sum(deltas) >= 0, F32(1), F32(-1))
    agree = [delta * sign > 0 for delta in deltas]
    total = sum(np.where(a, delta, F32(0)) for a, delta in zip(agree, deltas, strict=True))
    return total / np.maximum(sum(a.astype(F32) for a in agree), F32(1))
