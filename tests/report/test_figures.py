"""Figures: they show what they are given, in SVG that any browser draws the same."""

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest
from families import LINEARS
from matplotlib.colors import to_hex
from report_runs import PAIR, two_seeds

from dppa_jax.delta.presets import METHODS
from dppa_jax.merging.inspection import KeptCounts
from dppa_jax.report.curves import Curve, Panel, accuracy_panels, draw_against_rate, ratio_panels
from dppa_jax.report.figures import BINS, draw_kept_counts, draw_rates, draw_search
from dppa_jax.report.labels import label
from dppa_jax.report.measurements import Merged
from dppa_jax.report.styles import METHOD_STYLES, method_style, svg
from dppa_jax.search.rules import Visit

SVG = "{http://www.w3.org/2000/svg}"

VISITS = [
    *(Visit(1, 0, (f, 0.0), 0.8 - (f - 1.5) ** 2, (f, 0.0)) for f in (1.2, 1.0, 1.5)),
    *(Visit(2, 0, (f, 1.0), 0.9 - (f - 1.4) ** 2, (f, 1.0)) for f in (1.0, 1.4)),
    *(Visit(1, 1, (1.5, f), 0.85, (1.5, f)) for f in (0.5, 1.0)),
]
CURVE = Curve("dppa", (0.8, 0.9), (0.5, 0.4), (0.45, 0.3), (0.55, 0.5))


def remaining_of(out: int, columns: int) -> list[KeptCounts]:
    return [KeptCounts(name, rate, np.arange(out) % 7, np.full(columns, 3)) for name in LINEARS for rate in (0.5, 0.9)]


DRAW = {
    "search": lambda: draw_search(VISITS, (0.9, 0.8), (1.5, 1.0), "math"),
    "remaining": lambda: draw_kept_counts(remaining_of(24, 16), "math, layer 0"),
    "accuracy": lambda: draw_against_rate(accuracy_panels(two_seeds(), PAIR), "accuracy"),
    "ratio": lambda: draw_against_rate(ratio_panels(two_seeds(), PAIR), "domain ratio"),
    "rates": lambda: draw_rates(
        {"math": np.full((4, 7), 0.8), "law": np.linspace(0.7, 0.9, 28).reshape(4, 7)}, LINEARS
    ),
}


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def points(ax) -> dict[str, list[list[tuple[float, float]]]]:
    """By label, the points of every line."""
    found: dict[str, list] = {}
    for line in ax.get_lines():
        found.setdefault(line.get_label(), []).append([tuple(map(float, xy)) for xy in line.get_xydata()])
    return found


def test_figure_2_has_a_panel_per_partition_and_a_line_per_method():
    first, second = draw_search(VISITS, (0.9, 0.8), (1.5, 1.0)).axes
    drawn = points(first)
    assert drawn["Method 1"] == [[pytest.approx((1.0, 55.0)), pytest.approx((1.2, 71.0)), pytest.approx((1.5, 80.0))]]
    assert [x for x, _ in drawn["Method 2"][0]] == [1.0, 1.4]
    assert drawn["chosen"][0][0][0] == 1.5
    assert "Method 2" not in points(second)
    assert first.get_xlabel() == "amplification factor"
    assert first.get_ylabel() == "domain ratio (%)"
    assert "90 %" in first.get_title()


def test_candidates_with_other_factors_beside_them_are_not_one_line():
    again = [*VISITS, Visit(1, 0, (1.3, 1.0), 0.7, (1.3, 1.0))]
    assert len(points(draw_search(again, (0.9, 0.8)).axes[0])["Method 1"]) == 2


def test_figure_3_shows_the_kept_share_of_every_dimension():
    axes = draw_kept_counts(remaining_of(24, 16)).axes
    assert len(axes) == 2 * len(LINEARS)
    rows = points(axes[0])["50 % removed"][0]
    assert rows == [pytest.approx((i, 100 * (i % 7) / 16)) for i in range(24)]
    columns = points(axes[1])["90 % removed"][0]
    assert columns == [pytest.approx((i, 100 * 3 / 24)) for i in range(16)]


def test_dimensions_of_a_large_model_are_grouped_and_their_mean_kept():
    figure = draw_kept_counts([KeptCounts(LINEARS[4], 0.9, np.arange(11008), np.full(4096, 5))])
    drawn = points(figure.axes[0])["90 % removed"][0]
    assert len(drawn) == BINS
    assert np.mean([y for _, y in drawn]) == pytest.approx(100 * np.arange(11008).mean() / 4096)
    band = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(100 * 11007 / 4096)
    assert len(svg(figure, "remaining")) < 200_000


def test_a_curve_has_its_values_and_its_intervals():
    ax = draw_against_rate([Panel("gsm8k", (CURVE,), {"dense expert": 0.6})], "accuracy").axes[0]
    data, _, (bars,) = ax.containers[0]
    assert data.get_xydata() == pytest.approx(np.array([(80, 50), (90, 40)]))
    assert np.array([segment[:, 1] for segment in bars.get_segments()]) == pytest.approx(np.array([(45, 55), (30, 50)]))
    assert points(ax)["dense expert"][0][0][1] == pytest.approx(60)


