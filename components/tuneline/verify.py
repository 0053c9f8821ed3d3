"""Check that artifacts and published repositories are what their records say."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneline.artifacts import KINDS, PUBLISHED_BUNDLE
from tuneline.errors import DataError
from tuneline.record import Ancestor, hash_files
from tuneline.runtime.environment import describe_environment

# What the Hub and its client add, and the card, which names the repository.
_NOT_OURS = {"README.md", ".gitattributes"}
_CACHE = ".cache/"

Known = dict[str, list[Ancestor]]
"""What was found in a directory, by the names that later artifacts have for it."""


@dataclass(frozen=True)
class Checked:
    """One directory that was checked."""

    path: Path
    num_files: int
    differences: list[str]
    """Files and inputs that are not what the record says."""
    versions: list[str]
    """Versions that differ from this machine's: making it again may come out otherwise."""


def verify(directory: Path) -> list[Checked]:
    """Check every artifact and every published repository in or below a directory.

    Raises:
        DataError: there is none.
    """
    # A directory that has a record with hashes; older ones have records without.
    records = [
        (path.parent, kind.read(path.parent))
        for kind in KINDS
        for path in sorted(directory.rglob(kind.filename))
    ]
    known: Known = {}
    for _, record in records:
        known.setdefault(record.called(), []).append(record.as_ancestor())
    checked = []
    for path, record in records:
        found = _check(path, record.files, record.environment, {record.filename})
        found.differences.extend(foreign_inputs(record.made_from, known))
        checked.append(found)
    for path in sorted(directory.rglob(PUBLISHED_BUNDLE)):
        bundle = json.loads(path.read_text(encoding="utf-8"))
        left_out = {PUBLISHED_BUNDLE, *_NOT_OURS}
        found = _check(
            path.parent, bundle.get("files", {}), bundle.get("trained_with", {}), left_out
        )
        made_from = {
            name: Ancestor(sha256=bundle[f"{key}_sha256"], revision=bundle.get(f"{key}_revision"))
            for name, key in (("base_model", "base"), ("dataset", "dataset"))
            if f"{key}_sha256" in bundle
        }
        found.differences.extend(foreign_inputs(made_from, known))
        checked.append(found)
    if not checked:
        names = ", ".join(kind.filename for kind in KINDS)
        raise DataError(
            f"{directory} holds no artifact and no published repository (none of {names}, "
            f"{PUBLISHED_BUNDLE} in it or below): give a run's directory or a downloaded repository"
        )
    return checked


def _check(
    path: Path, files: dict[str, str], environment: dict[str, str], leave_out: set[str]
) -> Checked:
    if not files and not environment:
        return Checked(path, 0, ["its record has no hashes: made by an older tuneline"], [])
    found = hash_files(path, leave_out=leave_out)
    found = {name: digest for name, digest in found.items() if not name.startswith(_CACHE)}
    differences = [f"{name} is missing" for name in sorted(files.keys() - found.keys())]
    differences += [f"{name} is not in the record" for name in sorted(found.keys() - files.keys())]
    differences += [
        f"{name} was changed: sha256 {found[name][:12]}, recorded {files[name][:12]}"
        for name in sorted(files.keys() & found.keys())
        if files[name] != found[name]
    ]
    here = describe_environment()
    versions = [
        f"{name} {version} there, {here.get(name, 'none')} here"
        for name, version in environment.items()
        if here.get(name) != version
    ]
    return Checked(path, len(found), differences, versions)


def foreign_inputs(made_from: dict[str, Ancestor], known: Known) -> Iterator[str]:
    """Say which inputs are of another content than the artifacts of that name found here, and why.

    Yields:
        A sentence an input: its hash against that here, then each setting and version that differs.
    """
    for name, there in made_from.items():
        here = known.get(name, [])
        if not here or there.sha256 in {one.sha256 for one in here}:
            continue
        why = [
            f"{key} {old} there, {new} here"
            for key, old, new in _what_differs(_flat(there), _flat(here[0]))
        ]
        yield (
            f"made from the {name} {there.sha256[:12]}, and here is {here[0].sha256[:12]}"
            + (f": {'; '.join(why)}" if why else "")
        )


def _flat(ancestor: Ancestor) -> dict[str, Any]:
    """Return settings by dotted names, versions and the revision."""

    def walk(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for key, item in value.items():
                yield from walk(f"{prefix}.{key}" if prefix else key, item)
        else:
            yield prefix, value

    return {
        "revision": ancestor.revision or "none",
        **dict(walk("", ancestor.settings)),
        **ancestor.environment,
    }


def _what_differs(one: dict[str, Any], other: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in sorted(one.keys() & other.keys()):
        if one[key] != other[key]:
            yield key, one[key], other[key]
