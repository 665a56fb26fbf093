"""The paper's figures, and those that its tables ask for, as matplotlib Figures of plain data.

A method has one colour and one marker in every figure. The colours are told apart with colour-blind eyes and on paper,
and no figure relies on colour alone.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib import style as styles
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dppa_jax.delta.presets import METHODS
from dppa_jax.evaluate.ratios import domain_ratio
from dppa_jax.evaluate.scores import Score, Scores
from dppa_jax.evaluate.tasks import Task
from dppa_jax.merging.inspection import KeptCounts
from dppa_jax.report.measurements import Measurements
from dppa_jax.report.paper import Domains, label, percent
from dppa_jax.search.adamerging import OUTSIDE, AdaMerged
from dppa_jax.search.rules import Visit

# Okabe and Ito 2008, Tol 2021.
METHOD_STYLES = {
    "task_arithmetic": ("#999933", "s"),
    "magnitude": ("#000000", "o"),
    "owl": ("#CC79A7", "^"),
    "dp": ("#882255", "v"),
    "dppa": ("#D55E00", "D"),
    "dare": ("#0072B2", "s"),
    "dare_dpa": ("#56B4E9", "P"),
    "darex_q": ("#44AA99", "X"),
    "ties": ("#332288", "<"),
    "dare_ties": ("#777777", ">"),
}
SEARCH_STYLES = {1: ("#009E73", "o"), 2: ("#E69F00", "s")}  # green and orange, as in the paper's figure 2
REFERENCES = "#777777"
LINES = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."), ("#CC79A7", ":"))  # of experts and domains, in turn

BINS = 256  # dimensions drawn side by side; more than a column of pixels would not show
PANEL = (3.6, 2.7)  # inches
MAX_COLUMNS = 3

_STYLE = [
    "default",
    {
        "svg.fonttype": "none",
        "svg.hashsalt": "dppa_jax",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans", "Arial", "sans-serif"],
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e3e6e8",
        "axes.axisbelow": True,
        "lines.linewidth": 1.4,
        "lines.markersize": 4.5,
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
        "figure.constrained_layout.h_pad": 0.08,
    },
]


@dataclass(frozen=True)
class Curve:
    """Values of a method by rate, all fractions, with what is below and above them."""

    method: str
    rates: tuple[float, ...]
    values: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Panel:
    """Curves of one task or domain, and levels to compare them with: "base", "dense expert"."""

    title: str
    curves: tuple[Curve, ...]
    references: Mapping[str, float] = field(default_factory=dict)


def svg(figure: Figure, name: str) -> str:
    """An svg element, the same for the same figure. Text is text; `name` sets its ids apart from other figures'."""
    out = io.StringIO()
    with styles.context(_STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg ") :].rstrip()
    prefix = re.sub(r"[^\w-]", "-", name)
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    return re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)  # 1/100 point is enough


@styles.context(_STYLE)
def search(visits: Sequence[Visit], rates: Sequence[float], best: Sequence[float] = (), title: str = "") -> Figure:
    """Score against factor for every partition and both methods. Source: Zhu et al. 2024, figure 2.

    Points of a line differ in this partition's factor alone; a method that comes back to a partition with other factors
    beside it draws another line.

    Args:
      visits: of one expert's search.
      rates: of the partitions, highest first.
      best: the factors chosen, marked by a vertical line.
    """
    figure, axes = _panels(len(rates), title)
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
    _legend(figure, axes)
    return figure


@styles.context(_STYLE)
def remaining(found: Sequence[KeptCounts], title: str = "") -> Figure:
    """What is left of every linear of a layer, by output and by input dimension. Source: Zhu et al. 2024, figure 3.

    A dimension's height is the share of its parameters that is kept. More than BINS dimensions are drawn in groups of
    equal size: a line for the mean of a group, a band from its least to its greatest.
    """
    linears = list(dict.fromkeys(item.linear for item in found))
    rates = sorted({item.rate for item in found})
    colours = dict(zip(rates, colormaps["viridis"](np.linspace(0.75, 0.0, len(rates))), strict=True))
    figure = Figure(figsize=(2 * PANEL[0], 1.4 * len(linears) + 0.8))
    grid = figure.subplots(len(linears), 2, squeeze=False)
    for row, name in zip(grid, linears, strict=True):
        for item in sorted((item for item in found if item.linear == name), key=lambda item: item.rate):
            for ax, kept, of in ((row[0], item.rows, item.columns.size), (row[1], item.columns, item.rows.size)):
                _draw_dimensions(ax, 100 * kept / of, colours[item.rate], f"{percent(item.rate)} removed")
        row[0].set_ylabel(f"{_short(name)}\nkept (%)")
    grid[-1][0].set_xlabel("output dimension")
    grid[-1][1].set_xlabel("input dimension")
    figure.suptitle(title or None)
    _legend(figure, figure.axes)
    return figure


