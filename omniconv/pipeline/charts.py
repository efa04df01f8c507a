"""The report's charts: small SVG drawings that take their colours from the page, so that dark mode is theirs, too."""

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

__all__ = ["Series", "intervals", "lines", "matrix", "reliability", "scatter", "ticks", "trade_off"]

Format = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """A line of a chart: its name, its points, and the CSS class that colours it."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str = "a"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers that cover [low, high]; the first and last lie on or outside of it."""
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        pad = abs(low) / 10 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def _number(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")


def _text(x: float, y: float, content: str, *, anchor: str = "start", style: str = "") -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}" class="{}">{}</text>').format(
        _number(x), _number(y), anchor, style, content
    )


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    return Markup('<line x1="{}" y1="{}" x2="{}" y2="{}" class="{}"/>').format(
        *map(_number, (x1, y1, x2, y2)), style
    )


def _svg(width: float, height: float, label: str, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _number(width), _number(height), label, Markup("").join(parts)
    )


class _Plane:
    """A plot area with round limits and its grid."""

    def __init__(
        self,
        box: tuple[float, float, float, float],
        x: tuple[float, float],
        y: tuple[float, float],
        x_format: Format,
        y_format: Format,
        *,
        exact_x: bool = False,
        whole_x: bool = False,
    ) -> None:
        self.left, self.top, self.right, self.bottom = box
        x_ticks, y_ticks = ticks(*x), ticks(*y)
        self.x_low, self.x_high = x if exact_x and x[1] > x[0] else (x_ticks[0], x_ticks[-1])
        self.y_low, self.y_high = y_ticks[0], y_ticks[-1]
        self.grid: list[Markup] = []
        for value in y_ticks:
            self.grid.append(_line(self.left, self.y(value), self.right, self.y(value), "grid"))
            self.grid.append(_text(self.left - 6, self.y(value) + 3.5, y_format(value), anchor="end"))
        for value in x_ticks:
            if self.x_low <= value <= self.x_high and not (whole_x and value % 1):
                self.grid.append(_line(self.x(value), self.bottom, self.x(value), self.bottom + 4, "axis"))
                self.grid.append(_text(self.x(value), self.bottom + 16, x_format(value), anchor="middle"))
        self.grid.append(_line(self.left, self.bottom, self.right, self.bottom, "axis"))

    def x(self, value: float) -> float:
        return self.left + (value - self.x_low) / (self.x_high - self.x_low) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - (value - self.y_low) / (self.y_high - self.y_low) * (self.bottom - self.top)


def lines(
    series: Sequence[Series],
    *,
    label: str,
    x_name: str,
    y_format: Format,
    mark: tuple[float, float, str] | None = None,
) -> Markup:
    """Draw lines over a common axis of whole numbers (epochs).

    Args:
        series: the lines; empty ones are left out.
        label: what the chart shows, for those who cannot see it.
        x_name: name of the horizontal axis.
        y_format: how a value is written.
        mark: a point (x, y) to mark and what to write on it.
    """
    shown = [one for one in series if one.points]
    xs = [x for one in shown for x, _ in one.points]
    ys = [y for one in shown for _, y in one.points]
    plane = _Plane(
        (52, 26, 350, 186), (min(xs), max(xs)), (min(ys), max(ys)), lambda v: f"{v:g}", y_format,
        exact_x=True, whole_x=True,
    )  # fmt: skip
    parts, at = list(plane.grid), 52.0
    parts.append(_text(350, 218, x_name, anchor="end"))
    for one in shown:
        path = " ".join(f"{_number(plane.x(x))},{_number(plane.y(y))}" for x, y in one.points)
        if len(one.points) == 1:
            (x, y) = one.points[0]
            parts.append(_dot(plane.x(x), plane.y(y), 3, f"dot {one.style}", one.name))
        parts.append(Markup('<polyline points="{}" class="line {}"/>').format(path, one.style))
        parts.append(_line(at, 11, at + 14, 11, f"line {one.style}"))
        parts.append(_text(at + 19, 14.5, one.name, style="name"))
        at += 36 + 6.2 * len(one.name)
    if mark is not None:
        x, y, words = mark
        near_end = plane.x(x) > 260
        below = plane.y(y) < 44
        parts.append(_dot(plane.x(x), plane.y(y), 4, "mark", words))
        parts.append(
            _text(
                plane.x(x) + (-8 if near_end else 8), plane.y(y) + (22 if below else -9), words,
                anchor="end" if near_end else "start", style="name halo",
            )
        )  # fmt: skip
    return _svg(360, 222, label, parts)


