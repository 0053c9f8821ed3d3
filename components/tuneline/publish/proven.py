"""Let nothing out but what its step proved: the same bytes, made from what goes out beside it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuneline.artifacts import QuantizedModel
from tuneline.errors import ProofError
from tuneline.record import Record
from tuneline.verify import foreign_inputs


@dataclass(frozen=True)
class StoredFile:
    """A file of an artifact, and its SHA-256 in the artifact's record."""

    path: Path
    recorded: str | None


def check_lineage(records: Iterable[Record], inputs: Sequence[Record]) -> None:
    """Check that artifacts were made from each other, and the gate decided on this model.

    Args:
        records: what goes out, and the decision.
        inputs: those that the others go back to.

    Raises:
        ProofError: one was made from another artifact than its like among `inputs`.
    """
    known = {record.called(): [record.as_ancestor()] for record in inputs}
    for record in records:
        for sentence in foreign_inputs(record.made_from, known):
            name = record.format if isinstance(record, QuantizedModel) else record.called()
            raise ProofError(
                f"the {name} was {sentence}; nothing is published: run the line again from the "
                "step where they part"
            )


def check_present(files: dict[str, StoredFile]) -> None:
    """Check that no file is gone.

    Raises:
        ProofError: one is.
    """
    for file in files.values():
        if not file.path.is_file():
            raise ProofError(
                f"{file.path} is gone, which its step made and proved; nothing is published: run "
                "that step again"
            )


def check_unchanged(files: dict[str, StoredFile], content: dict[str, str]) -> None:
    """Check that files are still those that their step proved and recorded.

    Args:
        files: by the name that they go out under.
        content: the SHA-256 of each as it would go out.

    Raises:
        ProofError: one was changed or added since.
    """
    for relative, file in files.items():
        found = content[relative]
        if found == file.recorded:
            continue
        what = (
            "was added after its step had proven the rest"
            if file.recorded is None
            else f"was changed after it was proven: its sha256 is {found[:12]}, and its record has "
            f"{file.recorded[:12]}"
        )
        raise ProofError(
            f"{file.path} {what}; nothing is published: run the step that made it again "
            "(`tuneline verify` names all that differs)"
        )
