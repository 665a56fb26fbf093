"""The look of every figure: colours, markers, panels, legends, and figures as SVG.

A method has one colour and one marker in every figure. The colours of `METHOD_STYLES` can be told apart by colour-blind
readers and in print. No figure relies on colour alone.
"""

import io
import math
import re
from collections.abc import Sequence

from matplotlib import style as styles
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dppa_jax.config.combinations import axis
from dppa_jax.config.q import ways
from dppa_jax.config.report import Choice
from dppa_jax.delta.presets import METHODS

# Colours by Okabe and Ito 2008 and Tol 2021. Other methods get theirs from `method_style`.
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
SPARE_MARKERS = ("p", "*", "h", "8", "d", "H")  # for other methods, in turn; then stars with 6, 7, 8 … points
SEARCH_STYLES = {1: ("#009E73", "o"), 2: ("#E69F00", "s")}  # green and orange, as in the paper's figure 2
REFERENCES = "#777777"  # levels and marks to compare curves with
LINES = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."), ("#CC79A7", ":"))  # for experts and domains, in turn

PANEL = (3.6, 2.7)  # inches
MAX_COLUMNS = 3

STYLE = [  # for matplotlib.style.context
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


def method_style(method: str) -> tuple[str, str | tuple[int, int, int]]:
    """Return the colour and the marker of a method, which no other method has.

    With another score, or a way to find q, it keeps its colour and gets a polygon: the corners tell the way, and how it
    is turned the score.

    A method without a row in `METHOD_STYLES` gets them by its place among all such methods: the hue moves on by the
    golden ratio, so that neighbours differ, and the marker is the next spare one.
    """
    choice = Choice.of(method)
    if choice.name != choice.method:
        corners = 3 + ["", *ways()].index(choice.way)
        turned = 15 * ["", *axis("score")].index(choice.score)
        return method_style(choice.method)[0], (corners, 0, turned)
    if method in METHOD_STYLES:
        return METHOD_STYLES[method]
    place = [name for name in METHODS if name not in METHOD_STYLES].index(method)
    hue = (0.28 + place * 0.618034) % 1.0
    saturation, value = ((0.95, 0.75), (0.55, 0.55), (0.75, 0.95))[place % 3]
    marker = SPARE_MARKERS[place] if place < len(SPARE_MARKERS) else (place, 1, 0)  # a star with `place` points
    return to_hex(hsv_to_rgb((hue, saturation, value))), marker


def svg(figure: Figure, name: str) -> str:
    """Return a figure as an svg element, with text as text. The same figure gives the same element.

    `name` becomes a part of all ids, so that the figures of one page share none.
    """
    out = io.StringIO()
    with styles.context(STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg ") :].rstrip()
    prefix = re.sub(r"[^\w-]", "-", name)
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    return re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)  # 1/100 point is enough


def make_panels(count: int, title: str) -> tuple[Figure, list[Axes]]:
    """Return a figure with `count` panels in rows of at most `MAX_COLUMNS`, and the axes of the panels."""
    columns = min(count, MAX_COLUMNS)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows + 0.6))
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for ax in axes[count:]:
        ax.remove()
    figure.suptitle(title or None)
    return figure, axes[:count]


def legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Draw one legend for all panels below them: first curves, then levels and marks, which have no marker."""
    handles = {name: handle for ax in axes for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    names = sorted(handles, key=lambda name: isinstance(handles[name], Line2D) and handles[name].get_marker() == "None")
    if names:
        columns = min(len(names), int(figure.get_figwidth() / 1.3))
        figure.legend([handles[name] for name in names], names, loc="outside lower center", ncols=columns)


def short_name(linear: str) -> str:
    """Return the last part of a linear's name: "q_proj" for "self_attn.q_proj"."""
    return linear.rpartition(".")[2]
