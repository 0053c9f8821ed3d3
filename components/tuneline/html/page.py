"""The frame of every page that the line shows: one file, no network, no script.

A page opens from a disk, in KFP's viewer and in a mail attachment, so styles and pictures are
inline, colours follow the reader's light or dark setting, and everything prints. The charts are
in charts.py and come through here, so that a step imports one module.
"""

from collections.abc import Iterable, Sequence
from html import escape

from tuneline.html.charts import (
    IntervalRow,
    ScatterPoint,
    bar_chart,
    histogram,
    interval_chart,
    line_chart,
    scatter_chart,
)
from tuneline.html.flow import Stage, line_diagram
from tuneline.html.stylesheet import STYLESHEET
from tuneline.version import VERSION

__all__ = [
    "Cell",
    "IntervalRow",
    "ScatterPoint",
    "Stage",
    "badge",
    "banner",
    "bar_chart",
    "details",
    "facts",
    "histogram",
    "interval_chart",
    "line_chart",
    "line_diagram",
    "paragraph",
    "render_page",
    "scatter_chart",
    "section",
    "table",
    "tiles",
]

TONES = ("good", "bad", "warn", "plain")


class Cell(str):
    """A table cell that is HTML already; plain strings are escaped."""


def render_page(
    title: str, sections_html: Sequence[str], subtitle: str = "", *, lead: str = ""
) -> str:
    """Return a whole HTML page.

    Args:
        title: plain text, also the window's title.
        sections_html: what `section` returned, or any HTML; one card each.
        subtitle: plain text under the title.
        lead: HTML between the title and the cards, e.g. a banner and tiles.
    """
    cards = "\n".join(f'<section class="card">\n{html}\n</section>' for html in sections_html)
    below = f'<p class="subtitle">{escape(subtitle)}</p>' if subtitle else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="tuneline {VERSION}">
<title>{escape(title)}</title>
<style>{STYLESHEET}</style>
</head>
<body>
<main>
<header class="top">
<p class="brand">tuneline</p>
<h1>{escape(title)}</h1>
{below}
</header>
{lead}
{cards}
<footer>Made by tuneline {VERSION}. This page loads nothing from the network.</footer>
</main>
</body>
</html>
"""


def section(heading: str, *parts: str, note: str = "") -> str:
    """Return a card's content: a heading, a muted line beside it, and HTML parts."""
    aside = f'<p class="note">{escape(note)}</p>' if note else ""
    return "\n".join([f'<div class="heading"><h2>{escape(heading)}</h2>{aside}</div>', *parts])


def paragraph(text: str, *, muted: bool = False) -> str:
    """Return plain text as a paragraph."""
    return f'<p class="{"muted" if muted else "text"}">{escape(text)}</p>'


def badge(text: str, tone: str = "plain") -> Cell:
    """Return a small label; the tone is good, bad, warn or plain."""
    return Cell(f'<span class="badge {_tone(tone)}">{escape(text)}</span>')


def banner(heading: str, text: str, tone: str = "plain", *, small: str = "") -> str:
    """Return the box that says what came out."""
    more = f'<p class="small">{escape(small)}</p>' if small else ""
    return (
        f'<div class="banner {_tone(tone)}" role="status"><strong>{escape(heading)}</strong>'
        f"<div><p>{escape(text)}</p>{more}</div></div>"
    )


def tiles(values: Iterable[tuple[str, str, str]]) -> str:
    """Return a row of figures: (name, value, a line below it)."""
    inner = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd>{escape(value)}</dd>'
        f'<dd class="below">{escape(below)}</dd></div>'
        for name, value, below in values
    )
    return f'<dl class="tiles">{inner}</dl>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Return names with their values; a `Cell` value is taken as HTML."""
    inner = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{_cell(value)}</dd></div>" for name, value in pairs
    )
    return f'<dl class="facts">{inner}</dl>'


def details(summary: str, html: str, *, is_open: bool = False) -> str:
    """Return HTML that opens on a click; printing shows it."""
    opened = " open" if is_open else ""
    return f"<details{opened}><summary>{escape(summary)}</summary>\n{html}\n</details>"


def table(
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numeric: Iterable[int] = (),
    caption: str = "",
    prose: bool = False,
) -> str:
    """Return a table that scrolls sideways on a narrow screen.

    Args:
        headers: column names.
        rows: plain strings, escaped here, or `Cell`s.
        numeric: indices of the columns that are aligned to the right.
        caption: plain text above the table.
        prose: the cells hold sentences: equal columns that wrap, stacked on a narrow screen.
    """
    right = set(numeric)

    def cells(tag: str, row: Sequence[str]) -> str:
        out = []
        for index, value in enumerate(row):
            attributes = ' class="number"' if index in right else ""
            if tag == "th":
                attributes += ' scope="col"'
            elif prose:
                attributes += f' data-label="{escape(headers[index])}"'
            out.append(f"<{tag}{attributes}>{_cell(value)}</{tag}>")
        return "".join(out)

    body = []
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"a row of {len(row)} cells in a table of {len(headers)} columns")
        body.append(f"<tr>{cells('td', row)}</tr>")
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table{" class=" + chr(34) + "prose" + chr(34) if prose else ""}>'
        f"{title}<thead><tr>{cells('th', headers)}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _cell(value: str) -> str:
    return str(value) if isinstance(value, Cell) else escape(value)


def _tone(tone: str) -> str:
    if tone not in TONES:
        raise ValueError(f"no tone '{tone}': one of {', '.join(TONES)}")
    return tone