@styles.context(_STYLE)
def against_rate(panels: Sequence[Panel], quantity: str, title: str = "") -> Figure:
    """Curves of methods against the share removed; `quantity` names the vertical axis, its unit (%) is added."""
    figure, axes = _panels(len(panels), title)
    for ax, panel in zip(axes, panels, strict=True):
        ticks = sorted({round(100 * rate, 4) for curve in panel.curves for rate in curve.rates})
        span = (ticks[-1] - ticks[0] or 10.0) if ticks else 0.0
        for i, curve in enumerate(panel.curves):
            colour, marker = METHOD_STYLES[curve.method]
            aside = 0.008 * span * (i - (len(panel.curves) - 1) / 2)  # so that bars do not hide each other
            rates = 100 * np.asarray(curve.rates) + aside
            values, low, high = (100 * np.asarray(x) for x in (curve.values, curve.low, curve.high))
            bars = np.maximum([values - low, high - values], 0.0)
            ax.errorbar(
                rates, values, bars, color=colour, marker=marker, elinewidth=0.8, capsize=1.5, label=label(curve.method)
            )
        for (name, level), line in zip(panel.references.items(), ("--", ":", "-."), strict=False):
            ax.axhline(100 * level, color=REFERENCES, linestyle=line, linewidth=1, label=name)
        ax.set_title(panel.title)
        ax.set_xlabel("share removed (%)")
        ax.set_ylabel(f"{quantity} (%)")
        ax.set_xticks(ticks)
        ax.set_ylim(bottom=0)
    _legend(figure, axes)
    return figure


