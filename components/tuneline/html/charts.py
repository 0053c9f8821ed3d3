"""Charts as inline SVG: curves, histograms and scatter plots; bars.py has those of bars.

Every function returns a <figure>. Colours are classes of stylesheet.py, so a chart follows the
light or dark setting. Each mark has its value as <title>, for tooltips and screen readers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import NamedTuple

from tuneline.html.frame import (
    BOLD_WIDTH,
    NARROW,
    Frame,
    Point,
    Scale,
    drawn,
    empty,
    figure,
    is_finite,
    legend_of,
    nice_ticks,
    path,
    svg_of,
    xy,
)
from tuneline.html.point_labels import place_names
from tuneline.html.units import number

MAX_POINTS = 400
MAX_DOTTED_POINTS = 25


class ScatterPoint(NamedTuple):
    """One labelled point; the points of a group share a colour."""

    label: str
    group: str
    x: float
    y: float


def line_chart(
    series: Mapping[str, Sequence[Point]], *, x_label: str, y_label: str, title: str = ""
) -> str:
    """Return curves over a common x axis.

    A curve of up to 25 points is drawn with a mark at each point. A longer curve is reduced to
    about 400 points, among which are its extremes. Values that are not finite leave a gap.

    Args:
        series: points (x, y) by the name of their curve.
        x_label: quantity on the x axis, with its unit.
        y_label: quantity on the y axis, with its unit.
        title: heading of the chart.
    """
    finite = {name: [p for p in points if is_finite(p)] for name, points in series.items()}
    everything = [point for points in finite.values() for point in points]
    if not everything:
        return empty(title, "no values to draw")
    xs, ys = [x for x, _ in everything], [y for _, y in everything]
    y_low, y_high = min(ys), max(ys)
    if 0 <= y_low < 0.35 * y_high:
        y_low = 0.0  # an axis from zero misleads less, and loses little resolution here
    summary = "; ".join(
        f"{name} from {number(points[0][1])} to {number(points[-1][1])} over {len(points)} values"
        for name, points in finite.items()
        if points
    )

    def draw(width: int) -> str:
        frame = Frame(
            x_low=min(xs),
            x_high=max(xs),
            y_ticks=nice_ticks(y_low, y_high),
            x_label=x_label,
            y_label=y_label,
            width=width,
        )
        parts = [frame.grid()]
        for index, (name, points) in enumerate(series.items(), start=1):
            kept = thin(points, MAX_POINTS if width > NARROW else MAX_POINTS // 2)
            curve = path(kept, frame.x, frame.y)
            if curve:
                parts.append(f'<path class="curve s{index}" d="{curve}"/>')
            dotted = len(finite[name]) <= MAX_DOTTED_POINTS
            radius, kind = (3.5, f"dot s{index}") if dotted else (6, "hit")
            for x, y in filter(is_finite, kept):
                parts.append(
                    f'<circle class="{kind}" cx="{xy(frame.x(x))}" cy="{xy(frame.y(y))}" '
                    f'r="{radius}"><title>{escape(name)}: {number(y)} at {number(x)} '
                    f"{escape(x_label)}</title></circle>"
                )
        return frame.svg(parts, title or y_label, summary)

    legend = legend_of([(f"s{index}", name) for index, name in enumerate(series, start=1)])
    return figure(title, drawn(draw), legend if len(series) > 1 else "")


def histogram(
    bins: Sequence[tuple[int, int, int]],
    *,
    x_label: str,
    y_label: str,
    markers: Mapping[str, float] | None = None,
    title: str = "",
) -> str:
    """Return a histogram with marked positions.

    The name of a marker that is to the right of the drawn range is at the edge, with an arrow.

    Args:
        bins: (lowest value, first value above the bin, number).
        x_label: quantity on the x axis, with its unit.
        y_label: what is counted.
        markers: values to mark, by their names.
        title: heading of the chart.
    """
    if not bins:
        return empty(title, "no values to draw")
    low, high = min(b[0] for b in bins), max(b[1] for b in bins)
    marked = sorted((markers or {}).items(), key=lambda item: item[1])
    for _, value in marked:
        if high < value <= low + 1.5 * (high - low):
            high = math.ceil(value)
    summary = (
        f"{len(bins)} bins from {number(low)} to {number(bins[-1][1])} {x_label}; "
        + ", ".join(f"{name} {number(value)}" for name, value in marked)
    )

    def draw(width: int) -> str:
        rows, places = _place_markers(marked, low, high, width)
        frame = Frame(
            x_low=low,
            x_high=high,
            y_ticks=nice_ticks(0, max(1, max(b[2] for b in bins)), 4),
            x_label=x_label,
            y_label=y_label,
            width=width,
            above=16 * rows,
        )
        parts = [frame.grid()]
        for start, below, num in bins:
            left, right, top = frame.x(start), frame.x(below), frame.y(num)
            gap = 1 if right - left > 4 else 0
            parts.append(
                f'<rect class="bar s1" x="{xy(left)}" y="{xy(top)}" '
                f'width="{xy(right - left - gap)}" height="{xy(frame.bottom - top)}">'
                f"<title>{number(start)} to {number(below - 1)} {escape(x_label)}: "
                f"{number(num)} {escape(y_label)}</title></rect>"
            )
        names = []
        for name, value, row, anchor in places:
            x, baseline = frame.x(min(value, high)), 30 + 16 * row
            if value <= high:
                parts.append(
                    f'<line class="mark" x1="{xy(x)}" x2="{xy(x)}" y1="{baseline - 9}" '
                    f'y2="{xy(frame.bottom)}"/>'
                )
            names.append(
                f'<text class="mark" x="{xy(x + (4 if anchor == "start" else -4))}" y="{baseline}" '
                f'text-anchor="{anchor}">{escape(name)} {number(value)}'
                f"{' &#8594;' if value > high else ''}</text>"
            )
        return frame.svg([*parts, *names], title or x_label, summary)

    return figure(title, drawn(draw))


def scatter_chart(
    points: Sequence[ScatterPoint],
    *,
    x_label: str,
    y_label: str,
    x_text: Callable[[float], str] = number,
    title: str = "",
) -> str:
    """Return labelled points over a linear x axis from zero and a logarithmic y axis.

    Args:
        points: the points; y has to be above zero.
        x_label: quantity on the x axis.
        y_label: quantity on the y axis, with its unit.
        x_text: formats a value of x.
        title: heading of the chart.
    """
    if not points:
        return empty(title, "no values to draw")
    low = math.floor(min(math.log10(point.y) for point in points))
    high = max(math.ceil(max(math.log10(point.y) for point in points)), low + 1)
    powers = range(low, high + 1)
    groups = list(dict.fromkeys(point.group for point in points))
    summary = "; ".join(f"{p.label}: {x_text(p.x)}, {number(p.y)}" for p in points)

    def draw(width: int) -> str:
        ticks = nice_ticks(0, max(point.x for point in points), 5 if width > NARROW else 2)
        top, bottom, left = 28, 248, 54
        longest = max(len(point.label) for point in points)
        x = Scale(0, ticks[-1], left, width - 24 - BOLD_WIDTH * longest)
        y = Scale(low, high, bottom, top)
        parts = []
        for power in powers:
            parts.append(
                f'<line class="grid" x1="{left}" x2="{width - 16}" y1="{xy(y(power))}" '
                f'y2="{xy(y(power))}"/><text class="tick" x="{left - 7}" y="{xy(y(power) + 4)}" '
                f'text-anchor="end">{10.0**power:g}</text>'
            )
        for tick in ticks:
            parts.append(
                f'<line class="tickmark" x1="{xy(x(tick))}" x2="{xy(x(tick))}" y1="{bottom}" '
                f'y2="{bottom + 4}"/><text class="tick" x="{xy(x(tick))}" y="{bottom + 18}" '
                f'text-anchor="middle">{escape(x_text(tick))}</text>'
            )
        parts.append(
            f'<line class="base" x1="{left}" x2="{width - 16}" y1="{bottom}" y2="{bottom}"/>'
            f'<text class="axis" x="4" y="14">{escape(y_label)}</text>'
            f'<text class="axis" x="{width - 16}" y="{bottom + 36}" text-anchor="end">'
            f"{escape(x_label)}</text>"
        )
        dots = [(x(point.x), y(math.log10(point.y))) for point in points]
        places = place_names(
            dots,
            [BOLD_WIDTH * len(point.label) for point in points],
            area=(left, top - 12, width, bottom),
        )
        for (at, height), place in zip(dots, places, strict=True):
            if place.line:
                parts.append(
                    f'<line class="tickmark" x1="{xy(at)}" y1="{xy(height)}" '
                    f'x2="{xy(place.line[0])}" y2="{xy(place.line[1])}"/>'
                )
        for point, (at, height), place in zip(points, dots, places, strict=True):
            parts.append(
                f'<circle class="dot s{groups.index(point.group) + 1}" cx="{xy(at)}" '
                f'cy="{xy(height)}" r="5"><title>{escape(point.label)}: {escape(x_text(point.x))}, '
                f"{number(point.y)} {escape(y_label)}</title></circle>"
                f'<text class="name" x="{xy(place.x)}" y="{xy(place.y)}" '
                f'text-anchor="{"start" if place.x > at else "end"}">{escape(point.label)}</text>'
            )
        return svg_of(width, bottom + 44, parts, title or y_label, summary)

    legend = legend_of([(f"s{index}", name) for index, name in enumerate(groups, start=1)])
    return figure(title, drawn(draw), legend if len(groups) > 1 else "")


def thin(points: Sequence[Point], limit: int) -> Sequence[Point]:
    """Return at most about `limit` points: the lowest and the highest of each stretch of points."""
    if len(points) <= limit:
        return points
    stretch = math.ceil(2 * len(points) / limit)
    kept: list[Point] = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        finite = [point for point in part if is_finite(point)]
        if not finite:
            kept.append(part[0])  # the gap stays visible
            continue
        ends = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])}
        kept.extend(sorted(ends))
    return kept


def _place_markers(
    marked: list[tuple[str, float]], low: float, high: float, chart_width: int
) -> tuple[int, list[tuple[str, float, int, str]]]:
    """Return the number of rows of the markers' names, and (name, value, row, anchor) of each.

    A name is to the right of its marker's line, or to the left of the line if there is no room. The
    first rows have the names on the left, ordered from right to left. The rows below have the names
    on the right, ordered from left to right. Each line then starts below the names that extend over
    its position.
    """
    # The left edge of the drawing is not known yet; the y labels of most histograms need 40 units.
    x = Scale(low, high, 40, chart_width - 16)
    spans = []
    for name, value in marked:
        position = x(min(value, high))
        width = BOLD_WIDTH * (len(name) + len(number(value)) + 3)
        anchor = "start" if position + width < chart_width and value <= high else "end"
        spans.append((name, value, anchor, position, width))
    placed = []
    row = 0
    for name, value, anchor, _, _ in reversed(spans):
        if anchor == "end":
            placed.append((name, value, row, anchor))
            row += 1
    end = None
    for name, value, anchor, position, width in spans:
        if anchor == "start":
            if end is not None and end + 4 > position:
                row += 1
            end = position + width
            placed.append((name, value, row, anchor))
    return row + (end is not None), placed
