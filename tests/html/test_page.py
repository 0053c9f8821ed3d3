"""Pages and charts: well formed, self-contained, and every mark where its value belongs."""

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from tuneline.html.charts import thin
from tuneline.html.flow import Stage, place
from tuneline.html.frame import nice_ticks, tick_texts
from tuneline.html.page import (
    Cell,
    IntervalRow,
    badge,
    bar_chart,
    histogram,
    interval_chart,
    line_chart,
    line_diagram,
    render_page,
    section,
    table,
)
from tuneline.html.units import duration, number, parameters, percent, signed, size

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Balance(HTMLParser):
    """Fails on a tag that is not closed in order, and collects what a browser would load."""

    def __init__(self):
        super().__init__()
        self.open, self.loads = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        assert tag not in ("script", "link", "iframe", "img", "object")

    def handle_startendtag(self, tag, attrs):
        self.loads += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(text: str) -> None:
    parser = Balance()
    parser.feed(text)
    assert parser.open == []
    assert parser.loads == []
    assert "url(" not in text and "@import" not in text
    assert not re.search(r"https?://", text.replace("http://www.w3.org/2000/svg", ""))
    for svg in re.findall(r"<svg.*?</svg>", text, re.S):
        ET.fromstring(svg)


def drawing(html: str) -> ET.Element:
    text = (
        re.search(r"<svg.*?</svg>", html, re.S)
        .group()
        .replace(' xmlns="http://www.w3.org/2000/svg"', "")
    )
    return ET.fromstring(text)


def texts(root: ET.Element, kind: str) -> list[str]:
    return [node.text for node in root.iter("text") if node.get("class") == kind]


def axis(root: ET.Element, coordinate: str, anchor: str, offset: float = 0.0):
    """Return value(coordinate), from the first and the last labelled tick of an axis."""
    ticks = [
        (float(node.get(coordinate)) - offset, float(node.text.replace(",", "")))
        for node in root.iter("text")
        if node.get("class") == "tick" and node.get("text-anchor") == anchor
    ]
    (c0, v0), (c1, v1) = min(ticks), max(ticks)
    return lambda c: v0 + (float(c) - c0) / (c1 - c0) * (v1 - v0)


def test_a_line_chart_maps_values_to_the_axes_it_shows() -> None:
    points = [(0, 2.412), (12, 1.07), (37, 0.5), (60, 0.2648)]
    root = drawing(line_chart({"evaluation": points}, x_label="step", y_label="loss"))
    x, y = axis(root, "x", "middle"), axis(root, "y", "end", offset=4)
    dots = [(x(c.get("cx")), y(c.get("cy"))) for c in root.iter("circle")]
    assert dots == [pytest.approx(point, abs=0.02) for point in points]
    path = next(node.get("d") for node in root.iter("path"))
    drawn = [(x(a), y(b)) for a, b in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]
    assert drawn == [pytest.approx(point, abs=0.02) for point in points]
    assert [c.find("title").text for c in root.iter("circle")][1] == "evaluation: 1.07 at 12 step"


def test_one_end_of_each_scale_by_hand() -> None:
    root = drawing(line_chart({"a": [(0, 0), (10, 5)]}, x_label="x", y_label="y"))
    first, last = root.findall(".//circle")
    # Ticks 0..5 are one character wide: the axis starts at 14 + 6.7, and spans 28 to 228 down.
    assert (first.get("cx"), first.get("cy")) == ("20.7", "228")
    assert (last.get("cx"), last.get("cy")) == ("544", "28")


def test_a_value_that_is_not_finite_breaks_the_curve() -> None:
    nan = float("nan")
    root = drawing(
        line_chart(
            {"a": [(0, 1), (1, 2), (2, nan), (3, 3), (4, 4)]}, x_label="step", y_label="loss"
        )
    )
    path = next(node.get("d") for node in root.iter("path"))
    assert re.sub(r"[\d. ]", "", path) == "MLML"
    assert len(root.findall(".//circle")) == 4


@pytest.mark.parametrize("series", [{}, {"a": []}, {"a": [(0, float("nan"))]}])
def test_a_chart_of_nothing_says_so(series: dict) -> None:
    assert "no values to draw" in line_chart(series, x_label="x", y_label="y")


def test_one_value_is_drawn() -> None:
    root = drawing(line_chart({"a": [(5, 1.5)]}, x_label="x", y_label="y"))
    y = axis(root, "y", "end", offset=4)
    assert y(root.find(".//circle").get("cy")) == pytest.approx(1.5, abs=0.01)


