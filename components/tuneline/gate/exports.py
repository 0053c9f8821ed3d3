"""Compare each export with the merged model on the held-out rows that both answered."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tuneline.artifacts import (
    ExportVerdict,
    MergeProof,
    QuantizedModel,
    TaskComparison,
    TaskScore,
)
from tuneline.errors import TaskError
from tuneline.gate.compare import compare_samples
from tuneline.gate.config import GateConfig
from tuneline.gate.reading import Evaluation, Samples
from tuneline.verdict import decide_export


def read_exports(paths: Sequence[str | Path], tuned: Evaluation) -> list[QuantizedModel]:
    """Read the records of the exports, and check that they are of the tuned model.

    Args:
        paths: directories of the exports, or copies of their records.
        tuned: scores of the tuned model.

    Raises:
        TaskError: an export was made from another model than the one that was evaluated.
        WorldError: a record is missing.
    """
    merged = tuned.record.made_from[MergeProof.role].sha256
    exports = [QuantizedModel.read(path) for path in paths]
    for export in exports:
        made_from = export.made_from.get(MergeProof.role)
        if made_from is None or made_from.sha256 != merged:
            origin = f"the merged model {made_from.sha256[:12]}" if made_from else "an unknown one"
            raise TaskError(
                f"the export {export.format} was made from {origin}, but the tuned scores are of "
                f"{merged[:12]}. Export and evaluate the same merged model"
            )
    return exports


def verdict_on(export: QuantizedModel, config: GateConfig) -> ExportVerdict:
    """Return the verdict on an export.

    Raises:
        TaskError: the answers do not give the scores in the record.
    """
    comparison = _compare(export, config)
    verdict, reason = decide_export(comparison, config)
    return ExportVerdict(
        format=export.format,
        verdict=verdict,
        reason=reason,
        comparison=comparison,
        sealed=export.record_sha256,
    )


def _compare(export: QuantizedModel, config: GateConfig) -> TaskComparison | None:
    """Compare an export with the merged model, as `base`; None if the export was not scored."""
    if export.benchmark is None:
        return None
    answers = export.benchmark_answers
    if answers is None:
        raise TaskError(
            f"{QuantizedModel.filename} of {export.format} has a score without the answers behind "
            "it, as an older tuneline wrote it. Make the export again"
        )
    score = TaskScore(
        metric="acc",
        higher_is_better=True,
        value=_check_score(export, answers.export, export.benchmark_score),
        num_samples=export.num_benchmark_rows,
    )
    _check_score(export, answers.merged, export.reference_benchmark_score)
    clusters = [str(number) for number in answers.clusters]
    ids = [str(number) for number in range(len(clusters))]
    merged, exported = (
        Samples(ids, np.array(right, np.float64), np.ones(len(right)), clusters)
        for right in (answers.merged, answers.export)
    )
    return compare_samples(export.benchmark, score, merged, exported, role="export", config=config)


def _check_score(export: QuantizedModel, right: list[bool], score: float | None) -> float:
    """Return the score of a record, after checking it against the answers behind it.

    Args:
        export: the record.
        right: whether each row was answered correctly.
        score: the score that the record states.

    Raises:
        TaskError: the answers give another score, or are not as many as the record states.
    """
    size = export.num_benchmark_rows
    clusters = export.benchmark_answers.clusters if export.benchmark_answers else []
    if (
        score is None
        or not 0 < size == len(right) == len(clusters)
        or not math.isclose(sum(right) / size, score, abs_tol=1e-9)
    ):
        raise TaskError(
            f"{QuantizedModel.filename} of {export.format} states the score {score} on {size} "
            f"rows, but has answers to {len(right)} rows, {sum(right)} of them right. Make the "
            "export again"
        )
    return score