def _dot(x: float, y: float, radius: float, style: str, title: str) -> Markup:
    return Markup('<circle cx="{}" cy="{}" r="{}" class="{}"><title>{}</title></circle>').format(
        _number(x), _number(y), _number(radius), style, title
    )


def intervals(
    rows: Sequence[tuple[str, float, float, float, str]],
    *,
    label: str,
    y_format: Format,
    axis_format: Format,
    unit: bool,
) -> Markup:
    """Draw values with their 95% intervals one below the other.

    Args:
        rows: (name, value, low, high, CSS class).
        label: what the chart shows, for those who cannot see it.
        y_format: how a value is written.
        axis_format: how a mark of the axis is written.
        unit: whether the values are shares, whose axis runs from 0 to 1.
    """
    low, high = (0.0, 1.0) if unit else (min(0.0, *(r[2] for r in rows)), max(0.0, *(r[3] for r in rows)))
    width, step = 460.0, 50.0
    bottom = 8 + step * len(rows)
    marks = ticks(low, high)

    def place(value: float) -> float:
        return 14 + (value - marks[0]) / (marks[-1] - marks[0]) * (width - 28)

    parts = []
    for value in marks:
        parts.append(_line(place(value), 8, place(value), bottom, "grid"))
        parts.append(_text(place(value), bottom + 16, axis_format(value), anchor="middle"))
    for index, (name, value, lower, upper, style) in enumerate(rows):
        y = 8 + step * index + 36
        parts.append(Markup('<rect x="{}" y="{}" width="{}" height="10" rx="5" class="bar {}"/>').format(
            _number(place(max(marks[0], min(0, value)))), _number(y - 5),
            _number(max(1, place(value) - place(max(marks[0], min(0, value))))), style,
        ))  # fmt: skip
        parts.append(_line(place(lower), y, place(upper), y, "whisker"))
        for end in (lower, upper):
            parts.append(_line(place(end), y - 6, place(end), y + 6, "whisker"))
        parts.append(_text(14, y - 14, name, style="name"))
        parts.append(_text(width - 14, y - 14, y_format(value), anchor="end", style="value"))
    return _svg(width, bottom + 24, label, parts)


def reliability(bins: Sequence[tuple[float, float, int]], *, label: str) -> Markup:
    """Draw accuracy over confidence, with the number of answers below.

    Args:
        bins: (mean confidence, accuracy, number of answers).
        label: what the chart shows, for those who cannot see it.
    """
    plane = _Plane((44, 10, 330, 250), (0, 1), (0, 1), _percent, _percent)
    parts = list(plane.grid)
    parts.append(_line(plane.x(0), plane.y(0), plane.x(1), plane.y(1), "ideal"))
    parts.append(_text(plane.x(0.03), plane.y(0.92), "says less than it knows", style="hint"))
    parts.append(_text(plane.x(0.97), plane.y(0.08), "promises too much", anchor="end", style="hint"))
    most = max((count for *_, count in bins), default=1)
    for confidence, accuracy, count in bins:
        title = f"{count} answers: confidence {confidence:.1%}, right {accuracy:.1%}"
        x = plane.x(confidence)
        parts.append(_line(x, plane.y(confidence), x, plane.y(accuracy), "gap"))
        parts.append(_dot(x, plane.y(accuracy), 3 + 5 * math.sqrt(count / most), "dot a", title))
        height = max(1.0, 44 * count / most)
        parts.append(
            Markup('<rect x="{}" y="{}" width="14" height="{}" class="bar a"><title>{}</title></rect>').format(
                _number(min(max(x - 7, plane.left), plane.right - 14)),
                _number(336 - height), _number(height), title,
            )
        )  # fmt: skip
    parts.append(_line(plane.left, 336, plane.right, 336, "axis"))
    parts.append(_text(plane.right, 282, "confidence", anchor="end"))
    parts.append(_text(plane.left, 352, "answers at each confidence"))
    return _svg(344, 360, label, parts)


def _percent(value: float) -> str:
    return f"{100 * value:g}%"


