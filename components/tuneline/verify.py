"""Check that artifacts and published repositories are what their records say."""

import json
from dataclasses import dataclass
from pathlib import Path

from tuneline.artifacts import (
    PUBLISHED_BUNDLE,
    DatasetManifest,
    Decision,
    ImportanceMatrix,
    MergeProof,
    ModelOrigin,
    Published,
    QuantizedModel,
    Record,
    RunSummary,
    Scores,
    TrainingSummary,
    hash_files,
)
from tuneline.environment import describe_environment
from tuneline.errors import DataError

KINDS: tuple[type[Record], ...] = (
    ModelOrigin,
    DatasetManifest,
    TrainingSummary,
    MergeProof,
    ImportanceMatrix,
    QuantizedModel,
    Scores,
    Decision,
    Published,
    RunSummary,
)
# What the Hub and its client add, and the card, which names the repository.
_NOT_OURS = {"README.md", ".gitattributes"}
_CACHE = ".cache/"


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
    checked = [
        _check(path, record.files, record.environment, {record.filename})
        for path, record in records
    ]
    known = _known_inputs([record for _, record in records])
    for (_, record), found in zip(records, checked, strict=True):
        found.differences.extend(_foreign_inputs(record, known))
    for path in sorted(directory.rglob(PUBLISHED_BUNDLE)):
        bundle = json.loads(path.read_text(encoding="utf-8"))
        left_out = {PUBLISHED_BUNDLE, *_NOT_OURS}
        checked.append(
            _check(path.parent, bundle.get("files", {}), bundle.get("trained_with", {}), left_out)
        )
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


def _known_inputs(records: list[Record]) -> dict[str, set[str]]:
    """Return the hashes by which later artifacts call the ones that were found."""
    known: dict[str, set[str]] = {}
    for record in records:
        if isinstance(record, ModelOrigin | DatasetManifest):
            name = "base_model" if isinstance(record, ModelOrigin) else "dataset"
            known.setdefault(name, set()).add(record.sha256)
        elif isinstance(record, TrainingSummary | MergeProof):
            name = "adapter" if isinstance(record, TrainingSummary) else "merged"
            known.setdefault(name, set()).add(record.content_sha256())
    return known


def _foreign_inputs(record: Record, known: dict[str, set[str]]) -> list[str]:
    """Say which inputs are of another content than the artifacts of that kind found here."""
    made_from = dict(record.made_from)
    if isinstance(record, TrainingSummary):
        made_from |= {"base_model": record.base_sha256, "dataset": record.dataset_sha256}
    return [
        f"made from the {name} {digest[:12]}, and here is {', '.join(sorted(known[name]))[:12]}"
        for name, digest in made_from.items()
        if name in known and digest not in known[name]
    ]