def test_thinning_keeps_the_extremes() -> None:
    points = [(i, (i * 7919) % 1000) for i in range(10_000)]
    points[4321], points[8765] = (4321, 5000), (8765, -5000)
    kept = thin(points, 400)
    assert len(kept) <= 402 and (4321, 5000) in kept and (8765, -5000) in kept
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)


def test_histogram_bars_have_the_height_and_width_of_their_bins() -> None:
    bins = [(0, 10, 5), (10, 20, 40), (20, 40, 13)]
    root = drawing(histogram(bins, x_label="tokens", y_label="rows", markers={"p95": 31}))
    x, y = axis(root, "x", "middle"), axis(root, "y", "end", offset=4)
    bars = [node for node in root.iter("rect") if node.get("class").startswith("bar")]
    for (start, below, value), bar in zip(bins, bars, strict=True):
        left, width = float(bar.get("x")), float(bar.get("width"))
        assert x(left) == pytest.approx(start, abs=0.05)
        assert x(left + width + 1) == pytest.approx(below, abs=0.05)  # one unit is the gap
        assert y(bar.get("y")) == pytest.approx(value, abs=0.2)
    mark = next(node for node in root.iter("line") if node.get("class") == "mark")
    assert x(mark.get("x1")) == pytest.approx(31, abs=0.05)
    assert texts(root, "mark") == ["p95 31"]


def test_a_marker_far_off_does_not_squash_the_bars() -> None:
    root = drawing(
        histogram([(0, 100, 3)], x_label="t", y_label="n", markers={"max_seq_length": 2048})
    )
    assert texts(root, "mark") == ["max_seq_length 2,048 \u2192"]
    assert not [node for node in root.iter("line") if node.get("class") == "mark"]


def test_bars_are_proportional() -> None:
    root = drawing(bar_chart([("f16", 200.0), ("q4", 50.0), ("none", 0.0)], x_label="MB"))
    widths = [float(node.get("width")) for node in root.iter("rect")]
    assert widths[1] == pytest.approx(widths[0] / 4, abs=0.01) and widths[2] == 0


def test_intervals_stand_where_they_belong() -> None:
    rows = [IntervalRow("a", 0.3, 0.8, 0.4, 0.6), ("b", 0.5, 0.4, -0.3, 0.1)]
    root = drawing(interval_chart(rows, x_label="acc"))
    ticks = [
        (float(node.get("x")), float(node.text))
        for node in root.iter("text")
        if node.get("class") == "tick"
    ]
    left = [tick for tick in ticks if tick[0] < 290]
    right = [tick for tick in ticks if tick[0] > 290]

    def value(ticks, x):
        (x0, v0), (x1, v1) = ticks[0], ticks[-1]
        return v0 + (float(x) - x0) / (x1 - x0) * (v1 - v0)

    circles = {
        kind: [c.get("cx") for c in root.iter("circle") if c.get("class") == kind]
        for kind in ("hollow", "dot s1", "estimate")
    }
    assert [value(left, x) for x in circles["hollow"]] == pytest.approx([0.3, 0.5], abs=0.01)
    assert [value(left, x) for x in circles["dot s1"]] == pytest.approx([0.8, 0.4], abs=0.01)
    assert [value(right, x) for x in circles["estimate"]] == pytest.approx([0.5, -0.1], abs=0.01)
    spans = [
        (value(right, node.get("x1")), value(right, node.get("x2")))
        for node in root.iter("line")
        if node.get("class") == "interval"
    ]
    assert spans == [pytest.approx((0.4, 0.6), abs=0.01), pytest.approx((-0.3, 0.1), abs=0.01)]
    assert [g.get("class") for g in root.iter("g")] == ["better", "undecided"]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 2.4, [0, 0.5, 1, 1.5, 2, 2.5]),
        (0, 60, [0, 20, 40, 60]),
        (-0.1, 0.3, [-0.1, 0, 0.1, 0.2, 0.3]),
        (980, 1020, [980, 990, 1000, 1010, 1020]),
    ],
)
def test_ticks_are_round_and_span_the_values(low: float, high: float, ticks: list) -> None:
    assert nice_ticks(low, high) == pytest.approx(ticks)


def test_tick_texts_have_one_number_of_decimals() -> None:
    assert tick_texts([0, 0.25, 0.5]) == ["0.00", "0.25", "0.50"]
    assert tick_texts([0, 1000]) == ["0", "1,000"]


LINE = [
    Stage("fetch", "finished", 10),
    Stage("train", "failed", 40, "step 3 of 60", after=("fetch",)),
    Stage("gate", "not run", after=("train", "base")),
    Stage("base", "finished", 20, after=("fetch",)),
]


