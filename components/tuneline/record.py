"""The record of an artifact: the JSON file with its contents, settings, hashes and lineage."""

import datetime
import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field

from tuneline.errors import ProofError, WorldError
from tuneline.runtime.environment import describe_environment
from tuneline.seals import broken_seal, is_sealed, seal
from tuneline.strict_model import StrictModel
from tuneline.version import VERSION

BASE_MODEL = "base_model"
"""Key of the base model in the `made_from` of artifacts derived from it."""


class Ancestor(StrictModel):
    """What a record says about an artifact from which the record's artifact was made."""

    sha256: str
    """SHA-256 of the artifact's content."""
    sealed: str = ""
    """`record_sha256` of the artifact's record; empty if the record was not written to a file."""
    revision: str | None = None
    """Hub commit; base models only."""
    settings: dict[str, Any] = Field(default_factory=dict)
    environment: dict[str, str] = Field(default_factory=dict)


class Record(StrictModel):
    """Base class of the JSON files that make a directory an artifact."""

    filename: ClassVar[str]
    """Name of the JSON file."""
    role: ClassVar[str]
    """Key of this artifact in the `made_from` of artifacts derived from it."""
    required_ancestors: ClassVar[tuple[str, ...]] = ()
    """Keys that `made_from` has in every complete record of this class."""

    record_sha256: str = ""
    """SHA-256 of the record's text with this value empty, so that a change of the record shows."""
    seconds: float = 0.0
    """Wall time of the step that made the artifact, in seconds."""
    created_at: str = ""
    """Time at which the artifact was made, ISO 8601 in UTC."""
    tuneline: str = VERSION
    """Version of tuneline that made the artifact."""
    made_from: dict[str, Ancestor] = Field(default_factory=dict)
    """Lineage: every artifact that this one was made from, directly or indirectly, by the name that
    `called` returns. Lineage, `settings` and `environment` suffice to make the same content
    again."""
    files: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of every other file in the directory; `tuneline verify` checks the files."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Versions of the packages and of Python, the machine and the image with which the artifact was
    made."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """The section of the recipe for the step that made the artifact, including defaults."""

    def write(
        self,
        directory: str | Path,
        config: StrictModel | None = None,
        *,
        parents: Iterable["Record"] = (),
    ) -> None:
        """Write the record into `directory`, after all other files.

        The fields `created_at`, `files`, `environment`, `settings`, `made_from` and `record_sha256`
        are filled in.

        Args:
            directory: directory of the artifact.
            config: section of the recipe for the step that made the artifact.
            parents: records of the artifacts that this one was made from.

        Raises:
            WorldError: two parents were made from different artifacts of the same name.
        """
        made_from: dict[str, Ancestor] = {}
        for parent in parents:
            for name, ancestor in [
                *parent.made_from.items(),
                (parent.called(), parent.as_ancestor()),
            ]:
                known = made_from.setdefault(name, ancestor)
                if known.sha256 != ancestor.sha256:
                    raise WorldError(
                        f"the inputs of {self.filename} were made from two different artifacts "
                        f"called {name}: {known.sha256[:12]} and {ancestor.sha256[:12]} (by way of "
                        f"the {parent.called()}). Run the steps again, so that all start from the "
                        f"same {name}"
                    )
        stamped = self.model_copy(
            update={
                "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "files": hash_files(directory, leave_out={self.filename}),
                "environment": describe_environment(),
                "settings": config.model_dump(mode="json") if config else {},
                "made_from": made_from,
                "record_sha256": "",
            }
        )
        text = seal(stamped.model_dump_json(indent=2) + "\n")
        Path(directory, self.filename).write_text(text, encoding="utf-8")

    def check_files(self, directory: str | Path) -> None:
        """Check that the artifact's files are complete and unchanged.

        Raises:
            WorldError: a file is missing or was changed.
        """
        for name, recorded in self.files.items():
            path = Path(directory, name)
            actual = sha256_of_file(path) if path.is_file() else None
            if actual == recorded:
                continue
            what = (
                "is missing"
                if actual is None
                else f"was changed after it was made: its SHA-256 is {actual[:12]}, but its record "
                f"has {recorded[:12]}"
            )
            raise WorldError(
                f"{path} {what}. Run the step that made it again; `tuneline verify` lists all "
                "differences"
            )

    def content_sha256(self) -> str:
        """Return a single SHA-256 over the names and contents of all of the artifact's files."""
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(self.files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    def missing_ancestors(self) -> list[str]:
        """Return the artifacts that the lineage of such a record names, but this one does not."""
        return [name for name in self.required_ancestors if name not in self.made_from]

    def called(self) -> str:
        """Return the key of this artifact in the `made_from` of artifacts derived from it."""
        return self.role

    def as_ancestor(self) -> Ancestor:
        """Return the value of this artifact in the `made_from` of artifacts derived from it."""
        return Ancestor(
            sha256=self.content_sha256(),
            sealed=self.record_sha256,
            settings=self.settings,
            environment=self.environment,
        )

    def copy_to(self, path: str | Path, *, directory: str | Path) -> None:
        """Copy the record in `directory` to the file `path`, an artifact of its own.

        Steps that read only the record of a large artifact get this small artifact instead.
        """
        shutil.copyfile(Path(directory, self.filename), path)

    @classmethod
    def read(cls, source: str | Path) -> Self:
        """Read a record: that of the artifact in a directory, or a file that `copy_to` wrote.

        Raises:
            WorldError: there is no record, so the step that makes the artifact did not finish.
            ProofError: the record was changed after it was written.
        """
        path = cls.path_in(source)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise WorldError(
                f"{source} has no {cls.filename}: the step that makes it did not finish, "
                "or the directory is another artifact. Run that step again, or name its output"
            ) from None
        except UnicodeDecodeError as error:
            raise ProofError(f"{path} was changed: byte {error.start} is no text") from None
        if is_sealed(text):
            if difference := broken_seal(text):
                raise ProofError(
                    f"{path} {difference}. Nothing can rely on it: run the step that made it again"
                )
            return cls.parse(text, where=str(path))
        # Publish and `tuneline verify` refuse a record without a seal.
        return cls.parse(text, where=str(path)).model_copy(update={"record_sha256": ""})

    @classmethod
    def path_in(cls, source: str | Path) -> Path:
        """Return the path of the record: in a directory, or the file itself."""
        path = Path(source)
        return path if path.is_file() else path / cls.filename


def hash_files(directory: str | Path, *, leave_out: set[str]) -> dict[str, str]:
    """Return the SHA-256 of every file in a directory, by its relative path."""
    return {
        name: sha256_of_file(path)
        for name, path in files_below(directory).items()
        if name not in leave_out
    }


def files_below(directory: str | Path) -> dict[str, Path]:
    """Return every file in a directory and below, by its relative path."""
    return {
        path.relative_to(directory).as_posix(): path
        for path in sorted(Path(directory).rglob("*"))
        if path.is_file()
    }


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
