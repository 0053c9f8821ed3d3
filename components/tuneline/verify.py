"""Check that artifacts and published repositories match their records."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneline.artifacts import (
    PUBLISHED_BUNDLE,
    RECORDS,
    Bundle,
    DatasetManifest,
    Decision,
    QuantizedModel,
)
from tuneline.errors import DataError, TunelineError
from tuneline.models.agreement import Stored, disagreements
from tuneline.record import Ancestor, Record, hash_files, sha256_of_file
from tuneline.runtime.environment import describe_environment
from tuneline.seals import broken_page_seal, broken_seal, is_sealed_page
from tuneline.verdict import wrong_verdict

# Not compared: users edit model cards, and the Hub and its client add .gitattributes and .cache/.
_NOT_HASHED = {"README.md", ".gitattributes"}
_CACHE = ".cache/"

SEALED_FILES = ("record", "metrics", "earlier")
"""Names of artifacts that are one JSON file with the hash of its text: copies of the records of
other artifacts, the figures that KFP compares, and what earlier runs measured."""
QUESTIONS_FILE = "questions"
"""Name of the artifact with the questions of the benchmarks; the record of the dataset has its
hash."""

WITHOUT_HASH = {
    "executor_output.json": "KFP's note of what a task put out",
    "events.jsonl": "progress of the steps",
    "run.log": "what the steps wrote",
    "run.json": "how the run was started and how it ended",
    "recipe.yaml": "the recipe for `tuneline resume`; the records hold the values that were used",
    "README.md": "a model card, which people edit",
    ".gitattributes": "written by the Hub",
}
"""Files that no record and no seal covers -> what they are, by their names. Those of a run change
while it runs; no result is read from them."""
_EARLIER_EVENTS = re.compile(r"events-\d+\.jsonl")

Known = dict[str, list[Ancestor]]
"""Artifacts found in a directory, by their key in the `made_from` of other artifacts."""


@dataclass(frozen=True)
class Checked:
    """Result of checking one artifact or one published repository."""

    path: Path
    num_files: int
    differences: list[str]
    """One sentence per file or input that does not match the record."""
    versions: list[str]
    """Recorded versions that differ from those on this machine, where a new run may therefore give
    other results."""


def verify(directory: Path) -> list[Checked]:
    """Check every artifact and every published repository in or below a directory.

    Raises:
        DataError: there is no artifact and no published repository.
    """
    checked: list[Checked] = []
    records: list[tuple[Path, Record, str]] = []
    for kind in RECORDS:
        for path in sorted(directory.rglob(kind.filename)):
            try:
                text = path.read_text(encoding="utf-8")
                records.append((path, kind.parse(text, where=path.name), broken_seal(text)))
            except (TunelineError, UnicodeDecodeError) as error:
                checked.append(Checked(path.parent, 0, [f"cannot be read: {error}"], []))
    known: Known = {}
    for _, record, _ in records:
        known.setdefault(record.called(), []).append(record.as_ancestor())
    for path, record, difference in records:
        result = _check(path.parent, record.files, record.environment, {path.name})
        result.differences.extend([f"{path.name} {difference}"] if difference else [])
        result.differences.extend(
            f"{path.name} does not name the {name} that it was made from"
            for name in record.missing_ancestors()
        )
        result.differences.extend(foreign_inputs(record.made_from, known))
        ancestors = _ancestors(record, [(path.parent, other) for path, other, _ in records])
        result.differences.extend(disagreements(Stored(record, path.parent), ancestors))
        if isinstance(record, Decision):
            result.differences.extend(_decision(record, [other for _, other, _ in records]))
        checked.append(result)
    checked.extend(_check_bundle(path, known) for path in sorted(directory.rglob(PUBLISHED_BUNDLE)))
    checked.extend(_check_single_files(directory, [record for _, record, _ in records]))
    if not checked:
        names = ", ".join(record.filename for record in RECORDS)
        raise DataError(
            f"{directory} holds no artifact and no published repository: neither it nor a "
            f"directory below has {names} or {PUBLISHED_BUNDLE}. Name the directory of a run or a "
            "downloaded repository"
        )
    return checked


def files_without_hash(directory: Path) -> dict[str, str]:
    """Return the files in and below a directory that `verify` cannot check, and what they are.

    Files of the same name that are known to have no hash are one entry, with their number.
    """
    names = {record.filename for record in RECORDS} | {PUBLISHED_BUNDLE}
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    artifacts = {path.parent for path in files if path.name in names}
    repositories = {path.parent for path in files if path.name == PUBLISHED_BUNDLE}
    has_dataset = any(path.name == DatasetManifest.filename for path in files)
    known: dict[str, int] = {}
    others: dict[str, str] = {}
    for path in files:
        if covered_by := artifacts & {*path.parents}:
            if path.name not in _NOT_HASHED or not covered_by & repositories:
                continue
        elif (
            path.name in SEALED_FILES
            or (path.name == QUESTIONS_FILE and has_dataset)
            or is_sealed_page(path)
        ):
            continue
        name = "events.jsonl" if _EARLIER_EVENTS.fullmatch(path.name) else path.name
        if name in WITHOUT_HASH:
            known[name] = known.get(name, 0) + 1
        else:
            others[path.relative_to(directory).as_posix()] = "belongs to no artifact"
    counted = {
        f"{number} x {name}" if number > 1 else name: WITHOUT_HASH[name]
        for name, number in known.items()
    }
    return {**counted, **others}


def _decision(decision: Decision, records: list[Record]) -> Iterator[str]:
    """Yield how a decision contradicts itself, and which exports here it was not made on."""
    if wrong := wrong_verdict(decision):
        yield wrong
    here: dict[str, set[str]] = {}
    for record in records:
        if isinstance(record, QuantizedModel):
            here.setdefault(record.format, set()).add(record.record_sha256)
    for item in decision.exports:
        if item.format in here and item.sealed not in here[item.format]:
            yield (
                f"made on the export {item.format} with the record {item.sealed[:12]}, which is "
                "not here"
            )


def _ancestors(record: Record, found: list[tuple[Path, Record]]) -> dict[str, Stored]:
    """Return the artifacts that a record names as its ancestors, with the same content."""
    return {
        other.called(): Stored(other, directory)
        for directory, other in found
        if (named := record.made_from.get(other.called())) is not None
        and named.sha256 == other.as_ancestor().sha256
    }


def _check_single_files(directory: Path, records: list[Record]) -> Iterator[Checked]:
    """Check the artifacts that are a single file: pages, Markdown texts and JSON files."""
    questions = {
        record.benchmarks_sha256
        for record in records
        if isinstance(record, DatasetManifest) and record.benchmarks_sha256
    }
    for path in sorted(directory.rglob("*")):
        if not path.is_file():
            continue
        if path.name in SEALED_FILES:
            yield from _single_file(path, broken_seal(_text(path)))
        elif path.name == QUESTIONS_FILE and questions:
            known = sha256_of_file(path) in questions
            yield from _single_file(path, "" if known else "differs from what prepare searched for")
        elif is_sealed_page(path):
            yield from _single_file(path, broken_page_seal(path.read_bytes()))


def _single_file(path: Path, difference: str) -> Iterator[Checked]:
    if difference:
        yield Checked(path, 1, [difference], [])


def _check_bundle(path: Path, known: Known) -> Checked:
    """Check a published repository."""
    text = _text(path)
    try:
        bundle = Bundle.parse(text, where=path.name)
    except TunelineError as error:
        return Checked(path.parent, 0, [f"cannot be read: {error}"], [])
    left_out = {PUBLISHED_BUNDLE, *_NOT_HASHED}
    result = _check(path.parent, bundle.files, bundle.trained_with, left_out)
    if difference := broken_seal(text):
        result.differences.append(f"{path.name} {difference}")
    made_from = {}
    if bundle.base_sha256 is not None:
        made_from["base_model"] = Ancestor(sha256=bundle.base_sha256, revision=bundle.base_revision)
    if bundle.dataset_sha256 is not None:
        made_from["dataset"] = Ancestor(sha256=bundle.dataset_sha256)
    result.differences.extend(foreign_inputs(made_from, known))
    return result


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _check(
    path: Path, files: dict[str, str], environment: dict[str, str], leave_out: set[str]
) -> Checked:
    if not files and not environment:
        return Checked(path, 0, ["the record has no hashes: an older tuneline made it"], [])
    hashes = hash_files(path, leave_out=leave_out)
    hashes = {name: digest for name, digest in hashes.items() if not name.startswith(_CACHE)}
    differences = [f"{name} is missing" for name in sorted(files.keys() - hashes.keys())]
    differences += [f"{name} is not in the record" for name in sorted(hashes.keys() - files.keys())]
    differences += [
        f"{name} was changed: SHA-256 {hashes[name][:12]}, recorded {files[name][:12]}"
        for name in sorted(files.keys() & hashes.keys())
        if files[name] != hashes[name]
    ]
    here = describe_environment()
    versions = [
        f"{name} {version} there, {here.get(name, 'none')} here"
        for name, version in environment.items()
        if here.get(name) != version
    ]
    return Checked(path, len(hashes), differences, versions)


def foreign_inputs(made_from: dict[str, Ancestor], known: Known) -> Iterator[str]:
    """Find inputs of an artifact whose content differs from the found artifacts of the same name.

    Args:
        made_from: lineage of an artifact.
        known: the artifacts found.

    Yields:
        A sentence per such input: both hashes, then the settings and versions that differ.
    """
    for name, there in made_from.items():
        here = known.get(name, [])
        if not here:
            continue
        same = [ancestor for ancestor in here if ancestor.sha256 == there.sha256]
        if not same:
            why = [
                f"{key} {old} there, {new} here"
                for key, old, new in _what_differs(_flat(there), _flat(here[0]))
            ]
            yield (
                f"made from the {name} {there.sha256[:12]}, but the one here is "
                f"{here[0].sha256[:12]}" + (f": {'; '.join(why)}" if why else "")
            )
        elif there.sealed and there.sealed not in {ancestor.sealed for ancestor in same}:
            yield (
                f"made from the {name} with the record {there.sealed[:12]}, but the record here "
                f"is {same[0].sealed[:12] or 'without a hash'}"
            )


def _flat(ancestor: Ancestor) -> dict[str, Any]:
    """Return the revision, the settings by their dotted names, and the versions."""

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
