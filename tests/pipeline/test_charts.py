import re

import numpy as np
import pytest

from omniconv.pipeline import charts


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0, 1),
        (0.31, 0.98),
        (-3, 17),
        (1e-6, 4e-6),
        (5, 5),
        (0, 0),
        (99.2, 1e5),
        (-2e-3, 0),
        (1e-12, 1e-12),
        (1, 1 + 1e-15),
    ],
)
def test_ticks_are_round_and_cover_the_range(low, high):
    marks = charts.ticks(low, high)
    assert marks[0] <= low
    assert marks[-1] >= high
    assert 2 <= len(marks) <= 8
    steps = np.diff(marks)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    leading = float(f"{steps[0]:.6e}".partition("e")[0])
    assert min(abs(leading - step) for step in (1, 2, 2.5, 5)) < 1e-6


def axis_scale(svg, anchor, coordinate):
    """Read an axis back: the value at a coordinate, from two of its labels."""
    found = re.findall(
        rf'<text x="([\d.]+)" y="([\d.]+)" text-anchor="{anchor}" class="">(-?[\d.]+)</text>', svg
    )
    index = 0 if coordinate == "x" else 1
    places, values = [float(match[index]) for match in found], [float(match[2]) for match in found]
    slope = (values[-1] - values[0]) / (places[-1] - places[0])
    return lambda place: values[0] + slope * (place - places[0])


def test_a_line_can_be_read_back_from_the_drawing():
    points = [(1, 0.2), (2, 0.85), (3, 0.5), (8, 0.6)]
    svg = str(
        charts.lines([charts.Series("s", points)], label="l", x_name="epoch", y_format=lambda v: f"{v:g}")
    )
    y = axis_scale(svg, "end", "y")  # labels stand 3.5 below their line
    x = axis_scale(svg, "middle", "x")
    drawn = [tuple(map(float, pair.split(","))) for pair in re.search(r'points="([^"]*)"', svg)[1].split()]
    np.testing.assert_allclose([(x(a), y(b + 3.5)) for a, b in drawn], points, atol=0.01)


def test_intervals_end_where_their_numbers_say():
    svg = str(
        charts.intervals(
            [("a", 0.5, 0.25, 0.75, "a")],
            label="l",
            y_format=lambda v: f"{v}",
            axis_format=lambda v: f"{v:g}",
            unit=True,
        )
    )
    x = axis_scale(svg, "middle", "x")
    whisker = re.search(r'<line x1="([\d.]+)" y1="[\d.]+" x2="([\d.]+)" y2="[\d.]+" class="whisker"/>', svg)
    np.testing.assert_allclose([x(float(whisker[1])), x(float(whisker[2]))], [0.25, 0.75], atol=0.002)
    bar = re.search(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', svg)
    np.testing.assert_allclose([x(float(bar[1])), x(float(bar[1]) + float(bar[2]))], [0, 0.5], atol=0.002)


def test_scatter_shows_at_most_a_thousand_points():
    pairs = [(i / 7, i / 5) for i in range(2345)]
    svg = charts.scatter(pairs, label="l", y_format=lambda v: f"{v:g}")
    assert 700 <= svg.count("<circle") <= 1000


def test_names_are_escaped():
    svg = charts.lines(
        [charts.Series("<b>&", [(1, 1), (2, 2)])], label='"><script>', x_name="<i>", y_format=str
    )
    assert "<b>" not in svg
    assert "<script>" not in svg
    assert "&lt;b&gt;&amp;" in svg
