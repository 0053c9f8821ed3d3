"""The records of a run that the sections of the page show; they are read only once."""

from dataclasses import dataclass
from typing import Any

from tuneline.artifacts import (
    DatasetManifest,
    Decision,
    MergeProof,
    ModelOrigin,
    QuantizedModel,
    RunHeader,
    Scores,
    TrainingSummary,
)
from tuneline.recorded_recipe import RecordedRecipe


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

    @property
    def kept_exports(self) -> list[QuantizedModel]:
        """The exports that the gate does not hold."""
        held = self.decision.held_exports()
        return [export for export in self.exports if export.format not in held]
