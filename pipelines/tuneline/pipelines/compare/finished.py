"""What a finished run on this machine left: recipe, records and the scores of every sample."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tuneline.artifacts import (
    SAMPLES_DIR,
    DatasetManifest,
    RunSummary,
    Scores,
    TrainingSummary,
    read_jsonl,
)
from tuneline.errors import RecipeError, TunelineError, UserError
from tuneline.pipelines.local.run_dir import LocalRun
from tuneline.record import Record

R = TypeVar("R", bound=Record)

_MAX_REASON = 200


@dataclass(frozen=True)
class Sample:
    """The tuned model's score on one sample."""

    score: float
    weight: float
    cluster: str


@dataclass(frozen=True)
class FinishedRun:
    """A run and its records."""

    name: str
    recipe: dict[str, Any]
    summary: RunSummary
    scores: Scores
    """Scores of the tuned model."""
    training: TrainingSummary
    dataset: DatasetManifest
    samples: dict[str, dict[str, Sample]]
    """Samples of each task, by what identifies the question in every run."""


def read_finished(run: LocalRun) -> FinishedRun:
    """Read what a finished run left.

    A result may have come from the cache, and is then in the directory of another run. The report
    step, which is never taken from the cache, gets all of them, and its log says where they are.

    Raises:
        UserError: the run has not finished, a result was deleted, or another version of tuneline
            wrote it.
    """
    try:
        summary = run.summary()
    except RecipeError as error:
        raise UserError(
            f"{run.name} was made with another version of tuneline, whose records this one cannot "
            f"read: compare it with that version ({str(error)[:_MAX_REASON]})"
        ) from None
    sections = [section for section in run.sections() if section.name == "report"]
    if run.state() != "succeeded" or summary is None or not sections:
        raise UserError(
            f"{run.name} has not finished ({run.state()}), so it has no scores to compare: "
            f"tuneline resume {run.name}"
        )
    places = sections[-1].artifacts
    scores = [
        (Scores.read(place), place) for place in places if (place / Scores.filename).is_file()
    ]
    tuned = next(((record, place) for record, place in scores if record.model != "base"), None)
    if tuned is None:
        raise UserError(f"the scores of {run.name} are gone: run its recipe again")
    return FinishedRun(
        name=run.name,
        recipe=run.recipe_values(),
        summary=summary,
        scores=tuned[0],
        training=_record(TrainingSummary, places, run),
        dataset=_record(DatasetManifest, places, run),
        samples={task: _samples(tuned[1], task) for task in tuned[0].tasks},
    )


def _record(kind: type[R], places: list[Path], run: LocalRun) -> R:
    for place in places:
        if (place / kind.filename).is_file() or place.name == "record":
            # A copy of a record has the same name whatever its kind.
            with contextlib.suppress(TunelineError):
                return kind.read(place)
    raise UserError(f"{kind.filename} of {run.name} is gone: run its recipe again")


def _samples(directory: Path, task: str) -> dict[str, Sample]:
    """Return the samples of a task, by the hash of their content.

    IDs are NUMBER-HASH, and the number depends on the order of the dataset.
    """
    samples: dict[str, Sample] = {}
    for row in read_jsonl(directory / SAMPLES_DIR / f"{task}.jsonl"):
        key = str(row["id"]).partition("-")[2] or str(row["id"])
        cluster = str(row.get("cluster", key))
        samples.setdefault(key, Sample(row["score"], row.get("weight", 1.0), cluster))
    return samples
