"""Compare two models on tasks and on groups of tasks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from tuneline.artifacts import PROMPT_CONTROL, ComparisonRole, Scores, TaskComparison, TaskScore
from tuneline.errors import TaskError
from tuneline.gate.config import GateConfig
from tuneline.gate.earlier import published_samples
from tuneline.gate.estimate import estimate
from tuneline.gate.reading import Evaluation, Samples
from tuneline.records.earlier import EarlierRuns


@dataclass(frozen=True)
class Compared:
    """The comparisons of a decision, and the samples of the tuned model on the targets."""

    comparisons: list[TaskComparison]
    """First the targets, last what decides nothing."""
    targets: dict[str, tuple[TaskComparison, Samples]]


def compare(
    base: Evaluation, tuned: Evaluation, earlier: EarlierRuns, config: GateConfig
) -> Compared:
    """Compare the tuned model with the base model, and with the model published last.

    Args:
        base: scores of the base model.
        tuned: scores of the tuned model.
        earlier: what earlier runs measured.
        config: the `gate` section of the recipe.

    Raises:
        TaskError: a target was not evaluated.
    """
    found: list[TaskComparison] = []
    targets = {}
    for name, members, role in _roles(base.record, config):
        score = base.record.tasks[members[0]]
        of_base, of_tuned = _together(base, members), _together(tuned, members)
        item = compare_samples(name, score, of_base, of_tuned, role=role, config=config)
        found.append(item)
        if role != "target":
            continue
        targets[name] = (item, of_tuned)
        if (last := published_samples(earlier, name, of_tuned)) is not None:
            found.append(
                compare_samples(name, score, last, of_tuned, role="published", config=config)
            )
    for name, samples in base.prompted.items():
        score = base.record.prompted[name]
        item = compare_samples(
            name, score, samples, tuned.samples[name], role="prompted", config=config
        )
        number = base.record.num_examples
        found.append(item.model_copy(update={"num_examples": number}))
    order = get_args(ComparisonRole)
    found.sort(key=lambda item: (order.index(item.role), item.task))
    return Compared(found, targets)


def _roles(scores: Scores, config: GateConfig) -> Iterator[tuple[str, list[str], ComparisonRole]]:
    """Yield the name, the tasks and the role of every comparison."""
    # A group is compared as a whole if its tasks have one metric; otherwise each task stands alone.
    whole = {
        name: members
        for name, members in scores.groups.items()
        if len(
            {(scores.tasks[task].metric, scores.tasks[task].higher_is_better) for task in members}
        )
        == 1
    }
    members = {task for tasks in whole.values() for task in tasks}
    own = [task for task in scores.tasks if task not in members and task != PROMPT_CONTROL]
    targets = set(config.target_tasks) or {*own, *whole}
    for name in targets & (scores.groups.keys() - whole.keys()):
        targets = (targets - {name}) | set(scores.groups[name])
    if unknown := targets - scores.tasks.keys() - scores.groups.keys():
        raise TaskError(
            f"gate.target_tasks names {', '.join(sorted(unknown))}, which was not evaluated. "
            f"Name tasks among {', '.join(sorted({*own, *whole}))}"
        )
    for name, tasks in whole.items():
        yield name, tasks, "target" if name in targets else "guard"
    for task in scores.tasks:
        role: ComparisonRole = "guard"
        if task == PROMPT_CONTROL:
            role = "control"
        elif task in targets:
            role = "target"
        elif task in members:
            role = "member"
        yield task, [task], role


def compare_samples(
    name: str,
    score: TaskScore,
    of_base: Samples,
    of_tuned: Samples,
    *,
    role: ComparisonRole,
    config: GateConfig,
) -> TaskComparison:
    """Compare two models on the same samples.

    Args:
        name: name of the task or group.
        score: a score of the task, for its metric.
        of_base: samples of the model that the tuned model is compared with.
        of_tuned: samples of the tuned model.
        role: what the comparison decides.
        config: the `gate` section of the recipe.
    """
    sign = 1.0 if score.higher_is_better else -1.0
    differences = sign * (of_tuned.scores - of_base.scores)
    _, clusters = np.unique(of_base.clusters, return_inverse=True)
    binary = of_base.binary and of_tuned.binary
    found = estimate(
        differences[None],
        of_base.weights[None],
        clusters,
        binary=binary,
        num_resamples=config.num_resamples,
        seed=config.seed,
    )
    low, high = float(found.low[0]), float(found.high[0])
    outcome: Literal["better", "worse", "undecided"] = "undecided"
    if low > 0:
        outcome = "better"
    elif high < 0:
        outcome = "worse"
    return TaskComparison(
        task=name,
        metric=score.metric,
        higher_is_better=score.higher_is_better,
        base=float(np.average(of_base.scores, weights=of_base.weights)),
        tuned=float(np.average(of_tuned.scores, weights=of_tuned.weights)),
        difference=float(found.difference[0]),
        interval=(low, high),
        lower=float(found.lower[0]),
        num_samples=len(differences),
        num_clusters=found.num_clusters,
        effective_samples=round(float(found.effective_samples[0]), 1),
        num_changed=None if found.num_changed is None else int(found.num_changed[0]),
        outcome=outcome,
        role=role,
    )


def _together(evaluation: Evaluation, tasks: list[str]) -> Samples:
    """Return the samples of several tasks as one list; clusters do not span tasks."""
    parts = [evaluation.samples[task] for task in tasks]
    return Samples(
        ids=[
            f"{task} {sample}"
            for task, part in zip(tasks, parts, strict=True)
            for sample in part.ids
        ],
        scores=np.concatenate([part.scores for part in parts]),
        weights=np.concatenate([part.weights for part in parts]),
        clusters=[
            f"{task} {cluster}"
            for task, part in zip(tasks, parts, strict=True)
            for cluster in part.clusters
        ],
    )