def test_the_line_is_placed_by_what_waits_for_what() -> None:
    # base ends in column 1, where train is: it takes the lane below.
    assert place(LINE) == {"fetch": (0, 0), "train": (1, 0), "gate": (2, 0), "base": (1, 1)}


def test_a_long_way_keeps_its_lane_free() -> None:
    steps = [
        Stage("a", "finished"),
        Stage("b", "finished", after=("a",)),
        Stage("c", "finished", after=("b",)),
        Stage("d", "finished", after=("c", "side")),
        Stage("side", "finished", after=("a",)),
        Stage("other", "finished", after=("b",)),
    ]
    places = place(steps)
    assert places["side"] == (1, 1)
    assert places["other"] == (2, 2)  # not (2, 1): the way from side to d runs there


def test_the_line_shows_status_and_time_of_each_step() -> None:
    wide, narrow = re.findall(r"<svg.*?</svg>", line_diagram(LINE), re.S)
    for svg in (wide, narrow):
        root = ET.fromstring(svg.replace(' xmlns="http://www.w3.org/2000/svg"', ""))
        stages = {
            g.find("title").text.partition(":")[0]: g
            for g in root.iter("g")
            if g.get("class", "").startswith("stage")
        }
        assert {n: g.get("class") for n, g in stages.items()} == {
            "fetch": "stage finished",
            "train": "stage failed",
            "gate": "stage not-run",
            "base": "stage finished",
        }
        assert texts(stages["train"], "time") == ["40 s"]
        assert texts(stages["train"], "detail") == ["step 3 of 60"]
        assert texts(stages["gate"], "time") == ["not run"]
        bars = {name: float(g.findall("rect")[-1].get("width")) for name, g in stages.items()}
        assert bars["base"] == pytest.approx(bars["train"] / 2, abs=0.1)


def test_a_page_is_whole_and_loads_nothing() -> None:
    text = render_page(
        "A & B",
        [
            section("One", line_chart({"a": [(0, 1), (1, 2)]}, x_label="<x>", y_label="y & z")),
            section("Two", table(["a", "b"], [["<i>", badge("fine", "good")]], numeric=[1])),
            line_diagram(LINE),
        ],
        'sub "title"',
    )
    check_page(text)
    assert "<title>A &amp; B</title>" in text
    assert "&lt;i&gt;" in text and '<span class="badge good">fine</span>' in text
    assert "prefers-color-scheme:dark" in text and "@media print" in text


def test_a_row_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="a row of 1 cells in a table of 2 columns"):
        table(["a", "b"], [["x"]])


def test_cells_are_escaped_unless_they_are_html() -> None:
    assert "&lt;b&gt;" in table(["a"], [["<b>"]])
    assert "<b>x</b>" in table(["a"], [[Cell("<b>x</b>")]])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (duration(0.42), "0.4 s"),
        (duration(9.96), "10 s"),
        (duration(59.6), "1 min 00 s"),
        (duration(3725), "1 h 02 min"),
        (duration(None), "-"),
        (size(999), "999 B"),
        (size(105_454_000), "105 MB"),
        (size(1_934_000_000), "1.93 GB"),
        (parameters(134_515_008), "135 M"),
        (parameters(8_030_261_248), "8.03 B"),
        (percent(0.0349), "3.5 %"),
        (percent(0.0001), "< 0.1 %"),
        (percent(0.0), "0.0 %"),
        (number(0.31), "0.31"),
        (number(0.00031), "0.00031"),
        (number(12345.678), "12,346"),
        (number(float("nan")), "-"),
        (signed(0.56), "+0.56"),
        (signed(-0.02), "-0.02"),
    ],
)
def test_numbers_as_people_read_them(text: str, expected: str) -> None:
    assert text == expected


def luminance(colour: str) -> float:
    colour = colour if len(colour) == 7 else "#" + "".join(c * 2 for c in colour[1:])
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_has_contrast_in_light_and_dark() -> None:
    from tuneline.html.stylesheet import STYLESHEET

    themes = [
        dict(re.findall(r"--([\w-]+):\s*(#[0-9a-f]{3,6})", block))
        for block in re.findall(r":root\{(.*?)\}", STYLESHEET, re.S)[:2]
    ]
    pairs = [("ink", "card"), ("ink", "page"), ("muted", "card"), ("muted", "page"), ("s2", "card")]
    pairs += [(tone, f"{tone}-back") for tone in ("good", "bad", "warn")]
    pairs += [("muted", f"{tone}-back") for tone in ("good", "bad", "warn")]
    for theme in themes:
        for front, back in pairs:
            light, dark = sorted((luminance(theme[front]), luminance(theme[back])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (front, back)
