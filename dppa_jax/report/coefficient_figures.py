"""The figure of AdaMerging: entropy and coefficients against the step, and heat maps of the coefficients."""

import re
from itertools import cycle

import numpy as np
from matplotlib import style as styles
from matplotlib.figure import Figure

from dppa_jax.report.labels import label
from dppa_jax.report.styles import LINES, PANEL, STYLE
from dppa_jax.search.adamerging_state import AdaMerged
from dppa_jax.search.coefficients import OUTSIDE


@styles.context(STYLE)
def draw_adamerging(result: AdaMerged, title: str = "") -> Figure:
    """Draw entropy and coefficients against the step.

    An expert with several coefficients has a line for their mean and a band from the lowest to the highest; below, heat
    maps show the last ones.
    """
    maps = _coefficient_maps(result)
    figure = Figure(figsize=(2 * PANEL[0], PANEL[1] + 0.6 + (_map_height(maps) if maps else 0.0)))
    top, bottom = figure.subfigures(2, 1, height_ratios=(PANEL[1], _map_height(maps))) if maps else (figure, None)
    entropy, coefficients = top.subplots(1, 2)
    at = np.arange(1, result.steps + 1)
    for (colour, line), name, values in zip(cycle(LINES), result.domains, result.domain_entropies.T):
        entropy.plot(at, values, color=colour, linestyle=line, linewidth=0.8, label=label(name))
    if len(result.domains) > 1:
        entropy.plot(at, result.entropies, color="#000000", label="sum")
    entropy.set_ylabel("entropy (nats)")
    for (colour, line), name, values in zip(cycle(LINES), result.experts, result.history.T):
        coefficients.plot(at, values.mean(axis=0), color=colour, linestyle=line, label=label(name))
        if len(result.groups) > 1:
            coefficients.fill_between(at, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)
    coefficients.set_ylabel("coefficient")
    for ax in (entropy, coefficients):
        ax.set_xlabel("step")
        ax.legend()
    if maps:
        _draw_maps(bottom, maps)
    figure.suptitle(title or None)
    return figure


def _coefficient_maps(result: AdaMerged) -> list[tuple[str, list[str], list[str], np.ndarray]]:
    """Return (title, names of columns, names of rows, coefficients) of every heat map."""
    if len(result.groups) == 1:
        return []
    if result.granularity == "layer":
        rows = [name if name == OUTSIDE else name.removeprefix("layer ") for name in result.groups]
        return [("", [label(name) for name in result.experts], rows, result.final)]
    layers: dict[str, dict[str, int]] = {}
    outside = {}
    for i, name in enumerate(result.groups):
        inner = re.fullmatch(r"model\.layers\.(\d+)\.(?:self_attn\.|mlp\.)?(.+)\.weight", name)
        if inner:
            layers.setdefault(inner[1], {})[inner[2]] = i
        else:
            outside[name.removesuffix(".weight").removeprefix("model.")] = i
    columns = list(next(iter(layers.values())))
    maps = []
    for name, values in zip(result.experts, result.final.T, strict=True):
        rest = ", ".join(f"{short} {values[i]:.2f}" for short, i in outside.items())
        table = np.array([[values[layer[column]] for column in columns] for layer in layers.values()])
        maps.append((f"{label(name)}\n{rest}", columns, list(layers), table))
    return maps


def _map_height(maps) -> float:
    """Return the height of the heat maps in inches."""
    return max(2.6, 0.17 * max(len(rows) for _, _, rows, _ in maps) + 1.6)


def _draw_maps(figure, maps) -> None:
    """Draw heat maps side by side on one scale."""
    low, high = (pick(table.max() if pick is max else table.min() for *_, table in maps) for pick in (min, max))
    room = 0.005 if high - low < 1e-4 else 0.0
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    for ax, (title, columns, rows, table) in zip(axes, maps, strict=True):
        ax.grid(False)
        image = ax.imshow(table, aspect="auto", cmap="cividis", vmin=low - room, vmax=high + room)
        ax.set_title(title or None, fontsize=8)
        ax.set_xticks(range(len(columns)), columns, rotation=60, ha="right", rotation_mode="anchor")
        every = max(1, len(rows) // 16)
        shown = sorted({*range(0, len(rows), every), *(i for i, row in enumerate(rows) if row == OUTSIDE)})
        ax.set_yticks(shown, [rows[i] for i in shown])
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="coefficient")
