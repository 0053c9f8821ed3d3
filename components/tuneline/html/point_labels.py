"""Place the labels of points in a chart, so that none covers a point or another label."""

from collections.abc import Sequence
from typing import NamedTuple

GAP = 9.0
"""Pixels between the centre of a point and its label."""
LINE_HEIGHT = 14.0
RADIUS = 6.5
"""Radius of a point with its edge, in pixels."""


class Place(NamedTuple):
    """Position of a label."""

    x: float
    """The end of the label that is nearer to the point, e.g. the left end if the label is to the
    right of the point."""
    y: float
    """Baseline of the label."""
    line: tuple[float, float] | None
    """End of the line from point to label; None if the label is next to the point."""


class _Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: "_Box") -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )


def place_names(
    points: Sequence[tuple[float, float]],
    widths: Sequence[float],
    *,
    area: tuple[float, float, float, float],
) -> list[Place]:
    """Return a position for the label of each point, in the order of the points.

    A label is next to its point if there is room, otherwise at the nearest free position above or
    below. The right side is preferred to the left side. If no position is free, the label is to the
    right of its point.

    Args:
        points: centres of the points, in pixels from the top left.
        widths: widths of the labels, in pixels.
        area: left, top, right and bottom of the area that labels stay within.
    """
    bounds = _Box(*area)
    taken = [_Box(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in points]
    places = []
    for (x, y), width in zip(points, widths, strict=True):
        candidates = [
            (x + GAP if right else x - GAP - width, y + 4 + side * step * LINE_HEIGHT / 2)
            for step in range(40)
            for right in (True, False)
            for side in ((1,) if step == 0 else (1, -1))
        ]
        free = (
            place
            for place in candidates
            if _within(_box(*place, width), bounds)
            and not any(_box(*place, width).meets(other) for other in taken)
        )
        left, baseline = next(free, candidates[0])
        taken.append(_box(left, baseline, width))
        is_beside = abs(baseline - y - 4) < LINE_HEIGHT
        near, outwards = (left, -2) if left > x else (left + width, 2)
        end = (near + outwards, baseline - 4)
        places.append(Place(near, baseline, None if is_beside else end))
    return places


def _box(left: float, baseline: float, width: float) -> _Box:
    return _Box(left, baseline - 10, left + width, baseline + 3)


def _within(box: _Box, area: _Box) -> bool:
    return (
        box.left >= area.left
        and box.right <= area.right
        and box.top >= area.top
        and box.bottom <= area.bottom
    )
