import math
import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax.runs.chart import Series, line_chart, linear_ticks, log_ticks, tick_labels

SVG = "{http://www.w3.org/2000/svg}"
ANY = st.floats(width=32)
MARKS = st.sampled_from(["line", "faint", "points"])


def chart(*series: Series, **options: Any) -> ElementTree.Element:
    options = {"title": "Loss", "x_label": "step", "y_label": "nats"} | options
    return ElementTree.fromstring(line_chart(series, **options))


def series(y: list[float], mark: Any = "line") -> Series:
    return Series("training", np.arange(1, len(y) + 1), np.array(y, float), mark=mark)


def path(root: ElementTree.Element) -> str:
    """The outline of the first curve."""
    (curve, *_) = root.findall(f"{SVG}svg/{SVG}path")
    return curve.attrib["d"]


def points(root: ElementTree.Element) -> np.ndarray:
    return np.array([[float(n) for n in pair] for pair in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path(root))])


def texts(root: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in root.iter(f"{SVG}text")]


@given(st.lists(st.tuples(st.lists(ANY, max_size=20), MARKS), max_size=3), st.booleans(), st.booleans())
def test_any_numbers_give_a_whole_chart_with_finite_coordinates(curves, log_y: bool, from_zero: bool):
    root = chart(*(series(y, mark) for y, mark in curves), log_y=log_y, from_zero=from_zero)
    numbers = [value for element in root.iter() for value in element.attrib.values()]
    assert not [value for value in numbers if re.search(r"\b(nan|inf)\b", value)]


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=50), st.booleans())
def test_a_line_stays_inside_its_plot(y: list[float], log_y: bool):
    root = chart(series(y), log_y=log_y)
    left, top, width, height = (float(n) for n in root.findall(f"{SVG}svg")[0].attrib["viewBox"].split())
    px, py = points(root).T
    assert np.all((left - 0.1 <= px) & (px <= left + width + 0.1))
    assert np.all((top - 0.1 <= py) & (py <= top + height + 0.1))


def test_higher_values_stand_higher_and_later_ones_further_right():
    x, y = points(chart(series([1.0, 2.0, 4.0]))).T
    assert np.all(np.diff(x) > 0)
    assert np.all(np.diff(y) < 0)
    assert (y[1] - y[2]) / (y[0] - y[1]) == pytest.approx(2, rel=0.01)


def test_equal_ratios_are_equal_steps_on_a_logarithmic_axis():
    _, y = points(chart(series([1.0, 10.0, 100.0]), log_y=True)).T
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.2)


@pytest.mark.parametrize("gap", [math.nan, math.inf, -math.inf])
def test_the_pen_is_lifted_at_a_gap(gap: float):
    assert re.findall("[ML]", path(chart(series([1, 2, gap, 3, 4])))) == ["M", "L", "M", "L"]


def test_what_has_no_logarithm_is_a_gap():
    assert re.findall("[ML]", path(chart(series([1, 2, 0, -3, 4]), log_y=True))) == ["M", "L", "M"]


def test_one_value_alone_is_a_dot():
    (dot,) = chart(series([2.5])).iter(f"{SVG}circle")
    assert dot.findtext(f"{SVG}title") == "training 2.5 at 1"


def test_points_say_their_values():
    titles = [dot.findtext(f"{SVG}title") for dot in chart(series([2.5, 1.25], "points")).iter(f"{SVG}circle")]
    assert titles == ["training 2.5 at 1", "training 1.25 at 2"]


def test_no_finite_value_is_said_rather_than_drawn():
    assert texts(chart(series([math.nan]), series([])))[-1] == "no finite value"


def test_a_spike_of_one_step_survives_among_a_hundred_thousand():
    y = np.ones(100_000)
    y[54_321] = 9.0
    drawn = points(chart(Series("loss", np.arange(100_000), y), width=500))
    assert len(drawn) <= 1000
    assert drawn[:, 1].min() < drawn[:, 1].max() - 200


def test_a_wild_step_of_a_faint_curve_does_not_stretch_the_axis():
    y = 2 + 0.1 * np.sin(np.arange(1000))
    wild = y.copy()
    wild[500] = 1e9
    calm, spiked = (texts(chart(Series("loss", np.arange(1000), values, mark="faint"))) for values in (y, wild))
    assert calm == spiked


def test_an_axis_from_zero_begins_there():
    assert "0" in texts(chart(Series("rate", np.array([5, 6]), np.array([400.0, 410.0])), from_zero=True))
    assert "0" not in texts(chart(Series("rate", np.array([5, 6]), np.array([400.0, 410.0]))))


def test_names_are_shown_where_there_is_more_than_one_colour():
    one, other = series([1, 2]), Series("held out", np.array([1]), np.array([1.0]), color="#000")
    assert "held out" not in texts(chart(other))
    assert {"training", "held out"} <= set(texts(chart(one, other)))


def test_names_are_text_and_not_markup():
    root = chart(series([1, 2]), Series("<b>&", np.array([1]), np.array([1.0]), color="#000"), title="<script>")
    assert root.findtext(f"{SVG}title") == "<script>"
    assert "<b>&" in texts(root)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(1, 12))
def test_linear_ticks_are_even_round_and_about_as_many_as_asked(low: float, span: float, count: int):
    ticks = linear_ticks(low, low + span, count)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else None
    assert (count - 1) / 2.5 - 1 <= len(ticks) <= count + 1
    assert all(low - 1e-6 * span <= tick <= low + 1.000001 * span for tick in ticks)
    if step is not None:
        assert np.allclose(np.diff(ticks), step)
        assert f"{step:.6e}"[0] in "125"


@given(st.floats(-12, 12), st.floats(0.1, 12), st.integers(2, 8))
def test_logarithmic_ticks_rise_inside_the_axis(low: float, span: float, count: int):
    ticks = log_ticks(10**low, 10 ** (low + span), count)
    assert len(ticks) >= 1
    assert np.all(np.diff(ticks) > 0)
    assert 10**low * 0.999 <= ticks[0] <= ticks[-1] <= 10 ** (low + span) * 1.001


@given(st.floats(-1e6, 1e6), st.floats(1e-2, 1e9))
def test_labels_tell_the_ticks_of_an_axis_apart(low: float, span: float):
    labels = tick_labels(linear_ticks(low, low + span, 6))
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("ticks", "labels"),
    [
        ([0.0, 1000.0, 2000.0], ["0", "1,000", "2,000"]),
        ([0.0, 20_000.0, 40_000.0], ["0", "20k", "40k"]),
        ([0.0, 0.5e6, 1e6], ["0", "0.5M", "1.0M"]),
        ([0.25, 0.5, 1.0], ["0.25", "0.50", "1.00"]),
        ([0.0, 5e-4, 1e-3], ["0", "5e-4", "1e-3"]),
        ([1e20], ["1e20"]),
        ([], []),
    ],
)
def test_an_axis_has_one_notation(ticks: list[float], labels: list[str]):
    assert tick_labels(ticks) == labels
