"""The records of one run, read once and handed to the sections of its page."""

from dataclasses import dataclass

from tuneline.artifacts import (
    DatasetManifest,
    Decision,
    MergeProof,
    ModelOrigin,
    QuantizedModel,
    Scores,
    TrainingSummary,
)
from tuneline.recipe import Recipe


@dataclass(frozen=True)
class Line:
    """The records of one run, as the sections read them."""

    recipe: Recipe
    origin: ModelOrigin
    dataset: DatasetManifest
    training: TrainingSummary
    merge: MergeProof
    exports: list[QuantizedModel]
    base_scores: Scores
    tuned_scores: Scores
    base_generations: list[dict]
    tuned_generations: list[dict]
    decision: Decision
