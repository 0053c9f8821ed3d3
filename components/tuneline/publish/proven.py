"""Checks before publishing.

Every file must be unchanged since its step checked it, and the artifacts must have been made from
each other.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuneline.artifacts import Decision, QuantizedModel
from tuneline.errors import ProofError
from tuneline.record import Record
from tuneline.verdict import wrong_verdict
from tuneline.verify import foreign_inputs


@dataclass(frozen=True)
class StoredFile:
    """A file of an artifact, with its SHA-256 in the artifact's record."""

    path: Path
    recorded: str | None
    """SHA-256 in the record; None if the record does not list the file."""


def check_lineage(records: Iterable[Record], inputs: Sequence[Record]) -> None:
    """Check that the artifacts were made from each other, and that the gate's decision is on them.

    Args:
        records: the artifacts to publish, and the decision.
        inputs: records of the artifacts that those were made from.

    Raises:
        ProofError: the lineage of an artifact names other inputs than `inputs`, or lacks an input,
            or a record has no hash of its own fields.
    """
    known = {record.called(): [record.as_ancestor()] for record in inputs}
    for record in records:
        lacks = [f"does not name the {name}" for name in record.missing_ancestors()]
        if not record.record_sha256:
            lacks.append("has no hash of its own fields")
        if lacks:
            raise ProofError(
                f"{record.filename} of the {_name(record)} {' and '.join(lacks)}, so it cannot be "
                "checked. Nothing was published. Run the step that made it again"
            )
        for sentence in foreign_inputs(record.made_from, known):
            raise ProofError(
                f"the {_name(record)} was {sentence}. Nothing was published. Run the pipeline "
                "again from the step whose input differs"
            )


def _name(record: Record) -> str:
    return record.format if isinstance(record, QuantizedModel) else record.called()


def check_inside(directory: Path, names: Iterable[str]) -> None:
    """Check that no file of an artifact lies outside of it: no link leads out of the directory.

    Raises:
        ProofError: a file lies outside.
    """
    root = directory.resolve()
    for name in names:
        if not (directory / name).resolve().is_relative_to(root):
            raise ProofError(
                f"{directory / name} is a link that leads out of its artifact, to "
                f"{(directory / name).resolve()}. Nothing was published. Run the step that made it "
                "again"
            )


def check_verdict(decision: Decision) -> None:
    """Check that the verdict of a decision follows from its comparisons and settings.

    Raises:
        ProofError: the rule of the gate gives another verdict.
    """
    if wrong := wrong_verdict(decision):
        raise ProofError(f"{wrong}. Nothing was published. Run the gate again")


def check_exports_were_decided(exports: Iterable[QuantizedModel], decision: Decision) -> None:
    """Check that the decision has a verdict on each export, and was made on these exports.

    Raises:
        ProofError: the gate did not see an export, or saw another one of the same format.
    """
    verdicts = {item.format: item for item in decision.exports}
    for export in exports:
        item = verdicts.get(export.format)
        if item is None:
            problem = f"says nothing of the export {export.format}"
        elif item.sealed != export.record_sha256:
            problem = (
                f"is on another export {export.format}, with the record {item.sealed[:12]} instead "
                f"of {export.record_sha256[:12]}"
            )
        elif (item.comparison is None) != (export.benchmark_answers is None):
            problem = f"does not compare the answers of the export {export.format}"
        else:
            continue
        raise ProofError(
            f"the gate's decision {problem}. Nothing was published. Run the gate again with all "
            "exports"
        )


def check_present(files: dict[str, StoredFile]) -> None:
    """Check that all files exist.

    Raises:
        ProofError: a file is missing.
    """
    for file in files.values():
        if not file.path.is_file():
            raise ProofError(
                f"{file.path} is missing, although its step made and proved it. Nothing was "
                "published. Run that step again"
            )


def check_unchanged(files: dict[str, StoredFile], hashes: dict[str, str]) -> None:
    """Check that files are unchanged since their step checked and recorded them.

    Args:
        files: the files, by their names in the repository.
        hashes: SHA-256 of the staged files, by the same names.

    Raises:
        ProofError: a file was changed or added.
    """
    for relative, file in files.items():
        actual = hashes[relative]
        if actual == file.recorded:
            continue
        what = (
            "was added after its step proved the other files"
            if file.recorded is None
            else f"was changed after it was proven: its SHA-256 is {actual[:12]}, but its record "
            f"has {file.recorded[:12]}"
        )
        raise ProofError(
            f"{file.path} {what}. Nothing was published. Run the step that made it again; "
            "`tuneline verify` lists all differences"
        )
