"""What charts are drawn with: scales, ticks, axes and the frame of a figure.

Each chart is drawn twice, for wide screens and for phones, because text that shrinks with its
drawing cannot be read on a phone. The stylesheet shows the drawing that fits.
"""

import math
from collections.abc import Callable, Sequence
from html import escape

WIDTH, NARROW = 560, 340
"""Widths of the two drawings of a chart; the second is about that of a card on a phone."""
# Average widths of digits and lower-case letters in the page's font, regular and bold, at a size of
# 12 units.
CHARACTER_WIDTH = 6.7
BOLD_WIDTH = 7.4

Point = tuple[float, float]


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


class Frame:
    """Axes, grid and labels of a chart."""

    def __init__(
        self,
        *,
        x_low: float,
        x_high: float,
        y_ticks: list[float],
        x_label: str,
        y_label: str,
        width: int,
        above: int = 0,
    ) -> None:
        self.width = width
        self.y_ticks = y_ticks
        self.x_label, self.y_label = x_label, y_label
        self.top, self.bottom = 28 + above, 228 + above
        self.left = 14 + CHARACTER_WIDTH * max(len(text) for text in tick_texts(y_ticks))
        self.right = width - 16
        self.x = Scale(x_low, x_high, self.left, self.right)
        self.y = Scale(y_ticks[0], y_ticks[-1], self.bottom, self.top)
        ticks = nice_ticks(x_low, x_high, round(width / 90))
        self.x_ticks = [tick for tick in ticks if self.x.low <= tick <= self.x.high]

    def grid(self) -> str:
        """Return the grid with the texts of ticks and axes."""
        parts = []
        for tick, text in zip(self.y_ticks, tick_texts(self.y_ticks), strict=True):
            y = xy(self.y(tick))
            parts.append(
                f'<line class="grid" x1="{xy(self.left)}" x2="{self.right}" y1="{y}" y2="{y}"/>'
                f'<text class="tick" x="{xy(self.left - 7)}" y="{xy(self.y(tick) + 4)}" '
                f'text-anchor="end">{text}</text>'
            )
        for tick, text in zip(self.x_ticks, tick_texts(self.x_ticks), strict=True):
            x = xy(self.x(tick))
            parts.append(
                f'<line class="tickmark" x1="{x}" x2="{x}" y1="{self.bottom}" '
                f'y2="{self.bottom + 4}"/><text class="tick" x="{x}" y="{self.bottom + 18}" '
                f'text-anchor="middle">{text}</text>'
            )
        parts.append(
            f'<line class="base" x1="{xy(self.left)}" x2="{self.right}" y1="{self.bottom}" '
            f'y2="{self.bottom}"/><text class="axis" x="4" y="14">{escape(self.y_label)}</text>'
            f'<text class="axis" x="{self.right}" y="{self.bottom + 36}" text-anchor="end">'
            f"{escape(self.x_label)}</text>"
        )
        return "".join(parts)

    def svg(self, parts: list[str], title: str, summary: str) -> str:
        """Return the drawing of a chart with this frame; see `svg_of`."""
        return svg_of(self.width, self.bottom + 44, parts, title, summary)


def path(points: Sequence[Point], x: Scale, y: Scale) -> str:
    """Return the path through points, with gaps where a value is not finite."""
    commands = []
    pen_down = False
    for point in points:
        if not is_finite(point):
            pen_down = False
            continue
        commands.append(f"{'L' if pen_down else 'M'}{xy(x(point[0]))} {xy(y(point[1]))}")
        pen_down = True
    return "".join(commands) if len(commands) > 1 else ""


def is_finite(point: Point) -> bool:
    """Return whether both coordinates are finite."""
    return math.isfinite(point[0]) and math.isfinite(point[1])


def xy(value: float) -> str:
    """Return a coordinate with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def drawn(draw: Callable[[int], str]) -> str:
    """Return both drawings of a chart.

    Args:
        draw: returns the drawing with a width.
    """
    return draw(WIDTH) + draw(NARROW)


def svg_of(width: int, height: float, parts: list[str], title: str, summary: str) -> str:
    """Return a drawing of a chart.

    Args:
        width: WIDTH or NARROW.
        height: height of the drawing.
        parts: elements of the drawing.
        title: name of the chart.
        summary: what the chart shows, for screen readers.
    """
    return (
        f'<svg class="chart {"narrow" if width == NARROW else "wide"}" '
        f'viewBox="0 0 {width} {xy(height)}" role="img" '
        f'xmlns="http://www.w3.org/2000/svg"><title>{escape(title)}</title>'
        f"<desc>{escape(summary)}</desc>{''.join(parts)}</svg>"
    )


def legend_of(entries: list[tuple[str, str]]) -> str:
    """Return the legend; an entry is a class of the stylesheet and a name."""
    items = "".join(f'<li><i class="{kind}"></i>{escape(name)}</li>' for kind, name in entries)
    return f'<ul class="legend">{items}</ul>'


def figure(title: str, svg: str, legend: str = "") -> str:
    """Return a figure with its caption and legend."""
    caption = f"<figcaption>{escape(title)}</figcaption>" if title else ""
    return f"<figure>{caption}{legend}{svg}</figure>"


def empty(title: str, text: str) -> str:
    """Return a figure that says why there is no chart."""
    return figure(title, f'<p class="muted">{escape(text)}</p>')
