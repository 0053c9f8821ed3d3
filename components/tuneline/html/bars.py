"""Charts of bars, and of intervals of a difference."""

from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import NamedTuple

from tuneline.html.frame import (
    BOLD_WIDTH,
    CHARACTER_WIDTH,
    NARROW,
    Scale,
    drawn,
    empty,
    figure,
    legend_of,
    nice_ticks,
    svg_of,
    tick_texts,
    xy,
)
from tuneline.html.units import number


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
    """Change from base to tuned. Default: tuned - base."""


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
        return empty(title, "no values to draw")
    grey = set(muted)
    summary = "; ".join(f"{label} {text(value)}" for label, value in rows)

    def draw(width: int) -> str:
        # On a phone, a label is above its bar.
        above = 18 if width == NARROW else 0
        left = 10 + (0 if above else BOLD_WIDTH * max(len(label) for label, _ in rows))
        right = width - 16 - CHARACTER_WIDTH * max(len(text(value)) for _, value in rows)
        scale = Scale(0, max(value for _, value in rows) or 1, left, right)
        name_x, anchor = (left, "start") if above else (left - 8, "end")
        parts = []
        for index, (label, value) in enumerate(rows):
            name_y = 24 + (28 + above) * index
            y = name_y - 14 + above
            kind = "rest" if label in grey else "s1"
            parts.append(
                f'<text class="name" x="{xy(name_x)}" y="{name_y}" text-anchor="{anchor}">'
                f"{escape(label)}</text>"
                f'<rect class="bar {kind}" x="{xy(left)}" y="{y}" '
                f'width="{xy(scale(value) - left)}" height="20" rx="2">'
                f"<title>{escape(label)}: {escape(text(value))}</title></rect>"
                f'<text class="value" x="{xy(scale(value) + 6)}" y="{y + 14}">'
                f"{escape(text(value))}</text>"
            )
        height = 16 + (28 + above) * len(rows)
        return svg_of(width, height, parts, title or x_label, summary)

    return figure(title or x_label, drawn(draw))


def interval_chart(
    rows: Sequence[IntervalRow | tuple[str, float, float, float, float]],
    *,
    x_label: str = "score",
    title: str = "",
    higher_is_better: bool = True,
    whole: float = 1,
) -> str:
    """Return a chart of the base and tuned value of each row, and of their difference.

    There is one scale for the values and one for the differences with their intervals. All rows
    share both scales, so they should have the same metric. The colour of an interval shows whether
    it lies wholly on the better side of zero, wholly on the worse side, or includes zero.

    Args:
        rows: the comparisons.
        x_label: name of the values.
        title: heading of the chart.
        higher_is_better: whether the better side is above zero.
        whole: largest value of fractions, 1 or 100. Values between 0 and it are drawn on a scale of
            this length, so that a small change looks small.
    """
    if not rows:
        return empty(title, "no comparisons")
    full = [row if isinstance(row, IntervalRow) else IntervalRow(*row) for row in rows]
    values = [value for row in full for value in (row.base, row.tuned)]
    low, high = min(values), max(values)
    summary = "; ".join(
        f"{row.label}: base {number(row.base)}, tuned {number(row.tuned)}, change "
        f"{number(_difference(row))}, interval {number(row.low)} to {number(row.high)}"
        for row in full
    )

    def draw(width: int) -> str:
        about = 3 if width > NARROW else 2
        if low >= 0 and high <= whole:
            value_ticks = nice_ticks(0, whole, about + 1)
        else:
            value_ticks = nice_ticks(0.0 if 0 <= low < 0.5 * high else low, high, about)
        ends = [end for row in full for end in (row.low, row.high, _difference(row))]
        change_ticks = nice_ticks(min(0.0, *ends), max(0.0, *ends), about)
        # On a phone, the names of the two scales do not fit beside each other.
        top = 14 if width > NARROW else 30
        first = 30 + top
        bottom = first + 46 * len(full)
        middle = round(0.54 * width)
        left = Scale(value_ticks[0], value_ticks[-1], 20, middle - 46)
        right = Scale(change_ticks[0], change_ticks[-1], middle + 10, width - 20)
        parts = [
            f'<text class="axis" x="8" y="14">{escape(x_label)}</text>',
            f'<text class="axis" x="{middle - 2}" y="{top}">change (95 % interval)</text>',
        ]
        for scale, ticks in ((left, value_ticks), (right, change_ticks)):
            for tick, text in zip(ticks, tick_texts(ticks), strict=True):
                x, zero = xy(scale(tick)), " zero" if scale is right and tick == 0 else ""
                parts.append(
                    f'<line class="grid{zero}" x1="{x}" x2="{x}" y1="{top + 10}" '
                    f'y2="{bottom}"/><text class="tick" x="{x}" y="{bottom + 16}" '
                    f'text-anchor="middle">{text}</text>'
                )
        for index, row in enumerate(full):
            y = first + 46 * index
            change = _difference(row)
            above, below = ("better", "worse") if higher_is_better else ("worse", "better")
            side = above if row.low > 0 else below if row.high < 0 else "undecided"
            parts.append(
                f'<text class="name" x="8" y="{y}">{escape(row.label)}</text>'
                f'<line class="link" x1="{xy(left(row.base))}" x2="{xy(left(row.tuned))}" '
                f'y1="{y + 18}" y2="{y + 18}"/>'
                f'<circle class="hollow" cx="{xy(left(row.base))}" cy="{y + 18}" r="5">'
                f"<title>base: {number(row.base)}</title></circle>"
                f'<circle class="dot s1" cx="{xy(left(row.tuned))}" cy="{y + 18}" r="5">'
                f"<title>tuned: {number(row.tuned)}</title></circle>"
                f'<g class="{side}"><title>change {number(change)}, 95 % interval '
                f"{number(row.low)} to {number(row.high)}</title>"
                f'<line class="interval" x1="{xy(right(row.low))}" x2="{xy(right(row.high))}" '
                f'y1="{y + 18}" y2="{y + 18}"/>'
                + "".join(
                    f'<line class="interval end" x1="{xy(right(end))}" x2="{xy(right(end))}" '
                    f'y1="{y + 13}" y2="{y + 23}"/>'
                    for end in (row.low, row.high)
                )
                + f'<circle class="estimate" cx="{xy(right(change))}" cy="{y + 18}" r="4.5"/></g>'
            )
        return svg_of(width, bottom + 24, parts, title or x_label, summary)

    legend = legend_of([("hollow", "base"), ("s1", "tuned")])
    return figure(title, drawn(draw), legend)


def _difference(row: IntervalRow) -> float:
    return row.tuned - row.base if row.difference is None else row.difference