def scatter(pairs: Sequence[tuple[float, float]], *, label: str, y_format: Format) -> Markup:
    """Draw predicted over true values, at most 1,000 of them, with the line of perfect answers."""
    pairs = pairs[:: -(-len(pairs) // 1000)]
    low, high = min(min(pair) for pair in pairs), max(max(pair) for pair in pairs)
    plane = _Plane((56, 10, 350, 290), (low, high), (low, high), y_format, y_format)
    parts = list(plane.grid)
    parts.append(
        _line(
            plane.x(plane.x_low), plane.y(plane.y_low), plane.x(plane.x_high), plane.y(plane.y_high), "ideal"
        )
    )
    points = Markup("").join(
        Markup('<circle cx="{}" cy="{}" r="2.6"/>').format(_number(plane.x(true)), _number(plane.y(said)))
        for true, said in pairs
    )
    parts.append(Markup('<g class="points">{}</g>').format(points))
    parts.append(_text(350, 322, "true value", anchor="end"))
    parts.append(_text(62, 20, "predicted value", style="hint"))
    return _svg(360, 328, label, parts)


def trade_off(
    points: Sequence[tuple[float, float, str, bool]],
    *,
    label: str,
    x_name: str,
    x_format: Format,
    y_format: Format,
) -> Markup:
    """Draw what is paid against what is got, a point for each candidate, and the front that none of them beats.

    Args:
        points: (cost, value, name, whether it was kept); less cost and more value are better.
        label: what the chart shows, for those who cannot see it.
        x_name: name of the cost.
        x_format: how a cost is written.
        y_format: how a value is written.
    """
    costs, values = [p[0] for p in points], [p[1] for p in points]
    plane = _Plane((64, 10, 560, 250), (0.0, max(costs)), (min(values), max(values)), x_format, y_format)
    parts = list(plane.grid)
    front = sorted(
        (c, v)
        for c, v, *_ in points
        if not any(a <= c and b >= v and (a, b) != (c, v) for a, b, *_ in points)
    )
    path = " ".join(f"{_number(plane.x(c))},{_number(plane.y(v))}" for c, v in front)
    parts.append(Markup('<polyline points="{}" class="ideal" fill="none"/>').format(path))
    for cost, value, name, kept in points:
        x, y = plane.x(cost), plane.y(value)
        parts.append(
            Markup('<g class="{}"><circle cx="{}" cy="{}" r="{}"><title>{}</title></circle></g>').format(
                "points", _number(x), _number(y), 6 if kept else 3.5, name
            )
        )
        if kept:
            right = x < 400
            parts.append(_text(x + (10 if right else -10), y - 8, name, anchor="start" if right else "end"))
    parts.append(_text(560, 282, x_name, anchor="end"))
    return _svg(570, 290, label, parts)


def _cells(shares: Sequence[Sequence[float]]) -> str:
    """Return the matrix as a transparent picture of one pixel a cell: right answers green, mistakes red."""
    from PIL import Image

    values = np.asarray(shares, dtype=np.float64)
    pixels = np.empty((*values.shape, 4), np.uint8)
    pixels[..., :3] = (214, 84, 48)
    pixels[np.arange(len(values)), np.arange(len(values)), :3] = (24, 138, 126)
    # The lightest cells must still be seen.
    pixels[..., 3] = np.where(values > 0, 255 * (0.2 + 0.8 * values.clip(0, 1)), 0).round()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def matrix(shares: Sequence[Sequence[float]], names: Sequence[str], *, label: str) -> Markup:
    """Draw a large confusion matrix: rows are true classes, and the stronger the colour the larger the share.

    Up to 60 classes are named at the left; above, and for more, their places are numbered from 1.

    Args:
        shares: share of each true class that was taken for each class.
        names: of the classes.
        label: what the picture shows, for those who cannot see it.
    """
    count = len(shares)
    named = count <= 60
    cell = 12.0 if named else max(3.0, 720 / count)
    left, top = (110.0 if named else 34.0), 22.0
    side = cell * count
    parts = [
        Markup('<rect x="{}" y="{}" width="{}" height="{}" class="field"/>').format(
            _number(left), _number(top), _number(side), _number(side)
        )
    ]
    every = (
        5 if named else next(step for step in (10, 20, 25, 50, 100, 250) if count / step <= 20 or step == 250)
    )
    for index in range(count):
        middle = top + cell * (index + 0.5) + 3.5
        if named:
            short = names[index] if len(names[index]) <= 16 else names[index][:15] + "…"
            parts.append(_text(left - 5, middle, short, anchor="end"))
        if (index + 1) % every == 0 or index == 0:
            parts.append(_text(left + cell * (index + 0.5), top - 6, str(index + 1), anchor="middle"))
            if not named:
                parts.append(_text(left - 5, middle, str(index + 1), anchor="end"))
    parts.append(
        Markup('<image x="{}" y="{}" width="{}" height="{}" preserveAspectRatio="none" href="{}"/>').format(
            _number(left), _number(top), _number(side), _number(side), _cells(shares)
        )
    )
    return _svg(left + side + 4, top + side + 4, label, parts)
