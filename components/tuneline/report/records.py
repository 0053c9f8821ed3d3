"""The records of a run that the sections of the page show; they are read only once."""

from dataclasses import dataclass
from typing import Any

from tuneline.artifacts import (
    DatasetManifest,
    Decision,
    MergeProof,
    ModelOrigin,
    Published,
    QuantizedModel,
    RunHeader,
    Scores,
    TrainingSummary,
)
from tuneline.recorded_recipe import RecordedRecipe


@dataclass(frozen=True)
class Place:
    """What a page knows of its run besides the records."""

    run_name: str = ""
    """Name of the run, which the commands of the page take; "" if it is unknown."""
    ended: str = ""
    """When the page was written, as text."""
    is_local: bool = False
    """Whether the run is on this machine, and publishing has ended."""
    working_dir: str = ""
    """Directory in which `run_name` names the run; local runs only."""
    published: Published | None = None
    """What was published; local runs only."""
    problem: str = ""
    """Why nothing was published although the gate promotes; local runs only."""
    links: tuple[tuple[str, str], ...] = ()
    """Names of other pages of the run, with their addresses relative to this page."""
    files: tuple[tuple[str, str], ...] = ()
    """What the run left on this machine, with its paths."""


@dataclass(frozen=True)
class Line:
    """The records of one run."""

    header: RunHeader
    recipe: RecordedRecipe
    """The recipe as the records of the run state it."""
    target: str
    """Where the run publishes, without secrets."""
    origin: ModelOrigin
    dataset: DatasetManifest
    training: TrainingSummary
    merge: MergeProof
    exports: list[QuantizedModel]
    base_scores: Scores
    tuned_scores: Scores
    base_generations: list[dict[str, Any]]
    """Rows with the prompt, the reference answer and the answer of the base model."""
    tuned_generations: list[dict[str, Any]]
    """Rows with the prompt, the reference answer and the answer of the tuned model."""
    decision: Decision
    place: Place = Place()
    """What the page knows of its run besides the records."""
