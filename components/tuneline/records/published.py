"""The records of what was published, and of a whole run."""

from typing import ClassVar

from pydantic import ConfigDict, Field

from tuneline.kinds import KINDS, RepoKind
from tuneline.record import Record
from tuneline.records.exports import QuantizedModel
from tuneline.records.scores import ExportVerdict, TaskComparison, Verdict
from tuneline.strict_model import StrictModel


class PublishedRepo(StrictModel):
    """One repository that was published."""

    repo: str
    """Hub ID, a path below the target directory, or an address in the target."""
    target: str | None = None
    """The target that has it; null in records of older versions, which had one target."""
    kind: RepoKind
    url: str
    commit: str | None = None
    """Hub commit that holds exactly the published files; null for a directory target."""
    tag: str | None = None
    """Tag of the commit or of the version: v1, v2, and so on; null for directories and claims."""
    private: bool | None = None
    """Whether the repository is private now; null if it is not on the Hub."""
    num_files: int
    num_bytes: int


class Published(Record):
    """What was published, and where."""

    filename: ClassVar[str] = "published.json"
    role: ClassVar[str] = "published"
    required_ancestors: ClassVar[tuple[str, ...]] = ("merged", "decision")

    target: str
    """The targets, separated by commas."""
    private: bool
    """Whether all repositories on the Hub are private; true if none is there."""
    repos: list[PublishedRepo]
    left_out: list[str] = Field(default_factory=list)
    """Files of the artifacts that are not published, because their names are not those of a model's
    files."""
    held_exports: dict[str, str] = Field(default_factory=dict)
    """Formats of the exports that the gate held, with the reasons; they are not published."""
    run_id: str = ""
    """ID of the run that published; "" if it is not known."""
    recipe_sha256: str = ""
    """SHA-256 of the run's recipe without what is private, as in tuneline.json."""

    def metadata(self) -> dict[str, str]:
        """Return the URL, commit and tag of each repository, for an artifact's metadata."""
        metadata = {}
        for repo in self.repos:
            key: str = repo.kind
            if KINDS[repo.kind].has_repo_per_format:
                # The repository's name ends in its format, and a format starts with its kind.
                key = f"{repo.kind}{repo.repo.rpartition(f'-{repo.kind}')[2]}"
            if repo.target != self.repos[0].target:
                # The first target has the short keys.
                others = list(dict.fromkeys(each.target for each in self.repos))
                key = f"{key}_{others.index(repo.target) + 1}"
            metadata[key] = repo.url
            if repo.commit:
                metadata[f"{key}_revision"] = repo.commit
            if repo.tag:
                metadata[f"{key}_tag"] = repo.tag
        return metadata


class Bundle(StrictModel):
    """What is relied on of a published repository's tuneline.json, which others may have written.

    The file has more keys; publish/staging.py writes it.
    """

    model_config = ConfigDict(extra="allow")

    files: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of each published file, by its path."""
    trained_with: dict[str, str] = Field(default_factory=dict)
    """Versions of the packages with which the model was trained."""
    base_sha256: str | None = None
    """SHA-256 of the base model's weights."""
    base_revision: str | None = None
    """Hub commit of the base model."""
    dataset_sha256: str | None = None
    """SHA-256 of the dataset."""


class RunSummary(Record):
    """Result of a run, for tables and scripts."""

    filename: ClassVar[str] = "summary.json"
    role: ClassVar[str] = "summary"

    recipe: str
    """Name of the recipe."""
    verdict: Verdict
    reason: str
    remarks: list[str] = Field(default_factory=list)
    """Remarks of the gate, which do not decide."""
    comparisons: list[TaskComparison]
    exports: list[QuantizedModel]
    export_verdicts: list[ExportVerdict] = Field(default_factory=list)
    """Verdicts of the gate on the exports."""
    differs_from_recipe: list[str] = Field(default_factory=list)
    """The values that the run had instead of its recipe's."""
