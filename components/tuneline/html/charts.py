"""Charts as inline SVG: curves, histograms, bars, intervals of a difference, and scatter plots.

Every function returns a <figure>. Colours are classes of stylesheet.py, so a chart follows the
light or dark setting. A chart is 560 units wide, so that its text is readable both on a phone,
which shows the chart at two thirds of that width, and at the width of half a page. Each mark has
its value as <title>, for tooltips and screen readers.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

from tuneline.html.point_labels import place_names
from tuneline.html.units import number

WIDTH = 560
# Average widths of digits and lower-case letters in the page's font, regular and bold, at a size of
# 12 units.
CHARACTER_WIDTH = 6.7
BOLD_WIDTH = 7.4
MAX_POINTS = 400
MAX_DOTTED_POINTS = 25

Point = tuple[float, float]


class IntervalRow(NamedTuple):
    """One comparison of the base and the tuned value, with the interval of their difference."""

    label: str
    base: float
    tuned: float
    low: float
    """Lower end of the interval of the difference."""
    high: float
    """Upper end of the interval of the difference."""
    difference: float | None = None
    """Improvement from base to tuned; positive is better. Default: tuned - base."""


class ScatterPoint(NamedTuple):
    """One labelled point; the points of a group share a colour."""

    label: str
    group: str
    x: float
    y: float


class Scale:
    """Linear map from values to coordinates."""

    def __init__(self, low: float, high: float, start: float, stop: float) -> None:
        if high == low:
            low, high = low - 0.5, high + 0.5
        self.low, self.high = low, high
        self.start, self.stop = start, stop

    def __call__(self, value: float) -> float:
        """Return the coordinate of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round values (1, 2, 2.5 or 5 times a power of ten) that cover low to high."""
    if high == low:
        spread = abs(low) * 0.1 or 1.0
        low, high = low - spread, high + spread
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """Return the ticks as text, all with as many decimals as the tick that needs most."""
    texts = [f"{tick:.12f}".rstrip("0").rstrip(".") for tick in ticks]
    decimals = max((len(text.partition(".")[2]) for text in texts), default=0)
    return [f"{tick:,.{decimals}f}" if abs(tick) < 1e9 else f"{tick:.3g}" for tick in ticks]


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
    finite = {name: [p for p in points if _is_finite(p)] for name, points in series.items()}
    everything = [point for points in finite.values() for point in points]
    if not everything:
        return _empty(title, "no values to draw")
    xs, ys = [x for x, _ in everything], [y for _, y in everything]
    y_low, y_high = min(ys), max(ys)
    if 0 <= y_low < 0.35 * y_high:
        y_low = 0.0  # an axis from zero misleads less, and loses little resolution here
    frame = _Frame(
        x_low=min(xs),
        x_high=max(xs),
        y_ticks=nice_ticks(y_low, y_high),
        x_label=x_label,
        y_label=y_label,
    )
    parts = [frame.grid()]
    for index, (name, points) in enumerate(series.items(), start=1):
        kept = thin(points, MAX_POINTS)
        curve = _path(kept, frame.x, frame.y)
        if curve:
            parts.append(f'<path class="curve s{index}" d="{curve}"/>')
        dotted = len(finite[name]) <= MAX_DOTTED_POINTS
        radius, kind = (3.5, f"dot s{index}") if dotted else (6, "hit")
        for x, y in filter(_is_finite, kept):
            parts.append(
                f'<circle class="{kind}" cx="{_c(frame.x(x))}" cy="{_c(frame.y(y))}" '
                f'r="{radius}"><title>{escape(name)}: {number(y)} at {number(x)} '
                f"{escape(x_label)}</title></circle>"
            )
    summary = "; ".join(
        f"{name} from {number(points[0][1])} to {number(points[-1][1])} over {len(points)} values"
        for name, points in finite.items()
        if points
    )
    legend = _legend([(f"s{index}", name) for index, name in enumerate(series, start=1)])
    return _figure(
        title, frame.svg(parts, title or y_label, summary), legend if len(series) > 1 else ""
    )


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
        return _empty(title, "no values to draw")
    low, high = min(b[0] for b in bins), max(b[1] for b in bins)
    marked = sorted((markers or {}).items(), key=lambda item: item[1])
    for _, value in marked:
        if high < value <= low + 1.5 * (high - low):
            high = math.ceil(value)
    rows, places = _place_markers(marked, low, high)
    frame = _Frame(
        x_low=low,
        x_high=high,
        y_ticks=nice_ticks(0, max(1, max(b[2] for b in bins)), 4),
        x_label=x_label,
        y_label=y_label,
        above=16 * rows,
    )
    parts = [frame.grid()]
    for start, below, value in bins:
        left, right, top = frame.x(start), frame.x(below), frame.y(value)
        gap = 1 if right - left > 4 else 0
        parts.append(
            f'<rect class="bar s1" x="{_c(left)}" y="{_c(top)}" '
            f'width="{_c(right - left - gap)}" height="{_c(frame.bottom - top)}">'
            f"<title>{number(start)} to {number(below - 1)} {escape(x_label)}: "
            f"{number(value)} {escape(y_label)}</title></rect>"
        )
    names = []
    for name, value, row, anchor in places:
        x, y = frame.x(min(value, high)), 30 + 16 * row
        if value <= high:
            parts.append(
                f'<line class="mark" x1="{_c(x)}" x2="{_c(x)}" y1="{y - 9}" '
                f'y2="{_c(frame.bottom)}"/>'
            )
        names.append(
            f'<text class="mark" x="{_c(x + (4 if anchor == "start" else -4))}" y="{y}" '
            f'text-anchor="{anchor}">{escape(name)} {number(value)}'
            f"{' &#8594;' if value > high else ''}</text>"
        )
    parts += names
    summary = (
        f"{len(bins)} bins from {number(low)} to {number(bins[-1][1])} {x_label}; "
        + ", ".join(f"{name} {number(value)}" for name, value in marked)
    )
    return _figure(title, frame.svg(parts, title or x_label, summary))


def bar_chart(
    rows: Sequence[tuple[str, float]],
    *,
    x_label: str,
    title: str = "",
    text: Callable[[float], str] = number,
    muted: Iterable[str] = (),
) -> str:
    """Return horizontal bars that start at zero, each with its value next to it.

    Args:
        rows: (label, value of at least zero), in the order of drawing.
        x_label: quantity, with its unit.
        title: heading of the chart. Default: `x_label`.
        text: formats a value.
        muted: labels of bars that are drawn in grey, as a comparison.
    """
    if not rows:
        return _empty(title, "no values to draw")
    grey = set(muted)
    left = 10 + BOLD_WIDTH * max(len(label) for label, _ in rows)
    right = WIDTH - 16 - CHARACTER_WIDTH * max(len(text(value)) for _, value in rows)
    scale = Scale(0, max(value for _, value in rows) or 1, left, right)
    parts = []
    for index, (label, value) in enumerate(rows):
        y = 10 + 28 * index
        kind = "rest" if label in grey else "s1"
        parts.append(
            f'<text class="name" x="{_c(left - 8)}" y="{y + 14}" text-anchor="end">'
            f"{escape(label)}</text>"
            f'<rect class="bar {kind}" x="{_c(left)}" y="{y}" '
            f'width="{_c(scale(value) - left)}" height="20" rx="2">'
            f"<title>{escape(label)}: {escape(text(value))}</title></rect>"
            f'<text class="value" x="{_c(scale(value) + 6)}" y="{y + 14}">{escape(text(value))}'
            f"</text>"
        )
    height = 16 + 28 * len(rows)
    summary = "; ".join(f"{label} {text(value)}" for label, value in rows)
    return _figure(title or x_label, _svg(height, parts, f"{title or x_label}", summary))


def interval_chart(
    rows: Sequence[IntervalRow | tuple[str, float, float, float, float]],
    *,
    x_label: str = "score",
    title: str = "",
) -> str:
    """Return a chart of the base and tuned value of each row, and of their difference.

    There is one scale for the values and one for the differences with their intervals. All rows
    share both scales, so they should have the same metric. The colour of an interval shows whether
    the interval is below zero, above zero or includes zero.
    """
    if not rows:
        return _empty(title, "no comparisons")
    full = [row if isinstance(row, IntervalRow) else IntervalRow(*row) for row in rows]
    values = [value for row in full for value in (row.base, row.tuned)]
    low, high = min(values), max(values)
    if low >= 0 and high <= 1:
        value_ticks = nice_ticks(0, 1, 4)
    else:
        value_ticks = nice_ticks(0.0 if 0 <= low < 0.5 * high else low, high, 3)
    ends = [end for row in full for end in (row.low, row.high, _difference(row))]
    change_ticks = nice_ticks(min(0.0, *ends), max(0.0, *ends), 3)
    first = 44
    bottom = first + 46 * len(full)
    left = Scale(value_ticks[0], value_ticks[-1], 20, 256)
    right = Scale(change_ticks[0], change_ticks[-1], 312, WIDTH - 20)
    parts = [
        f'<text class="axis" x="8" y="14">{escape(x_label)}</text>',
        '<text class="axis" x="300" y="14">improvement (95 % interval)</text>',
    ]
    for scale, ticks in ((left, value_ticks), (right, change_ticks)):
        for tick, text in zip(ticks, tick_texts(ticks), strict=True):
            zero = " zero" if scale is right and tick == 0 else ""
            parts.append(
                f'<line class="grid{zero}" x1="{_c(scale(tick))}" x2="{_c(scale(tick))}" y1="24" '
                f'y2="{bottom}"/><text class="tick" x="{_c(scale(tick))}" y="{bottom + 16}" '
                f'text-anchor="middle">{text}</text>'
            )
    for index, row in enumerate(full):
        y = first + 46 * index
        change = _difference(row)
        side = "better" if row.low > 0 else "worse" if row.high < 0 else "undecided"
        parts.append(
            f'<text class="name" x="8" y="{y}">{escape(row.label)}</text>'
            f'<line class="link" x1="{_c(left(row.base))}" x2="{_c(left(row.tuned))}" '
            f'y1="{y + 18}" y2="{y + 18}"/>'
            f'<circle class="hollow" cx="{_c(left(row.base))}" cy="{y + 18}" r="5">'
            f"<title>base: {number(row.base)}</title></circle>"
            f'<circle class="dot s1" cx="{_c(left(row.tuned))}" cy="{y + 18}" r="5">'
            f"<title>tuned: {number(row.tuned)}</title></circle>"
            f'<g class="{side}"><title>improvement {number(change)}, 95 % interval '
            f"{number(row.low)} to {number(row.high)}</title>"
            f'<line class="interval" x1="{_c(right(row.low))}" x2="{_c(right(row.high))}" '
            f'y1="{y + 18}" y2="{y + 18}"/>'
            + "".join(
                f'<line class="interval end" x1="{_c(right(end))}" x2="{_c(right(end))}" '
                f'y1="{y + 13}" y2="{y + 23}"/>'
                for end in (row.low, row.high)
            )
            + f'<circle class="estimate" cx="{_c(right(change))}" cy="{y + 18}" r="4.5"/></g>'
        )
    summary = "; ".join(
        f"{row.label}: base {number(row.base)}, tuned {number(row.tuned)}, improvement "
        f"{number(_difference(row))}, interval {number(row.low)} to {number(row.high)}"
        for row in full
    )
    legend = _legend([("hollow", "base"), ("s1", "tuned")])
    return _figure(title, _svg(bottom + 24, parts, title or x_label, summary), legend)


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
        return _empty(title, "no values to draw")
    low = math.floor(min(math.log10(point.y) for point in points))
    high = max(math.ceil(max(math.log10(point.y) for point in points)), low + 1)
    powers = range(low, high + 1)
    ticks = nice_ticks(0, max(point.x for point in points), 5)
    top, bottom, left = 28, 248, 54
    longest = max(len(point.label) for point in points)
    x = Scale(0, ticks[-1], left, WIDTH - 24 - BOLD_WIDTH * longest)
    y = Scale(low, high, bottom, top)
    parts = []
    for power in powers:
        parts.append(
            f'<line class="grid" x1="{left}" x2="{WIDTH - 16}" y1="{_c(y(power))}" '
            f'y2="{_c(y(power))}"/><text class="tick" x="{left - 7}" y="{_c(y(power) + 4)}" '
            f'text-anchor="end">{10.0**power:g}</text>'
        )
    for tick in ticks:
        parts.append(
            f'<line class="tickmark" x1="{_c(x(tick))}" x2="{_c(x(tick))}" y1="{bottom}" '
            f'y2="{bottom + 4}"/><text class="tick" x="{_c(x(tick))}" y="{bottom + 18}" '
            f'text-anchor="middle">{escape(x_text(tick))}</text>'
        )
    parts.append(
        f'<line class="base" x1="{left}" x2="{WIDTH - 16}" y1="{bottom}" y2="{bottom}"/>'
        f'<text class="axis" x="4" y="14">{escape(y_label)}</text>'
        f'<text class="axis" x="{WIDTH - 16}" y="{bottom + 36}" text-anchor="end">'
        f"{escape(x_label)}</text>"
    )
    groups = list(dict.fromkeys(point.group for point in points))
    dots = [(x(point.x), y(math.log10(point.y))) for point in points]
    places = place_names(
        dots,
        [BOLD_WIDTH * len(point.label) for point in points],
        area=(left, top - 12, WIDTH, bottom),
    )
    for (at, height), place in zip(dots, places, strict=True):
        if place.line:
            parts.append(
                f'<line class="tickmark" x1="{_c(at)}" y1="{_c(height)}" '
                f'x2="{_c(place.line[0])}" y2="{_c(place.line[1])}"/>'
            )
    for point, (at, height), place in zip(points, dots, places, strict=True):
        parts.append(
            f'<circle class="dot s{groups.index(point.group) + 1}" cx="{_c(at)}" '
            f'cy="{_c(height)}" r="5"><title>{escape(point.label)}: {escape(x_text(point.x))}, '
            f"{number(point.y)} {escape(y_label)}</title></circle>"
            f'<text class="name" x="{_c(place.x)}" y="{_c(place.y)}" '
            f'text-anchor="{"start" if place.x > at else "end"}">{escape(point.label)}</text>'
        )
    summary = "; ".join(f"{p.label}: {x_text(p.x)}, {number(p.y)}" for p in points)
    legend = _legend([(f"s{index}", name) for index, name in enumerate(groups, start=1)])
    svg = _svg(bottom + 44, parts, title or y_label, summary)
    return _figure(title, svg, legend if len(groups) > 1 else "")


def thin(points: Sequence[Point], limit: int) -> Sequence[Point]:
    """Return at most about `limit` points: the lowest and the highest of each stretch of points."""
    if len(points) <= limit:
        return points
    stretch = math.ceil(2 * len(points) / limit)
    kept: list[Point] = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        finite = [point for point in part if _is_finite(point)]
        if not finite:
            kept.append(part[0])  # the gap stays visible
            continue
        ends = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])}
        kept.extend(sorted(ends))
    return kept


class _Frame:
    """Axes, grid and labels of a chart."""

    def __init__(
        self,
        *,
        x_low: float,
        x_high: float,
        y_ticks: list[float],
        x_label: str,
        y_label: str,
        above: int = 0,
    ) -> None:
        self.y_ticks = y_ticks
        self.x_label, self.y_label = x_label, y_label
        self.top, self.bottom = 28 + above, 228 + above
        self.left = 14 + CHARACTER_WIDTH * max(len(text) for text in tick_texts(y_ticks))
        self.right = WIDTH - 16
        self.x = Scale(x_low, x_high, self.left, self.right)
        self.y = Scale(y_ticks[0], y_ticks[-1], self.bottom, self.top)
        self.x_ticks = [t for t in nice_ticks(x_low, x_high, 6) if self.x.low <= t <= self.x.high]

    def grid(self) -> str:
        parts = []
        for tick, text in zip(self.y_ticks, tick_texts(self.y_ticks), strict=True):
            y = _c(self.y(tick))
            parts.append(
                f'<line class="grid" x1="{_c(self.left)}" x2="{self.right}" y1="{y}" y2="{y}"/>'
                f'<text class="tick" x="{_c(self.left - 7)}" y="{_c(self.y(tick) + 4)}" '
                f'text-anchor="end">{text}</text>'
            )
        for tick, text in zip(self.x_ticks, tick_texts(self.x_ticks), strict=True):
            x = _c(self.x(tick))
            parts.append(
                f'<line class="tickmark" x1="{x}" x2="{x}" y1="{self.bottom}" '
                f'y2="{self.bottom + 4}"/><text class="tick" x="{x}" y="{self.bottom + 18}" '
                f'text-anchor="middle">{text}</text>'
            )
        parts.append(
            f'<line class="base" x1="{_c(self.left)}" x2="{self.right}" y1="{self.bottom}" '
            f'y2="{self.bottom}"/><text class="axis" x="4" y="14">{escape(self.y_label)}</text>'
            f'<text class="axis" x="{self.right}" y="{self.bottom + 36}" text-anchor="end">'
            f"{escape(self.x_label)}</text>"
        )
        return "".join(parts)

    def svg(self, parts: list[str], title: str, summary: str) -> str:
        return _svg(self.bottom + 44, parts, title, summary)


def _place_markers(
    marked: list[tuple[str, float]], low: float, high: float
) -> tuple[int, list[tuple[str, float, int, str]]]:
    """Return the number of rows of the markers' names, and (name, value, row, anchor) of each.

    A name is to the right of its marker's line, or to the left of the line if there is no room. The
    first rows have the names on the left, ordered from right to left. The rows below have the names
    on the right, ordered from left to right. Each line then starts below the names that extend over
    its position.
    """
    # The left edge of the drawing is not known yet; the y labels of most histograms need 40 units.
    x = Scale(low, high, 40, WIDTH - 16)
    spans = []
    for name, value in marked:
        position = x(min(value, high))
        width = BOLD_WIDTH * (len(name) + len(number(value)) + 3)
        anchor = "start" if position + width < WIDTH and value <= high else "end"
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


def _path(points: Sequence[Point], x: Scale, y: Scale) -> str:
    commands = []
    pen_down = False
    for point in points:
        if not _is_finite(point):
            pen_down = False
            continue
        commands.append(f"{'L' if pen_down else 'M'}{_c(x(point[0]))} {_c(y(point[1]))}")
        pen_down = True
    return "".join(commands) if len(commands) > 1 else ""


def _difference(row: IntervalRow) -> float:
    return row.tuned - row.base if row.difference is None else row.difference


def _is_finite(point: Point) -> bool:
    return math.isfinite(point[0]) and math.isfinite(point[1])


def _c(value: float) -> str:
    """Return a coordinate with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _svg(height: float, parts: list[str], title: str, summary: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {_c(height)}" role="img" '
        f'xmlns="http://www.w3.org/2000/svg"><title>{escape(title)}</title>'
        f"<desc>{escape(summary)}</desc>{''.join(parts)}</svg>"
    )


def _legend(entries: list[tuple[str, str]]) -> str:
    items = "".join(f'<li><i class="{kind}"></i>{escape(name)}</li>' for kind, name in entries)
    return f'<ul class="legend">{items}</ul>'


def _figure(title: str, svg: str, legend: str = "") -> str:
    caption = f"<figcaption>{escape(title)}</figcaption>" if title else ""
    return f"<figure>{caption}{legend}{svg}</figure>"


def _empty(title: str, text: str) -> str:
    return _figure(title, f'<p class="muted">{escape(text)}</p>')
