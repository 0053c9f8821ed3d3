"""The diagram of a run's steps: one box per step, with its status, its time and its inputs.

The diagram is drawn twice: from left to right for wide screens, and from top to bottom for narrow
screens. The stylesheet shows the drawing that fits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from tuneline.html.units import duration

Status = Literal["finished", "failed", "running", "not run", "skipped", "next"]

BOX_WIDTH, BOX_HEIGHT = 146, 82
GAP_X, GAP_Y = 20, 16
ROW_HEIGHT = 46
NARROW_WIDTH = 360

# SVG paths, drawn in a circle of radius 7 around the origin, so that statuses differ not only by
# colour.
ICONS: dict[str, str] = {
    "finished": "M-3.2 .2L-1 2.6L3.4 -2.6",
    "failed": "M-2.6 -2.6L2.6 2.6M2.6 -2.6L-2.6 2.6",
    "running": "M-1.6 -3L3 0L-1.6 3Z",
    "next": "M-3 0H2.6M.2 -2.6L2.8 0L.2 2.6",
    "not run": "M-2.8 0L2.8 0",
    "skipped": "M-3 -2.6L0 0L-3 2.6M.6 -2.6L3.6 0L.6 2.6",
}


@dataclass(frozen=True)
class Stage:
    """One step of the diagram."""

    name: str
    status: Status
    seconds: float | None = None
    detail: str = ""
    """A few words on the result, or on the progress of a step that did not finish."""
    after: tuple[str, ...] = ()
    """Names of the steps that this step waits for; names of steps not drawn are ignored."""


def line_diagram(steps: Sequence[Stage]) -> str:
    """Return the diagram: a drawing for wide screens and a drawing for narrow screens."""
    if not steps:
        return '<figure class="line"><p class="muted">no steps</p></figure>'
    return f'<figure class="line">{_across(steps)}{_down(steps)}</figure>'


def place(steps: Sequence[Stage]) -> dict[str, tuple[int, int]]:
    """Return (column, lane) of each step. Lanes are the rows of the drawing for wide screens.

    The column is the length of the longest path to the step. A step occupies its lane up to the
    column before the last of the steps that wait for it, so that no other box is placed where the
    edge to that step is drawn.
    """
    names = {step.name for step in steps}
    columns: dict[str, int] = {}
    for step in steps:
        columns[step.name] = max(
            (columns[name] + 1 for name in step.after if name in columns), default=0
        )
    taken: list[set[int]] = []
    places = {}
    for step in steps:
        column = columns[step.name]
        last = max(
            (columns[other.name] - 1 for other in steps if step.name in other.after),
            default=column,
        )
        span = set(range(column, max(last, column) + 1))
        lane = next((i for i, used in enumerate(taken) if not used & span), len(taken))
        if lane == len(taken):
            taken.append(set())
        taken[lane] |= span
        places[step.name] = (column, lane)
    assert set(places) == names, "two steps have the same name"
    return places


def _across(steps: Sequence[Stage]) -> str:
    places = place(steps)
    width = (BOX_WIDTH + GAP_X) * (max(column for column, _ in places.values()) + 1) - GAP_X + 2
    height = (BOX_HEIGHT + GAP_Y) * (max(lane for _, lane in places.values()) + 1) - GAP_Y + 2
    longest = _longest(steps)
    parts = []
    status = {step.name: step.status for step in steps}
    for step in steps:
        for name in step.after:
            if name in places:
                used = status[name] == "finished" and step.status != "skipped"
                idle = "" if used else " idle"
                parts.append(
                    f'<path class="edge{idle}" d="{_edge(places[name], places[step.name])}"/>'
                )
    for step in steps:
        x, y = _corner(places[step.name])
        bar = (BOX_WIDTH - 20) * (step.seconds or 0) / longest
        parts.append(
            f'<g class="stage {_class(step)}" transform="translate({x} {y})">'
            f"<title>{escape(_sentence(step))}</title>"
            f'<rect class="box" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6"/>'
            f"{_icon(step, 17, 20)}"
            f'<text class="step" x="31" y="24">{escape(step.name)}</text>'
            f'<text class="time" x="10" y="45">{escape(_time(step))}</text>'
            f'<text class="detail" x="10" y="61">{escape(step.detail)}</text>'
            f'<rect class="track" x="10" y="70" width="{BOX_WIDTH - 20}" height="3" rx="1.5"/>'
            f'<rect class="spent" x="10" y="70" width="{bar:.1f}" height="3" rx="1.5"/></g>'
        )
    return _svg("across", width, height, steps, parts)


def _down(steps: Sequence[Stage]) -> str:
    longest = _longest(steps)
    places = place(steps)
    # From top to bottom in the order of execution.
    steps = sorted(steps, key=lambda step: places[step.name])
    parts = [
        f'<line class="edge" x1="14" x2="14" y1="16" y2="{ROW_HEIGHT * (len(steps) - 1) + 16}"/>'
    ]
    for index, step in enumerate(steps):
        y = ROW_HEIGHT * index
        track = NARROW_WIDTH - 33
        spent = track * (step.seconds or 0) / longest
        parts.append(
            f'<g class="stage {_class(step)}" transform="translate(0 {y})">'
            f"<title>{escape(_sentence(step))}</title>"
            f"{_icon(step, 14, 16)}"
            f'<text class="step" x="32" y="20">{escape(step.name)}</text>'
            f'<text class="detail" x="{NARROW_WIDTH - 92}" y="20" text-anchor="end">'
            f"{escape(step.detail)}</text>"
            f'<text class="time" x="{NARROW_WIDTH - 1}" y="20" text-anchor="end">'
            f"{escape(_time(step))}</text>"
            f'<rect class="track" x="32" y="29" width="{track}" height="3" rx="1.5"/>'
            f'<rect class="spent" x="32" y="29" width="{spent:.1f}" height="3" rx="1.5"/></g>'
        )
    return _svg("down", NARROW_WIDTH, ROW_HEIGHT * len(steps), steps, parts)


def _corner(position: tuple[int, int]) -> tuple[int, int]:
    return 1 + (BOX_WIDTH + GAP_X) * position[0], 1 + (BOX_HEIGHT + GAP_Y) * position[1]


def _edge(source: tuple[int, int], target: tuple[int, int]) -> str:
    """Return the path from the right side of one box to the left side of another."""
    (x1, y1), (x2, y2) = _corner(source), _corner(target)
    x1, y1, y2 = x1 + BOX_WIDTH, y1 + BOX_HEIGHT // 2, y2 + BOX_HEIGHT // 2
    if y1 == y2:
        return f"M{x1} {y1}H{x2}"
    # An edge to a lower lane changes lanes in the gap after the source, an edge to a higher lane in
    # the gap before the target. In between, it is in the lane of the step that is the lower one.
    down = target[1] > source[1]
    bend = x1 + GAP_X // 2 if down else x2 - GAP_X // 2
    radius = 6 if down else -6
    return (
        f"M{x1} {y1}H{bend - 6}Q{bend} {y1} {bend} {y1 + radius}"
        f"V{y2 - radius}Q{bend} {y2} {bend + 6} {y2}H{x2}"
    )


def _icon(step: Stage, x: int, y: int) -> str:
    return (
        f'<g transform="translate({x} {y})"><circle class="disc" r="7.5"/>'
        f'<path class="sign" d="{ICONS[step.status]}"/></g>'
    )


def _svg(kind: str, width: int, height: int, steps: Sequence[Stage], parts: list[str]) -> str:
    description = "; ".join(_sentence(step) for step in steps)
    return (
        f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" '
        f'xmlns="http://www.w3.org/2000/svg"><title>Steps of the run</title>'
        f"<desc>{escape(description)}</desc>{''.join(parts)}</svg>"
    )


def _longest(steps: Sequence[Stage]) -> float:
    return max((step.seconds or 0 for step in steps), default=0) or 1.0


def _class(step: Stage) -> str:
    return step.status.replace(" ", "-")


def _time(step: Stage) -> str:
    return duration(step.seconds) if step.seconds is not None else step.status


def _sentence(step: Stage) -> str:
    parts = [step.status, duration(step.seconds) if step.seconds is not None else "", step.detail]
    return f"{step.name}: {', '.join(part for part in parts if part)}"
