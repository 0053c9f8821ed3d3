"""Place the names of points in a chart, so that none lies on a point or on another name."""

from collections.abc import Sequence
from typing import NamedTuple

GAP = 9.0
"""Pixels between a point's middle and its name."""
LINE_HEIGHT = 14.0
RADIUS = 6.5
"""Of a point, with its edge."""


class Place(NamedTuple):
    """Where a name stands."""

    x: float
    """Its end at the point: the left one where it stands right of it."""
    y: float
    """Its baseline."""
    line: tuple[float, float] | None
    """End of the line at the name; none where the name is beside its point."""


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
    points: Sequence[tuple[float, float]], widths: Sequence[float], *, area: _Box | tuple
) -> list[Place]:
    """Return a place for the name of each point, in the points' order.

    Beside its point if there is room, else the nearest free place above or below, right before
    left; where there is none, right of it all the same.

    Args:
        points: middle of each, in pixels from the top left.
        widths: of each name.
        area: left, top, right and bottom that names stay within.
    """
    area = _Box(*area)
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
            if _within(_box(*place, width), area)
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
