"""Read the header of a base model's card."""

import logging
from pathlib import Path
from typing import Any

import yaml

from tuneline.bounded_yaml import MAX_CHARACTERS, load_yaml, split_front_matter
from tuneline.errors import DataError

logger = logging.getLogger(__name__)


def licence_of(path: Path) -> str | None:
    """Return the licence that the model card in `path` states, if there is a card."""
    return licence_in(_card_header(path))


def made_from(path: Path) -> str | None:
    """Return the model that the one in `path` was made from, if its card says."""
    return _joined(_card_header(path).get("base_model"))


def _card_header(path: Path) -> dict[str, Any]:
    """Return the header of the model card in `path`; empty if there is none."""
    card = path / "README.md"
    if not card.is_file():
        return {}
    with open(card, encoding="utf-8", errors="replace") as opened:
        text = opened.read(MAX_CHARACTERS)
    try:
        header = load_yaml(split_front_matter(text)[0], where=str(card))
    except (yaml.YAMLError, DataError) as error:
        logger.warning("the model card %s has a broken header: %s", card, error)
        return {}
    return header if isinstance(header, dict) else {}


def licence_in(header: dict[str, Any]) -> str | None:
    """Return `license` from a model card's header, or `license_name` if `license` is "other".

    The Hub allows a list of licences; all of them are returned, joined with "and".
    """
    licence = _joined(header.get("license"))
    return _joined(header.get("license_name")) or licence if licence == "other" else licence


def _joined(value: Any) -> str | None:
    values = value if isinstance(value, list) else [value]
    names = [str(item).strip() for item in values if isinstance(item, str | int | float)]
    return " and ".join(filter(None, names)) or None
