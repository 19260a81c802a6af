"""Draw a line chart as SVG text: a pure function of its numbers, readable on a white and on a black page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any, Literal

import numpy as np

Number = int | float

GRAY, BLUE, ORANGE = "#79818b", "#3b82f6", "#f0731a"  # contrast 2.9 or more, against white and against black
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
CHARACTER = 7.6  # pixels that a character of a label takes
TOP, BOTTOM, RIGHT = 50, 26, 10  # pixels around the plot; on its left the labels decide


@dataclass(frozen=True)
class Series:
    """One curve: a "line", the "faint" raw values under it, or "points" joined by a line."""

    label: str
    x: np.ndarray
    y: np.ndarray
    mark: Literal["line", "faint", "points"] = "line"
    color: str = BLUE


@dataclass(frozen=True)
class Scale:
    """A map from numbers to pixels: `low` is at `start`, `high` at `end`."""

    low: Number
    high: Number
    start: Number
    end: Number
    log: bool = False

    def __call__(self, value: Any) -> Any:
        low, high, value = (np.log(n) if self.log else n for n in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    from_zero: bool = False,
    width: int = 720,
    height: int = 320,
) -> str:
    """Return `series` over integer x as an `<svg>` element, which is also complete as a file.

    A value that is not finite (or, with `log_y`, not positive) is a gap. A curve with more points than pixels keeps its
    extremes. One outlier of a faint curve does not stretch the axis; it leaves the plot.
    """
    curves = [_prepared(curve, log_y, width) for curve in series]
    curves = [curve for curve in curves if np.isfinite(curve.y).any()]
    empty = _text(width / 2, height / 2, "no finite value")
    plot = _plot(curves, x_label, log_y, from_zero, width, height) if curves else empty
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" \
role="img" font-family="{FONT}" font-size="12" fill="{GRAY}">
<title>{escape(title)}</title>
<text class="title" y="16" font-size="15" font-weight="600">{escape(title)}</text>
<text y="35">{escape(y_label)}</text>
{plot}
</svg>
"""


def linear_ticks(low: Number, high: Number, count: int, least: Number = 0) -> list[float]:
    """Return about `count` multiples of 1, 2 or 5 times a power of ten in [low, high], at least `least` apart."""
    rough = max((high - low) / max(count, 1), least)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(nice for nice in (1, 2, 5, 10) if power * nice >= 0.999 * rough)
    return [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: Number, high: Number, count: int) -> list[float]:
    """Return the same on a logarithmic axis: whole decades, or what divides a decade finely enough."""
    bottom, top = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = math.ceil((top - bottom) / max(count, 1))
    decades = [10.0**power for power in range(bottom, top + 1) if power % every == 0]
    halves = [10.0**power * nice for power in range(bottom, top) for nice in (1, 2, 5)]
    eighths = [10.0**power * nice for power in range(bottom, top) for nice in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)]
    for choice in (decades, halves, eighths):
        ticks = [tick for tick in choice if low <= tick <= high]
        if len(ticks) >= min(count, 4):
            return ticks
    return linear_ticks(low, high, count)


def tick_labels(ticks: Sequence[Number]) -> list[str]:
    """Return the ticks of one axis in one notation: `40k`, `2e-4` or `0.25`."""
    top = max(map(abs, ticks), default=0.0)
    if top >= 1e15 or 0 < top < 1e-2:
        split = [f"{tick:.5e}".partition("e") for tick in ticks]
        return [f"{float(digits):g}e{int(power)}" if float(digits) else "0" for digits, _, power in split]
    units = ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k"), (0.0, 1.0, ""))
    size, suffix = next((size, suffix) for least, size, suffix in units if top >= least)
    decimals = max((len(f"{tick / size:.9g}".partition(".")[2]) for tick in ticks), default=0)
    return [f"{tick / size:,.{decimals}f}{suffix}" if tick else "0" for tick in ticks]


def _prepared(curve: Series, log_y: bool, columns: int) -> Series:
    """Return `curve` as arrays, NaN at gaps; if long, only the lowest and highest point of each of `columns` slices."""
    x, y = np.asarray(curve.x, np.float64), np.asarray(curve.y, np.float64)
    y = np.where(np.isfinite(y) & ((y > 0) | (not log_y)), y, np.nan)
    if len(y) > 2 * columns:
        kept = np.concatenate([_extremes(column, y) for column in np.array_split(np.arange(len(y)), columns)])
        x, y = x[kept], y[kept]
    return replace(curve, x=x, y=y)


def _extremes(column: np.ndarray, y: np.ndarray) -> np.ndarray:
    finite = column[np.isfinite(y[column])]
    return np.unique([finite[y[finite].argmin()], finite[y[finite].argmax()]]) if len(finite) else column[:1]


