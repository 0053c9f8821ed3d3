"""What a repository holds already, and what a new version of it leaves as it is.

People write into repositories too: they edit the model card and add files. Only files that the last
tuneline.json lists are replaced or deleted, and of the model card only the part between two
markers.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneline.artifacts import PUBLISHED_BUNDLE, Bundle
from tuneline.errors import OutputExistsError, RecipeError
from tuneline.publish.card_parts import CARD_FILE, CardParts, join_card, split_card
from tuneline.record import files_below
from tuneline.seals import sealed_json

logger = logging.getLogger(__name__)

MARKER_FILE = PUBLISHED_BUNDLE
"""File in every repository that tuneline made; repositories without it are never written to."""
MAX_READ_BYTES = 16 << 20
"""Largest tuneline.json or README.md that is read from a repository."""

_WEIGHTS = (".safetensors", ".gguf")
_MEASURED = frozenset({"record_sha256", "card", "run_id"})
"""Keys of tuneline.json that two equal runs fill differently: the card has speeds and times. A
repository therefore names the run that published its content first."""
_FREE = frozenset({".gitattributes"})
"""Files that the Hub makes, which do not show that people use a repository."""


@dataclass(frozen=True)
class Previous:
    """The content of a repository before a push."""

    name: str
    """Name of the repository, for messages."""
    files: frozenset[str]
    """Paths of its files."""
    bundle: dict[str, Any]
    """Content of its tuneline.json; empty if it has none that can be read."""
    card: str | None
    """Content of its README.md."""

    @property
    def ours(self) -> frozenset[str]:
        """Return the files that tuneline published last."""
        listed = self.bundle.get("files")
        names = set(listed) if isinstance(listed, dict) else set()
        return self.files & (names | {MARKER_FILE})

    @property
    def theirs(self) -> frozenset[str]:
        """Return the files that people added."""
        return self.files - self.ours - _FREE - {CARD_FILE}


def read_bundle(text: str | None) -> dict[str, Any]:
    """Return the content of a tuneline.json; an empty one if it cannot be read."""
    try:
        Bundle.parse(text or "{}")
    except RecipeError:
        return {}
    bundle: dict[str, Any] = json.loads(text or "{}")
    return bundle


def same_model(bundle: Mapping[str, Any], last: Mapping[str, Any]) -> bool:
    """Return whether two tuneline.json are of the same files, made by the same recipe and version.

    Two runs of one recipe differ in their speed, which the card has, so cards are not compared.
    """
    return all(
        bundle.get(key) == last.get(key) for key in (bundle.keys() | last.keys()) - _MEASURED
    )


def model_sha256(bundle: Mapping[str, Any]) -> str:
    """Return a hash that is the same for two tuneline.json of which `same_model` is true."""
    keys = sorted(bundle.keys() - _MEASURED)
    return _sha256(json.dumps([[key, bundle[key]] for key in keys], sort_keys=True))


def check_ours(previous: Previous, *, kind: str, names: Set[str]) -> None:
    """Check that a repository may get a new version.

    Args:
        previous: its content.
        kind: kind of the new version.
        names: files of the new version.

    Raises:
        OutputExistsError: tuneline did not make the repository, it has another kind of content,
            or it has weights that people added under a name that the new version needs.
    """
    advice = "Choose another name in publish_to, or remove the repository yourself"
    if MARKER_FILE not in previous.files and previous.files - _FREE:
        raise OutputExistsError(
            f"the repository {previous.name} exists, but was not made by tuneline: it has no "
            f"{MARKER_FILE}. {advice}"
        )
    held = previous.bundle.get("kind", kind)
    if held != kind:
        raise OutputExistsError(
            f"the repository {previous.name} holds the kind '{held}' of another run, and this run "
            f"would replace it with the kind '{kind}'. {advice}"
        )
    added = sorted(name for name in previous.theirs & names if name.endswith(_WEIGHTS))
    if added:
        raise OutputExistsError(
            f"the repository {previous.name} has {', '.join(added[:3])}, which its {MARKER_FILE} "
            "does not list, so somebody added it, and this run would replace it. Rename or remove "
            "the file, or choose another name in publish_to"
        )


def adapt(folder: Path, previous: Previous) -> list[str]:
    """Change a staged repository so that what people wrote stays; return the files to delete.

    Args:
        folder: the staged repository.
        previous: the content of the repository.
    """
    path = folder / MARKER_FILE
    bundle = json.loads(path.read_text(encoding="utf-8"))
    staged = files_below(folder).keys()
    if previous.card is not None and _is_same(bundle, previous):
        logger.info("%s holds the same model already, so it stays as it is", previous.name)
        path.write_text(sealed_json(previous.bundle), encoding="utf-8")
        (folder / CARD_FILE).write_text(previous.card, encoding="utf-8")
        return []
    kept = sorted(previous.theirs & staged)
    for name in kept:
        logger.warning(
            "%s: %s was added by somebody and is kept; this run's %s is not published",
            *(previous.name, name, name),
        )
        (folder / name).unlink()
        bundle["files"].pop(name, None)
    if kept:
        path.write_text(sealed_json(bundle), encoding="utf-8")
    if previous.card is not None and (folder / CARD_FILE).is_file():
        _keep_card(folder / CARD_FILE, previous, bundle)
    return sorted(previous.ours - staged - {CARD_FILE})


def _is_same(bundle: Mapping[str, Any], previous: Previous) -> bool:
    """Return whether a new version has the same files, made by the same recipe and version.

    Two runs of one recipe differ in their speed, which the card has, so cards are not compared.
    Where somebody edited our part of the card, the new one replaces it.
    """
    parts, last = split_card(previous.card or ""), previous.bundle.get("card")
    if parts is None or not isinstance(last, dict) or _sha256(parts.ours) != last.get("sha256"):
        return False
    is_complete = previous.bundle.get("files", {}).keys() <= previous.files
    return is_complete and same_model(bundle, previous.bundle)


def _keep_card(path: Path, previous: Previous, bundle: dict[str, Any]) -> None:
    """Put what people wrote in the card of a repository into the new card."""
    assert previous.card is not None
    old, new = split_card(previous.card), split_card(path.read_text(encoding="utf-8"))
    if old is None or new is None:
        # Without markers, nothing tells which part is ours.
        path.write_text(previous.card, encoding="utf-8")
        logger.warning(
            "%s: README.md has no markers of tuneline any more, so it is kept as it is; its "
            "figures may be those of an earlier version. Delete it to get a new one",
            previous.name,
        )
        return
    last = previous.bundle.get("card")
    last = last if isinstance(last, dict) else {}
    if last.get("sha256") not in (None, _sha256(old.ours)):
        logger.warning(
            "%s: somebody edited the part of README.md between tuneline's markers, which is "
            "replaced; the repository's history has it. Write outside the markers",
            previous.name,
        )
    written = last.get("front_matter")
    written = written if isinstance(written, dict) else new.front_matter
    changed = {
        key
        for key in old.front_matter.keys() | written.keys()
        if old.front_matter.get(key) != written.get(key)
    }
    matter = {key: value for key, value in new.front_matter.items() if key not in changed}
    matter |= {key: value for key, value in old.front_matter.items() if key in changed}
    path.write_text(join_card(CardParts(matter, old.before, new.ours, old.after)), encoding="utf-8")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