def test_accuracy_has_its_interval_with_one_seed_and_the_spread_with_several():
    one = accuracy_panels({0: two_seeds()[0]}, PAIR)[0].curves[0]
    assert (one.method, one.values) == ("magnitude", (0.2,))
    assert (one.low[0], one.high[0]) == pytest.approx((0.150, 0.261), abs=1e-3)
    several = accuracy_panels(two_seeds(), PAIR)[0].curves[0]
    assert several.values[0] == pytest.approx(0.25)
    assert several.high[0] - several.values[0] == pytest.approx(0.0707, abs=1e-4)


def test_ratio_panels_agree_with_table_1():
    math, finance = ratio_panels(two_seeds(), PAIR)
    assert {curve.method: curve.values[0] for curve in finance.curves} == pytest.approx({"magnitude": 0.5, "dare": 1.0})
    assert math.curves[0].values[0] == pytest.approx(0.306, abs=1e-3)


def test_heat_maps_share_one_scale():
    found = {"math": np.full((4, 7), 0.8), "law": np.linspace(0.5, 0.9, 28).reshape(4, 7)}
    first, second = draw_rates(found, LINEARS).axes[:2]
    assert first.images[0].get_clim() == second.images[0].get_clim() == pytest.approx((50, 90))
    assert [label.get_text() for label in first.get_xticklabels()] == [name.split(".")[1] for name in LINEARS]


def test_a_method_has_a_colour_and_a_marker_of_its_own():
    assert len({colour for colour, _ in map(method_style, METHODS)}) == len(METHODS)
    assert all(method_style(name) == METHOD_STYLES[name] for name in METHODS.keys() & METHOD_STYLES.keys())
    others = accuracy_panels(two_seeds(), PAIR)[0].curves
    for panel in (Panel("alone", (CURVE,)), Panel("last of three", (*others, CURVE))):
        line = draw_against_rate([panel], "accuracy").axes[0].containers[-1][0]
        assert (to_hex(line.get_color()), line.get_marker()) == ("#d55e00", "D")


def test_a_new_method_is_drawn_in_a_style_of_its_own_without_a_row_for_it(monkeypatch):
    drawn = len({*METHODS, *METHOD_STYLES})
    for i in range(20):
        monkeypatch.setitem(METHODS, f"new{i}", METHODS["dare"])
    found = {name: method_style(name) for name in METHODS}
    assert len({colour for colour, _ in found.values()}) == drawn + 20
    assert len({found[f"new{i}"][1] for i in range(20)} - {marker for _, marker in METHOD_STYLES.values()}) == 20
    assert method_style("new7") == found["new7"]
    assert label("new7") == "New7"
    measured = {0: replace(two_seeds()[0], single={("new7", 0.8, "math"): two_seeds()[0].merged[Merged("dare", 0.8)]})}
    ax = draw_against_rate(accuracy_panels(measured, PAIR)[:1], "accuracy").axes[0]
    line = ax.containers[0][0]
    assert (to_hex(line.get_color()), line.get_marker()) == found["new7"]
    assert "New7" in texts(svg(ax.figure, "accuracy"))


def test_a_way_to_find_q_and_another_score_have_a_marker_of_their_own():
    names = ["darex_q", "darex_q+auto", "darex_q+bound", "darex_q/random_column+auto", "darex_q/random_column"]
    assert len({method_style(name) for name in names}) == len(names)
    assert len({method_style(name)[0] for name in names}) == 1
    shown = Curve("darex_q/random_column+auto", (0.8, 0.9), (0.5, 0.4), (0.45, 0.3), (0.55, 0.5))
    figure = draw_against_rate([Panel("one", (shown,))], "accuracy")
    assert "DAREx-q, random_column, auto" in texts(svg(figure, "accuracy"))


def test_one_rate_for_all_is_drawn_on_a_scale_of_percents():
    (ax, bar) = draw_rates({"math": np.full((4, 7), 0.8)}, LINEARS).axes
    assert ax.images[0].get_clim() == pytest.approx((79.5, 80.5))
    assert bar.get_ylabel() == "share removed (%)"


def test_values_that_are_none_leave_a_gap():
    lost = draw_search([*VISITS, Visit(1, 0, (1.1, 0.0), float("nan"), (1.1, 0.0))], (0.9, 0.8))
    assert "nan" not in svg(lost, "search").lower()


@pytest.mark.parametrize("name", DRAW)
def test_svg_is_text_without_a_date_the_same_every_time(name):
    first, again = (svg(DRAW[name](), name) for _ in range(2))
    assert first == again
    assert first.startswith("<svg ")
    assert "date" not in first.lower()
    assert any("%" in text for text in texts(first))


@pytest.mark.parametrize("name", DRAW)
def test_no_label_is_cut_off(name):
    figure = DRAW[name]()
    figure.draw_without_rendering()
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert drawn.x0 >= -0.01
    assert drawn.y0 >= -0.01
    assert drawn.x1 <= width + 0.01
    assert drawn.y1 <= height + 0.01


def test_figures_of_one_page_share_no_ids():
    found = [set(re.findall(r' id="([^"]+)"', svg(draw(), name))) for name, draw in DRAW.items()]
    assert sum(map(len, found)) == len(set().union(*found))
