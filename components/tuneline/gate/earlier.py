"""Compare with what earlier runs measured: the model published last, and repeated attempts.

A threshold of 2.5 % holds for one model. If many models are measured on the same questions and the
best one is taken, one without any gain is promoted sooner or later.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from tuneline.artifacts import TaskComparison
from tuneline.gate.bootstrap import Floats
from tuneline.gate.reading import Samples
from tuneline.records.earlier import (
    MODEL_CHARACTERS,
    Attempt,
    EarlierRuns,
    Evaluated,
    TaskSamples,
)
from tuneline.records.in_words import score_cells

FALSE_PROMOTE = 0.025
"""Highest probability with which a model without a gain is promoted."""


def read_earlier(path: str | Path | None) -> EarlierRuns:
    """Return what a file of the step look-up-published says; nothing if there is no file."""
    if path is None:
        return EarlierRuns()
    return EarlierRuns.parse(Path(path).read_text(encoding="utf-8"), where=str(path))


def ids_sha256(samples: Samples) -> str:
    """Return the SHA-256 over the IDs of samples, in their order."""
    return hashlib.sha256("\n".join(samples.ids).encode()).hexdigest()


def evaluated(
    targets: Mapping[str, tuple[TaskComparison, Samples]], earlier: EarlierRuns, *, model: str
) -> Evaluated:
    """Return what this run measured, for the next run.

    Args:
        targets: comparison and samples of each target.
        earlier: what earlier runs measured.
        model: SHA-256 of the scores of the tuned model.
    """
    own = Attempt(
        model=model[:MODEL_CHARACTERS],
        ids_sha256={name: ids_sha256(samples) for name, (_, samples) in targets.items()},
    )
    known = [*earlier.attempts, *(earlier.published.attempts if earlier.published else ())]
    same = {
        attempt.model: attempt
        for attempt in known
        if attempt.model != own.model
        and any(attempt.ids_sha256.get(name) == ids for name, ids in own.ids_sha256.items())
    }
    return Evaluated(
        targets={
            name: TaskSamples(
                metric=item.metric,
                higher_is_better=item.higher_is_better,
                ids_sha256=own.ids_sha256[name],
                scores=_short(samples.scores),
                weights=[] if (samples.weights == 1).all() else _short(samples.weights),
            )
            for name, (item, samples) in targets.items()
        },
        attempts=[*same.values(), own],
    )


def published_samples(earlier: EarlierRuns, name: str, tuned: Samples) -> Samples | None:
    """Return the samples of the model published last; None if it was measured on other samples.

    Args:
        earlier: what earlier runs measured.
        name: name of the target.
        tuned: samples of the tuned model.
    """
    there = earlier.published.targets.get(name) if earlier.published else None
    if there is None or there.ids_sha256 != ids_sha256(tuned):
        return None
    weights = np.array(there.weights or np.ones(len(there.scores)))
    if len(there.scores) != len(tuned.ids) or not np.allclose(weights, tuned.weights):
        return None
    return Samples(tuned.ids, np.array(there.scores), tuned.weights, tuned.clusters)


def remarks(
    comparisons: Sequence[TaskComparison], earlier: EarlierRuns, attempts: Sequence[Attempt]
) -> Iterator[str]:
    """Yield what a reader of the verdict has to know, as sentences.

    Args:
        comparisons: all comparisons of the decision.
        earlier: what earlier runs measured.
        attempts: models measured on the same samples, with this one.
    """
    for item in comparisons:
        if item.role == "prompted":
            yield _against_examples(item)
    if earlier.remark:
        yield earlier.remark
    compared = {item.task for item in comparisons if item.role == "published"}
    others = [c.task for c in comparisons if c.role == "target" and c.task not in compared]
    if earlier.published and others:
        yield (
            f"The model published last was measured on other questions of {', '.join(others)}, so "
            "it was not compared with this one"
        )
    if len(attempts) > 1:
        chance = 1 - (1 - FALSE_PROMOTE) ** len(attempts)
        yield (
            f"{len(attempts)} models were measured on these questions, this one included. If none "
            f"of them were better than the base model, the chance that at least one is promoted "
            f"would be up to {chance:.0%}. New questions (prepare.heldout.source, or another "
            "prepare.seed) start the count again"
        )


def _against_examples(item: TaskComparison) -> str:
    low, high = item.interval
    base, _, difference, interval = score_cells(item)
    change = f"{difference}, 95 % interval {interval}"
    start = (
        f"{item.task}: with {item.num_examples} training rows in its prompt, the base model scores "
        f"{base}"
    )
    if low > 0:
        return f"{start}; the tuned model, which sees none, is better ({change})"
    if high < 0:
        return f"{start}; the tuned model, which sees none, is worse ({change})"
    return f"{start}; that the tuned model, which sees none, is better is not shown ({change})"


def _short(values: Floats) -> list[float]:
    return [round(float(value), 6) for value in values]
