"""The type of a check of `plan`, and the Markdown page that lists the checks."""

from dataclasses import dataclass
from typing import Literal

from tuneline.html.markdown import escape_markdown

Verdict = Literal["ok", "warn", "fail", "unknown"]
"""`fail`: the run cannot work as configured; `warn`: the run may not work; `unknown`: `plan` had no
permission to check, or could not check."""


@dataclass(frozen=True)
class Check:
    """One thing that `plan` checked."""

    name: str
    verdict: Verdict
    words: str
    """What `plan` found, with the value and the limit."""
    advice: str = ""
    """What to change; empty if nothing has to be changed."""


def markdown_page(checks: list[Check]) -> str:
    """Return the checks as a Markdown page with one table."""
    rows = [
        f"| {check.verdict} | {check.name} | {escape_markdown(check.words)} | "
        f"{escape_markdown(check.advice)} |"
        for check in checks
    ]
    head = ["# Plan", "", "| verdict | check | result | what to do |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, ""])
