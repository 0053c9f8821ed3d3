"""The layout of every page: one file that needs no network and no script.

A page is opened from a disk, in KFP's viewer or as a mail attachment, so styles and charts are
inline. Colours follow the light or dark setting of the reader, and everything can be printed. The
functions of charts.py and bars.py are exported here, so that a step has to import only this module.
"""

import re
from collections.abc import Iterable, Sequence
from html import escape

from tuneline.html.bars import IntervalRow, bar_chart, interval_chart
from tuneline.html.charts import ScatterPoint, histogram, line_chart, scatter_chart
from tuneline.html.flow import Stage, line_diagram
from tuneline.html.stylesheet import STYLESHEET
from tuneline.runtime.printable import printable
from tuneline.seals import seal_page
from tuneline.version import VERSION

__all__ = [
    "Cell",
    "IntervalRow",
    "ScatterPoint",
    "Stage",
    "badge",
    "banner",
    "bar_chart",
    "code",
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
    "todo",
]

_OPTION = re.compile(r"--\w+")
TONES = ("good", "bad", "warn", "plain")


class Cell(str):
    """HTML for a table cell. A cell that is a plain str is escaped."""


def render_page(
    title: str, sections_html: Sequence[str], subtitle: str = "", *, lead: str = ""
) -> str:
    """Return a whole HTML page, which ends with the hash of its text.

    Control characters, half surrogates and marks of direction are shown as escapes: they come from
    data and names, could reorder a sentence, and a half surrogate cannot be written to a file.

    Args:
        title: plain text of the heading and of the window's title.
        sections_html: HTML of the cards, usually made by `section`.
        subtitle: plain text below the title.
        lead: HTML between the title and the cards, e.g. a banner and tiles.
    """
    cards = "\n".join(f'<section class="card">\n{html}\n</section>' for html in sections_html)
    below = f'<p class="subtitle">{escape(subtitle)}</p>' if subtitle else ""
    html = f"""<!doctype html>
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
    return seal_page(printable(html))


def section(heading: str, *parts: str, note: str = "") -> str:
    """Return the content of a card, which is a section of the page.

    Args:
        heading: plain text.
        parts: HTML.
        note: plain text next to the heading, in a muted colour.
    """
    aside = f'<p class="note">{escape(note)}</p>' if note else ""
    return "\n".join([f'<div class="heading"><h2>{escape(heading)}</h2>{aside}</div>', *parts])


def paragraph(text: str, *, muted: bool = False) -> str:
    """Return plain text as a paragraph."""
    return f'<p class="{"muted" if muted else "text"}">{escape(text)}</p>'


def badge(text: str, tone: str = "plain") -> Cell:
    """Return a small coloured label; the tone is good, bad, warn or plain."""
    return Cell(f'<span class="badge {_tone(tone)}">{escape(text)}</span>')


def code(text: str) -> Cell:
    """Return a command or a path; a narrow screen does not break an option after its hyphens."""
    kept_whole = _OPTION.sub(r"<span>\g<0></span>", escape(text))
    return Cell(f"<code>{kept_whole}</code>")


def banner(heading: str, text: str, tone: str = "plain", *, small: str = "") -> str:
    """Return the box with the result of the page.

    Args:
        heading: a word or two, in bold.
        text: the sentence next to it.
        tone: colour of the box: good, bad, warn or plain.
        small: a sentence below, in small print.
    """
    more = f'<p class="small">{escape(small)}</p>' if small else ""
    return (
        f'<div class="banner {_tone(tone)}" role="status"><strong>{escape(heading)}</strong>'
        f"<div><p>{escape(text)}</p>{more}</div></div>"
    )


def tiles(values: Iterable[tuple[str, str, str]]) -> str:
    """Return a row of figures; `values` has the name, the value and a line of text of each."""
    inner = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd>{escape(value)}</dd>'
        f'<dd class="below">{escape(below)}</dd></div>'
        for name, value, below in values
    )
    return f'<dl class="tiles">{inner}</dl>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Return a list of names and values; a value that is a `Cell` is HTML."""
    return _pairs("facts", pairs)


def todo(pairs: Iterable[tuple[str, str]]) -> str:
    """Return a list of names, each above its value; a value that is a `Cell` is HTML."""
    return _pairs("todo", pairs)


def _pairs(kind: str, pairs: Iterable[tuple[str, str]]) -> str:
    inner = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{_cell(value)}</dd></div>" for name, value in pairs
    )
    return f'<dl class="{kind}">{inner}</dl>'


def details(summary: str, html: str, *, is_open: bool = False) -> str:
    """Return HTML that is shown after a click on `summary`, and always in print."""
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
    """Return a table; on a narrow screen, each row becomes a list of names and values.

    Args:
        headers: column names.
        rows: cells of plain text, or `Cell`s of HTML.
        numeric: indices of the columns that are aligned to the right.
        caption: plain text above the table.
        prose: whether cells hold sentences; columns are then equally wide and wrap.
    """
    right = set(numeric)

    def cells(tag: str, row: Sequence[str]) -> str:
        out = []
        for index, value in enumerate(row):
            attributes = ' class="number"' if index in right else ""
            if tag == "th":
                attributes += ' scope="col"'
            else:
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
        raise ValueError(f"unknown tone '{tone}': use one of {', '.join(TONES)}")
    return tone