def _plot(curves: Sequence[Series], x_label: str, log: bool, zero: bool, width: int, height: int) -> str:
    """Draw legend, axes and curves. The label of x comes before its ticks: `step  0  1,000  2,000`."""
    y = Scale(*_y_limits(curves, log, zero), height - BOTTOM, TOP, log)
    y_ticks = (log_ticks if log else linear_ticks)(y.low, y.high, (height - TOP - BOTTOM) // 44)
    y_texts = [tick_labels([tick])[0] for tick in y_ticks] if log else tick_labels(y_ticks)
    left = round(CHARACTER * max(map(len, [x_label, *y_texts]))) + 12
    x = Scale(*_x_limits(curves), left, width - RIGHT)
    x_ticks = linear_ticks(x.low, x.high, (width - left) // 80, least=1)
    parts = _legend(curves, width)
    for tick, text in zip(y_ticks, y_texts, strict=True):
        parts.append(f'<path d="M{x.start} {y(tick):.1f}H{x.end}" stroke="{GRAY}" stroke-opacity=".25"/>')
        parts.append(_text(x.start - 8, y(tick) + 4, text, "end"))
    parts.append(f'<path d="M{x.start} {y.start}H{x.end}" stroke="{GRAY}"/>')
    parts.append(_text(x.start - 8, y.start + 19, x_label, "end"))
    for tick, text in zip(x_ticks, tick_labels(x_ticks), strict=True):
        center = min(x(tick), x.end + RIGHT - CHARACTER * len(text) / 2)
        parts.append(_text(center, y.start + 19, text))
    return "\n".join([*parts, *(_drawn(curve, x, y) for curve in curves)])


def _text(x: Number, y: Number, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _x_limits(curves: Sequence[Series]) -> tuple[float, float]:
    x = np.concatenate([curve.x for curve in curves])
    low, high = float(x.min()), float(x.max())
    low = 0.0 if 0 < low <= high / 10 else low  # the first row is step 1 or step 10, but the axis begins at 0
    return (low, high) if high > low else (low - 1, high + 1)


def _y_limits(curves: Sequence[Series], log_y: bool, from_zero: bool) -> tuple[float, float]:
    ranges = [np.nanpercentile(curve.y, (1, 99) if curve.mark == "faint" else (0, 100)) for curve in curves]
    low, high = float(np.min(ranges)), float(np.max(ranges))
    if log_y:
        margin = max((high / low) ** 0.05, 1.05)
        return low / margin, high * margin
    low = min(low, 0.0) if from_zero else low
    margin = max(0.05 * (high - low), 1e-6 * abs(high)) or 1.0
    return low - margin * (not from_zero), high + margin


def _legend(curves: Sequence[Series], right: Number) -> list[str]:
    """Draw the names of the curves, up to `right`, where there is more than one colour to explain."""
    parts = []
    for curve in reversed(curves if len({curve.color for curve in curves}) > 1 else []):
        right -= CHARACTER * len(curve.label)
        parts.append(f'<path d="M{right - 22:.1f} 12h16" {_stroke(curve)}/>')
        parts.append(_text(right, 16, curve.label, "start"))
        right -= 34
    return parts


def _stroke(curve: Series) -> str:
    weight = 'stroke-opacity=".5"' if curve.mark == "faint" else 'stroke-width="2"'
    return f'fill="none" stroke="{curve.color}" {weight} stroke-linejoin="round" stroke-linecap="round"'


def _drawn(curve: Series, x: Scale, y: Scale) -> str:
    """Draw a path with gaps, in its own `<svg>`, which clips a faint curve at its edges."""
    path, dots, pen = [], [], "M"
    for at, value, px, py in zip(curve.x, curve.y, x(curve.x), y(curve.y), strict=True):
        if math.isfinite(value):
            path.append(f"{pen}{px:.1f} {py:.1f}" + "h0" * (pen == "M"))  # h0: a lonely value is a dot
            name = f"<title>{escape(curve.label)} {value:.4g} at {at:,.0f}</title>"
            dots.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5">{name}</circle>')
        pen = "L" if math.isfinite(value) else "M"
    dots = dots if len(dots) <= (40 if curve.mark == "points" else 1) else []
    left, top, width, height = x.start, y.end, x.end - x.start, y.start - y.end
    box = f'x="{left}" y="{top}" width="{width}" height="{height}" viewBox="{left} {top} {width} {height}"'
    overflow = "hidden" if curve.mark == "faint" else "visible"
    return (
        f'<svg {box} overflow="{overflow}"><path d="{"".join(path)}" {_stroke(curve)}/>'
        f'<g fill="{curve.color}">{"".join(dots)}</g></svg>'
    )
