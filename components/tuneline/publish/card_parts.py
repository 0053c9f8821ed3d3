"""The parts of a model card: front matter, what people wrote, and tuneline's part."""

from dataclasses import dataclass
from typing import Any

import yaml

from tuneline.bounded_yaml import load_yaml, split_front_matter
from tuneline.errors import DataError

CARD_FILE = "README.md"
BEGIN = "<!-- tuneline: begin. The text up to the end mark is replaced by the next run. -->"
END = "<!-- tuneline: end. Text below this line is kept. -->"


@dataclass(frozen=True)
class CardParts:
    """A model card in its parts."""

    front_matter: dict[str, Any]
    before: str
    """What people wrote above tuneline's part."""
    ours: str
    """Tuneline's part, without its markers."""
    after: str
    """What people wrote below tuneline's part."""


def join_card(card: CardParts) -> str:
    """Return the text of a card."""
    # No text of a run can hold a marker, so that the markers of a card are found again.
    ours = card.ours.replace("<!-- tuneline:", "<! -- tuneline:").strip("\n")
    matter = yaml.safe_dump(card.front_matter, sort_keys=False, allow_unicode=True)
    return f"---\n{matter}---\n{card.before}\n{BEGIN}\n\n{ours}\n\n{END}\n{card.after}"


def split_card(text: str) -> CardParts | None:
    """Return the parts of a card; None if it lacks a marker or its front matter cannot be read."""
    text = text.replace("\r\n", "\n")
    header, body = split_front_matter(text)
    try:
        matter: Any = load_yaml(header) or {}
    except (yaml.YAMLError, DataError):
        return None
    if not isinstance(matter, dict):
        return None
    before, begin, rest = body.partition(f"\n{BEGIN}\n")
    ours, end, after = rest.partition(f"\n{END}\n")
    if not begin or not end:
        return None
    return CardParts(matter, before, ours.strip("\n"), after)