@styles.context(_STYLE)
def rates(found: Mapping[str, Float[np.ndarray, "layers kinds"]], kinds: Sequence[str], title: str = "") -> Figure:
    """The share removed of every linear of every layer, one heat map per expert, all on one scale."""
    percents = {name: 100 * np.asarray(table) for name, table in found.items()}
    low, high = (f([f(t) for t in percents.values()]) for f in (np.nanmin, np.nanmax))
    room = 0.5 if high - low < 0.01 else 0.0  # one rate for all has a scale, too
    layers = max(table.shape[0] for table in percents.values())
    figure = Figure(figsize=(2.6 * len(percents) + 1, max(2.6, 0.17 * layers + 1.4)))
    axes = figure.subplots(1, len(percents), squeeze=False, sharey=True)[0]
    for ax, (name, table) in zip(axes, percents.items(), strict=True):
        ax.grid(False)
        image = ax.imshow(table, aspect="auto", cmap="cividis", vmin=low - room, vmax=high + room)
        ax.set_title(label(name))
        ax.set_xticks(range(len(kinds)), map(_short, kinds), rotation=60, ha="right", rotation_mode="anchor")
        ax.set_yticks(range(0, table.shape[0], max(1, table.shape[0] // 16)))
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="share removed (%)")
    figure.suptitle(title or None)
    return figure


@styles.context(_STYLE)
def adamerging(found: AdaMerged, title: str = "") -> Figure:
    """Entropy and coefficients against the step; with several coefficients per expert also heat maps of the last ones.

    The lines of coefficients are means over an expert's groups, with a band from the least to the greatest.
    """
    maps = _coefficient_maps(found)
    figure = Figure(figsize=(2 * PANEL[0], PANEL[1] + 0.6 + (_map_height(maps) if maps else 0.0)))
    top, bottom = figure.subfigures(2, 1, height_ratios=(PANEL[1], _map_height(maps))) if maps else (figure, None)
    entropy, coefficients = top.subplots(1, 2)
    at = np.arange(1, found.steps + 1)
    for (colour, line), name, values in zip(cycle(LINES), found.domains, found.domain_entropies.T):
        entropy.plot(at, values, color=colour, linestyle=line, linewidth=0.8, label=label(name))
    if len(found.domains) > 1:
        entropy.plot(at, found.entropies, color="#000000", label="sum")
    entropy.set_ylabel("entropy (nats)")
    for (colour, line), name, values in zip(cycle(LINES), found.experts, found.history.T):
        coefficients.plot(at, values.mean(axis=0), color=colour, linestyle=line, label=label(name))
        if len(found.groups) > 1:
            coefficients.fill_between(at, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)
    coefficients.set_ylabel("coefficient")
    for ax in (entropy, coefficients):
        ax.set_xlabel("step")
        ax.legend()
    if maps:
        _draw_maps(bottom, maps)
    figure.suptitle(title or None)
    return figure


def _coefficient_maps(found: AdaMerged) -> list[tuple[str, list[str], list[str], np.ndarray]]:
    """(title, names of columns, names of rows, coefficients) of every heat map."""
    if len(found.groups) == 1:
        return []
    if found.granularity == "layer":
        rows = [name if name == OUTSIDE else name.removeprefix("layer ") for name in found.groups]
        return [("", [label(name) for name in found.experts], rows, found.final)]
    layers: dict[str, dict[str, int]] = {}
    outside = {}
    for i, name in enumerate(found.groups):
        inner = re.fullmatch(r"model\.layers\.(\d+)\.(?:self_attn\.|mlp\.)?(.+)\.weight", name)
        if inner:
            layers.setdefault(inner[1], {})[inner[2]] = i
        else:
            outside[name.removesuffix(".weight").removeprefix("model.")] = i
    columns = list(next(iter(layers.values())))
    maps = []
    for name, values in zip(found.experts, found.final.T, strict=True):
        rest = ", ".join(f"{short} {values[i]:.2f}" for short, i in outside.items())
        table = np.array([[values[of[column]] for column in columns] for of in layers.values()])
        maps.append((f"{label(name)}\n{rest}", columns, list(layers), table))
    return maps


def _map_height(maps) -> float:
    return max(2.6, 0.17 * max(len(rows) for _, _, rows, _ in maps) + 1.6)


def _draw_maps(figure, maps) -> None:
    """Side by side on one scale."""
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


def accuracy_panels(measured: Mapping[int, Measurements], domains: Domains) -> list[Panel]:
    """Accuracy of single experts by task: with one seed its 95 % interval, with several their standard deviation."""
    panels = []
    for domain, tasks in domains.items():
        for task in tasks:
            curves = [
                _curve(
                    method,
                    {rate: [scores[task.name] for scores in _singles(measured, method, rate, domain)] for rate in of},
                )
                for method, of in _rates_of(measured, domain).items()
            ]
            references = {
                "dense expert": _mean([m.experts[task.name].accuracy for m in measured.values()]),
                "base": _mean([m.base[task.name].accuracy for m in measured.values()]),
            }
            panels.append(Panel(f"{label(domain)}: {task.name}", tuple(curves), references))
    return panels


def ratio_panels(measured: Mapping[int, Measurements], domains: Domains) -> list[Panel]:
    """Domain ratio of single experts by domain, with the standard deviation over seeds."""

    panels = []
    for domain in domains:
        curves = [
            _curve(method, {rate: _ratios(measured, domains[domain], (method, rate, domain)) for rate in of})
            for method, of in _rates_of(measured, domain).items()
        ]
        panels.append(Panel(label(domain), tuple(curves), {"dense expert": 1.0}))
    return panels


def _singles(measured: Mapping[int, Measurements], *key) -> list[Scores]:
    """Of every seed that measured this (method, rate, expert)."""
    return [m.single[key] for m in measured.values() if key in m.single]


def _ratios(measured: Mapping[int, Measurements], tasks: Sequence[Task], key: tuple[str, float, str]) -> list[float]:
    names = [task.name for task in tasks]
    return [
        domain_ratio([m.single[key][n].accuracy for n in names], [m.experts[n].accuracy for n in names])
        for m in measured.values()
        if key in m.single
    ]


def _rates_of(measured: Mapping[int, Measurements], domain: str) -> dict[str, list[float]]:
    found: dict[str, set[float]] = {}
    for m in measured.values():
        for method, rate, expert in m.single:
            if expert == domain and METHODS[method].score:
                found.setdefault(method, set()).add(rate)
    return {method: sorted(of) for method, of in found.items()}


def _curve(method: str, seeds: Mapping[float, Sequence[Score | float]]) -> Curve:
    """`seeds`: by rate, what every seed measured."""
    values, low, high = [], [], []
    for found in seeds.values():
        numbers = [x.accuracy if isinstance(x, Score) else x for x in found]
        spread = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else 0.0
        mean = _mean(numbers)
        one = found[0]
        bounds = one.interval if len(found) == 1 and isinstance(one, Score) else (mean - spread, mean + spread)
        values.append(mean)
        low.append(bounds[0])
        high.append(bounds[1])
    return Curve(method, tuple(seeds), tuple(values), tuple(low), tuple(high))


def _short(linear: str) -> str:
    return linear.rpartition(".")[2]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _panels(count: int, title: str) -> tuple[Figure, list[Axes]]:
    columns = min(count, MAX_COLUMNS)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows + 0.6))
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for ax in axes[count:]:
        ax.remove()
    figure.suptitle(title or None)
    return figure, axes[:count]


def _draw_dimensions(ax: Axes, share: np.ndarray, colour, name: str) -> None:
    groups = np.array_split(share, min(BINS, share.size))
    middle = np.cumsum([0, *(len(group) for group in groups[:-1])]) + [(len(group) - 1) / 2 for group in groups]
    ax.plot(middle, [group.mean() for group in groups], color=colour, linewidth=0.8, label=name)
    if len(groups) < share.size:
        least, greatest = [group.min() for group in groups], [group.max() for group in groups]
        ax.fill_between(middle, least, greatest, color=colour, alpha=0.2, linewidth=0)
    ax.set_xlim(-0.5, share.size - 0.5)
    ax.set_ylim(bottom=0)


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One for all panels, below them: curves first, then the levels and marks, which have no marker."""
    found = {name: handle for ax in axes for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    names = sorted(found, key=lambda name: isinstance(found[name], Line2D) and found[name].get_marker() == "None")
    if names:
        columns = min(len(names), int(figure.get_figwidth() / 1.3))
        figure.legend([found[name] for name in names], names, loc="outside lower center", ncols=columns)
