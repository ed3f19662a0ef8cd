"""Line charts as inline SVG; colours come from the page's style, so that they follow its light or dark theme."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

__all__ = ["Series", "line_chart"]

_WIDTH, _HEIGHT = 440, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 34


@dataclass(frozen=True)
class Series:
    """A curve: its name in the legend and its (x, y) points."""

    name: str
    points: Sequence[tuple[float, float]]


def line_chart(title: str, curves: Sequence[Series]) -> Markup:
    """A figure with axes, one line per curve and a legend; points that are not finite break the line."""
    finite = [point for curve in curves for point in curve.points if math.isfinite(point[1])]
    if not finite:
        return Markup("<figure class='chart'><figcaption>{}</figcaption>no finite value</figure>").format(title)
    xs, ys = _ticks([x for x, _ in finite], 5), _ticks([y for _, y in finite], 4)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - xs[0]) / (xs[-1] - xs[0]) * (_WIDTH - _LEFT - _RIGHT)
        up = (y - ys[0]) / (ys[-1] - ys[0]) * (_HEIGHT - _TOP - _BOTTOM)
        return _LEFT + across, _HEIGHT - _BOTTOM - up

    parts = [Markup("<text class='axis' x='{}' y='{}'>step</text>").format(_WIDTH - _RIGHT - 24, _HEIGHT - 4)]
    for y in ys:
        height = f"{place(xs[0], y)[1]:.1f}"
        parts.append(
            Markup("<line class='rule' x1='{0}' x2='{1}' y1='{2}' y2='{2}'/>").format(_LEFT, _WIDTH - _RIGHT, height)
            + Markup("<text class='axis end' x='{}' y='{}' dy='4'>{:g}</text>").format(_LEFT - 6, height, y)
        )
    for x in xs:
        parts.append(
            Markup("<text class='axis middle' x='{:.1f}' y='{}'>{:g}</text>").format(
                place(x, ys[0])[0], _HEIGHT - _BOTTOM + 16, x
            )
        )
    for number, curve in enumerate(curves):
        parts.append(Markup("<path class='curve c{}' d='{}'/>").format(number % 6, _path(curve, place)))
    names = ", ".join(f"{curve.name} from {curve.points[0][1]:.3g} to {curve.points[-1][1]:.3g}" for curve in curves)
    legend = Markup("").join(
        Markup("<li><span class='key c{}'></span>{}</li>").format(number % 6, curve.name)
        for number, curve in enumerate(curves)
    )
    return Markup(
        "<figure class='chart'><figcaption>{}</figcaption>"
        "<svg viewBox='0 0 {} {}' role='img' aria-label='{}'>{}</svg><ul class='legend'>{}</ul></figure>"
    ).format(title, _WIDTH, _HEIGHT, escape(f"{title}: {names}"), Markup("").join(parts), legend)


def _path(curve: Series, place: Callable[[float, float], tuple[float, float]]) -> str:
    words, pen = [], "M"
    for x, y in curve.points:
        if not math.isfinite(y):
            pen = "M"
            continue
        across, down = place(x, y)
        words.append(f"{pen}{across:.1f} {down:.1f}")
        pen = "L"
    return " ".join(words)


def _ticks(values: Sequence[float], count: int) -> list[float]:
    """About `count` + 1 round numbers that span the values."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - max(abs(low), 1) / 2, high + max(abs(high), 1) / 2
    raw = (high - low) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]
