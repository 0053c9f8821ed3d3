"""The JSON file that makes a directory an artifact: what it is, and what it goes back to."""

import datetime
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field

from tuneline.errors import WorldError
from tuneline.runtime.environment import describe_environment
from tuneline.strict_model import StrictModel
from tuneline.version import VERSION


class Ancestor(StrictModel):
    """An artifact that another was made from, by whatever way, as its own record told it."""

    sha256: str
    revision: str | None = None
    """Of a base model: the Hub commit."""
    settings: dict[str, Any] = Field(default_factory=dict)
    environment: dict[str, str] = Field(default_factory=dict)


class Record(StrictModel):
    """The JSON file that makes a directory an artifact."""

    filename: ClassVar[str]
    role: ClassVar[str]
    """What the artifact is to those made from it."""

    seconds: float = 0.0
    """Wall time of the step that made the artifact."""
    created_at: str = ""
    """When it was made, ISO 8601 in UTC."""
    tuneline: str = VERSION
    """The version of tuneline that made it."""
    made_from: dict[str, Ancestor] = Field(default_factory=dict)
    """All artifacts that it goes back to, by their role: with its own settings and environment this
    is the whole recipe of its content, whatever directory it is moved to."""
    files: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of each of the directory's other files; `tuneline verify` checks them."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Versions of what made it: packages, Python, machine, image."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """The step's part of the recipe, every default written out, its seed among them."""

    def write(
        self,
        directory: str | Path,
        config: StrictModel | None = None,
        *,
        parents: Iterable["Record"] = (),
    ) -> None:
        """Write the record into `directory`, last.

        It is stamped with the time, the files' hashes, the environment, the step's `config`, and
        the records of the artifacts that went in with all that those go back to.
        """
        made_from: dict[str, Ancestor] = {}
        for parent in parents:
            made_from |= {**parent.made_from, parent.called(): parent.as_ancestor()}
        stamped = self.model_copy(
            update={
                "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "files": hash_files(directory, leave_out={self.filename}),
                "environment": describe_environment(),
                "settings": config.model_dump(mode="json") if config else {},
                "made_from": made_from,
            }
        )
        Path(directory, self.filename).write_text(
            stamped.model_dump_json(indent=2) + "\n", encoding="utf-8"
        )

    def check_files(self, directory: str | Path) -> None:
        """Check that an artifact's files are those that its step left, before they are used.

        Raises:
            WorldError: one is missing, cut or changed.
        """
        for name, recorded in self.files.items():
            path = Path(directory, name)
            found = sha256_of_file(path) if path.is_file() else None
            if found == recorded:
                continue
            what = (
                "is missing"
                if found is None
                else f"is not what it was when it was made: its sha256 is {found[:12]}, and its "
                f"record has {recorded[:12]}"
            )
            raise WorldError(
                f"{path} {what}; run the step that made it again (`tuneline verify` names all that "
                "differs)"
            )

    def content_sha256(self) -> str:
        """Return one hash over the names and contents of the artifact's files."""
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(self.files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    def called(self) -> str:
        """Return the name under which a record of what was made from this one keeps it."""
        return self.role

    def as_ancestor(self) -> Ancestor:
        """Return what the record of an artifact made from this one keeps of it."""
        return Ancestor(
            sha256=self.content_sha256(), settings=self.settings, environment=self.environment
        )

    @classmethod
    def read(cls, directory: str | Path) -> Self:
        """Read the record of the artifact in `directory`.

        Raises:
            WorldError: the directory has none, so the step that makes it did not finish.
        """
        path = Path(directory, cls.filename)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise WorldError(
                f"{directory} has no {cls.filename}: the step that makes it did not finish, "
                "or this is another kind of directory; run that step again"
            ) from None
        return cls.parse(text, where=str(path))


def hash_files(directory: str | Path, *, leave_out: set[str]) -> dict[str, str]:
    """Return the SHA-256 of every file in a directory, by its relative name."""
    found = {}
    for path in sorted(Path(directory).rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name not in leave_out:
            found[name] = sha256_of_file(path)
    return found


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
