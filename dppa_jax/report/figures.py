"""The figures of a search, of what a merge keeps, and of its rates, as matplotlib Figures of plain data."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib import style as styles
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dppa_jax.merging.inspection import KeptCounts
from dppa_jax.report.labels import label, percent
from dppa_jax.report.styles import PANEL, REFERENCES, SEARCH_STYLES, STYLE, legend, make_panels, short_name
from dppa_jax.search.rules import Visit

BINS = 256  # dimensions drawn side by side; more of them would be less than a pixel wide


@styles.context(STYLE)
def draw_search(visits: Sequence[Visit], rates: Sequence[float], best: Sequence[float] = (), title: str = "") -> Figure:
    """Draw score against factor, a panel for each partition and a line for each method of the search.

    The points of one line differ in this partition's factor only. If a method comes back to a partition with other
    factors beside it, that is another line. Source: Zhu et al. 2024, figure 2.

    Args:
      visits: the candidates of one expert's search.
      rates: the partitions' rates, highest first.
      best: the factors that were chosen, marked by vertical lines.
      title: above all panels.
    """
    figure, axes = make_panels(len(rates), title)
    for partition, (ax, rate) in enumerate(zip(axes, rates, strict=True)):
        lines: dict[tuple, dict[float, float]] = {}
        for visit in visits:
            if visit.partition == partition:
                beside = visit.factors[:partition] + visit.factors[partition + 1 :]
                lines.setdefault((visit.method, beside), {})[visit.factors[partition]] = 100 * visit.score
        for (method, _), points in lines.items():
            colour, marker = SEARCH_STYLES[method]
            factors = sorted(points)
            ax.plot(factors, [points[f] for f in factors], color=colour, marker=marker, label=f"Method {method}")
        if best:
            ax.axvline(best[partition], color=REFERENCES, linestyle=":", label="chosen")
        ax.set_title(f"partition of {percent(rate)}")
        ax.set_xlabel("amplification factor")
        ax.set_ylabel("domain ratio (%)")
    legend(figure, axes)
    return figure


@styles.context(STYLE)
def draw_kept_counts(counts: Sequence[KeptCounts], title: str = "") -> Figure:
    """Draw what is left of each linear of a layer, by output and by input dimension.

    The height at a dimension is the share of its parameters that is kept. More than BINS dimensions are drawn in groups
    of equal size: a line for a group's mean, a band from its lowest to its highest. Source: Zhu et al. 2024, figure 3.
    """
    linears = list(dict.fromkeys(item.linear for item in counts))
    rates = sorted({item.rate for item in counts})
    colours = dict(zip(rates, colormaps["viridis"](np.linspace(0.75, 0.0, len(rates))), strict=True))
    figure = Figure(figsize=(2 * PANEL[0], 1.4 * len(linears) + 0.8))
    grid = figure.subplots(len(linears), 2, squeeze=False)
    for row, name in zip(grid, linears, strict=True):
        for item in sorted((item for item in counts if item.linear == name), key=lambda item: item.rate):
            for ax, kept, of in ((row[0], item.rows, item.columns.size), (row[1], item.columns, item.rows.size)):
                _draw_dimensions(ax, 100 * kept / of, colours[item.rate], f"{percent(item.rate)} removed")
        row[0].set_ylabel(f"{short_name(name)}\nkept (%)")
    grid[-1][0].set_xlabel("output dimension")
    grid[-1][1].set_xlabel("input dimension")
    figure.suptitle(title or None)
    legend(figure, figure.axes)
    return figure


@styles.context(STYLE)
def draw_rates(rates: Mapping[str, Float[np.ndarray, "layers kinds"]], kinds: Sequence[str], title: str = "") -> Figure:
    """Draw the share removed from every linear of every layer: a heat map for each expert, all on one scale.

    Args:
      rates: shares by expert, from 0 to 1; NaN where a layer has no linear of a kind.
      kinds: the kinds of linears that the columns stand for.
      title: above all heat maps.
    """
    percents = {name: 100 * np.asarray(table) for name, table in rates.items()}
    low, high = (f([f(t) for t in percents.values()]) for f in (np.nanmin, np.nanmax))
    room = 0.5 if high - low < 0.01 else 0.0  # a scale even if all rates are equal
    layers = max(table.shape[0] for table in percents.values())
    figure = Figure(figsize=(2.6 * len(percents) + 1, max(2.6, 0.17 * layers + 1.4)))
    axes = figure.subplots(1, len(percents), squeeze=False, sharey=True)[0]
    for ax, (name, table) in zip(axes, percents.items(), strict=True):
        ax.grid(False)
        image = ax.imshow(table, aspect="auto", cmap="cividis", vmin=low - room, vmax=high + room)
        ax.set_title(label(name))
        ax.set_xticks(range(len(kinds)), map(short_name, kinds), rotation=60, ha="right", rotation_mode="anchor")
        ax.set_yticks(range(0, table.shape[0], max(1, table.shape[0] // 16)))
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="share removed (%)")
    figure.suptitle(title or None)
    return figure


def _draw_dimensions(ax: Axes, share: np.ndarray, colour, name: str) -> None:
    """Draw a share for every dimension, in at most BINS groups."""
    groups = np.array_split(share, min(BINS, share.size))
    middle = np.cumsum([0, *(len(group) for group in groups[:-1])]) + [(len(group) - 1) / 2 for group in groups]
    ax.plot(middle, [group.mean() for group in groups], color=colour, linewidth=0.8, label=name)
    if len(groups) < share.size:
        least, greatest = [group.min() for group in groups], [group.max() for group in groups]
        ax.fill_between(middle, least, greatest, color=colour, alpha=0.2, linewidth=0)
    ax.set_xlim(-0.5, share.size - 0.5)
    ax.set_ylim(bottom=0)
