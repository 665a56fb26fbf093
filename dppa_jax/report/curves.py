"""Curves of methods against the share removed: what they are made from, and the figure.

Source: Zhu et al. 2024, appendix A, whose tables these curves show.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib import style as styles
from matplotlib.figure import Figure

from dppa_jax.evaluate.ratios import domain_ratio
from dppa_jax.evaluate.scores import Score, Scores
from dppa_jax.evaluate.tasks import Task
from dppa_jax.report.labels import label
from dppa_jax.report.measurements import Measurements, prunes
from dppa_jax.report.paper import Domains
from dppa_jax.report.styles import REFERENCES, STYLE, legend, make_panels, method_style


@dataclass(frozen=True)
class Curve:
    """The values of one method at several rates, with the ends of their intervals; all are fractions."""

    method: str
    rates: tuple[float, ...]
    values: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Panel:
    """The curves of one task or domain, and named levels to compare them with, such as "base" and "dense expert"."""

    title: str
    curves: tuple[Curve, ...]
    references: Mapping[str, float] = field(default_factory=dict)


@styles.context(STYLE)
def draw_against_rate(panels: Sequence[Panel], quantity: str, title: str = "") -> Figure:
    """Draw the curves of methods against the share removed.

    Args:
      panels: one for each task or domain.
      quantity: the name of the vertical axis; its unit (%) is added.
      title: above all panels.
    """
    figure, axes = make_panels(len(panels), title)
    for ax, panel in zip(axes, panels, strict=True):
        ticks = sorted({round(100 * rate, 4) for curve in panel.curves for rate in curve.rates})
        span = (ticks[-1] - ticks[0] or 10.0) if ticks else 0.0
        for i, curve in enumerate(panel.curves):
            colour, marker = method_style(curve.method)
            aside = 0.008 * span * (i - (len(panel.curves) - 1) / 2)  # keeps error bars from hiding each other
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
    legend(figure, axes)
    return figure


def accuracy_panels(measured: Mapping[int, Measurements], domains: Domains) -> list[Panel]:
    """Return a panel for each task: the accuracy of the pruned expert of its domain.

    With one seed an interval is the 95 % interval of the accuracy; with several it is ± one standard deviation.
    """
    panels = []
    for domain, tasks in domains.items():
        for task in tasks:
            curves = []
            for method, rates in _measured_rates(measured, domain).items():
                scores = {rate: _seed_scores(measured, method, rate, domain) for rate in rates}
                curves.append(_curve(method, {rate: [s[task.name] for s in seeds] for rate, seeds in scores.items()}))
            references = {
                "dense expert": _mean([m.experts[domain][task.name].accuracy for m in measured.values()]),
                "base": _mean([m.base[task.name].accuracy for m in measured.values()]),
            }
            panels.append(Panel(f"{label(domain)}: {task.name}", tuple(curves), references))
    return panels


def ratio_panels(measured: Mapping[int, Measurements], domains: Domains) -> list[Panel]:
    """Return a panel for each domain: the domain ratio of its pruned expert, ± one standard deviation over seeds."""
    panels = []
    for domain, tasks in domains.items():
        curves = [
            _curve(method, {rate: _seed_ratios(measured, tasks, (method, rate, domain)) for rate in rates})
            for method, rates in _measured_rates(measured, domain).items()
        ]
        panels.append(Panel(label(domain), tuple(curves), {"dense expert": 1.0}))
    return panels


def _seed_scores(measured: Mapping[int, Measurements], *key) -> list[Scores]:
    """Return the scores of this (method, rate, expert) from every seed that measured it."""
    return [m.single[key] for m in measured.values() if key in m.single]


def _seed_ratios(
    measured: Mapping[int, Measurements], tasks: Sequence[Task], key: tuple[str, float, str]
) -> list[float]:
    """Return the domain ratios of this (method, rate, expert) from every seed that measured it."""
    names = [task.name for task in tasks]
    return [
        domain_ratio([m.single[key][n].accuracy for n in names], [m.experts[key[2]][n].accuracy for n in names])
        for m in measured.values()
        if key in m.single
    ]


def _measured_rates(measured: Mapping[int, Measurements], domain: str) -> dict[str, list[float]]:
    """Return the rates that every pruning method was measured at, for the expert of a domain."""
    rates: dict[str, set[float]] = {}
    for m in measured.values():
        for method, rate, expert in m.single:
            if expert == domain and prunes(method):
                rates.setdefault(method, set()).add(rate)
    return {method: sorted(of_method) for method, of_method in rates.items()}


def _curve(method: str, seeds: Mapping[float, Sequence[Score | float]]) -> Curve:
    """Return the curve of a method; `seeds` holds, for each rate, what every seed measured."""
    values, low, high = [], [], []
    for measured in seeds.values():
        numbers = [x.accuracy if isinstance(x, Score) else x for x in measured]
        spread = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else 0.0
        mean = _mean(numbers)
        first = measured[0]
        alone = len(measured) == 1 and isinstance(first, Score)
        bounds = first.interval if alone else (mean - spread, mean + spread)
        values.append(mean)
        low.append(bounds[0])
        high.append(bounds[1])
    return Curve(method, tuple(seeds), tuple(values), tuple(low), tuple(high))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
