"""What differs between runs: keys of the recipe, figures of data and training, and scores."""

import json
import os.path
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tuneline.gate.estimate import estimate
from tuneline.html.units import count, number, size
from tuneline.pipelines.compare.finished import FinishedRun
from tuneline.records.scores import SignedChange

_NUM_RESAMPLES, _SEED = 10_000, 3407
MIN_SAMPLES = 2
"""Fewest common samples of which a difference can be estimated."""
_MAX_CHARACTERS = 60
# A name does not change a result, and the target is another one for each run.
_NOT_COMPARED = ("name", "description", "publish_to")


@dataclass(frozen=True)
class Difference:
    """One key or figure, with its value in each run."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class ScoreDifference(SignedChange):
    """The scores of two tuned models on the samples that both runs have."""

    task: str
    metric: str
    first: float
    second: float
    difference: float
    """Improvement from the first run to the second; positive is better."""
    interval: tuple[float, float]
    """95 % interval of the difference."""
    higher_is_better: bool
    num_common: int
    num_samples: tuple[int, int]
    """Samples of the first and of the second run."""
    is_fraction: bool = False
    """Whether the scores are fractions of right answers, which are shown in percent."""

    @property
    def verdict(self) -> str:
        """Return which of the two is better, as far as the interval tells."""
        low, high = self.interval
        return "better" if low > 0 else "worse" if high < 0 else "no clear difference"


def recipe_differences(runs: Sequence[FinishedRun]) -> list[Difference]:
    """Return the keys of the recipes whose values differ."""
    flat = [dict(_flat(run.recipe)) for run in runs]
    names = list(dict.fromkeys(name for values in flat for name in values))
    sections = list(dict.fromkeys(name.partition(".")[0] for name in names))
    names.sort(key=lambda name: sections.index(name.partition(".")[0]))
    found = []
    for name in names:
        texts = [_text(values.get(name)) for values in flat]
        if name.partition(".")[0] not in _NOT_COMPARED and len(set(texts)) > 1:
            found.append(Difference(name, tuple(_short(texts))))
    return found


def figures(runs: Sequence[FinishedRun]) -> list[Difference]:
    """Return what came of data and training in each run."""

    def row(name: str, values: Iterator[str]) -> Difference:
        return Difference(name, tuple(values))

    return [
        row("verdict", (run.summary.verdict for run in runs)),
        row("dataset", (run.dataset.sha256[:12] for run in runs)),
        row("sources", (_sources(run) for run in runs)),
        row("training rows", (count(run.dataset.num_train_rows) for run in runs)),
        row("evaluation rows", (count(run.dataset.num_eval_rows) for run in runs)),
        row("held-out rows", (count(run.dataset.num_heldout_rows) for run in runs)),
        row("training tokens", (count(run.dataset.num_tokens) for run in runs)),
        row("optimizer steps", (count(run.training.num_steps) for run in runs)),
        row("last training loss", (number(run.training.final_loss) for run in runs)),
        row("final evaluation loss", (number(run.training.final_eval_loss) for run in runs)),
        row("device hours", (number(run.training.device_hours) for run in runs)),
        row("cost, at price_per_hour", (number(run.training.cost) for run in runs)),
        row("exports", (_exports(run) for run in runs)),
    ]


def remarks(runs: Sequence[FinishedRun]) -> list[str]:
    """Return sentences on what must not be compared although it has the same name."""
    found = []
    if len({run.training.base_sha256 for run in runs}) > 1:
        found.append(
            "The base models differ: a loss per token compares models with the same tokenizer only."
        )
    if len({run.dataset.sha256 for run in runs}) > 1:
        found.append(
            "The datasets differ, so losses may be of different rows. Scores are compared on the "
            "same samples."
        )
    return found


def score_differences(first: FinishedRun, second: FinishedRun) -> tuple[list[ScoreDifference], str]:
    """Return the differences on tasks that both runs have, and a sentence on the others.

    Scores are compared on the samples that both runs have, weighted as in the first run.
    """
    found, left_out = [], []
    for task in dict.fromkeys([*first.samples, *second.samples]):
        one, other = first.samples.get(task, {}), second.samples.get(task, {})
        common = [key for key in one if key in other]
        if len(common) < MIN_SAMPLES:
            left_out.append(f"{task} ({len(common)} common samples)")
            continue
        metrics = {run.scores.tasks[task].metric for run in (first, second)}
        if len(metrics) > 1:
            left_out.append(f"{task} (other metrics: {', '.join(sorted(metrics))})")
            continue
        found.append(_compare(task, common, first, second))
    return found, f"not compared: {', '.join(left_out)}" if left_out else ""


def _compare(
    task: str, common: list[str], first: FinishedRun, second: FinishedRun
) -> ScoreDifference:
    one = [first.samples[task][key] for key in common]
    other = [second.samples[task][key] for key in common]
    score = first.scores.tasks[task]
    scores = np.array([[each.score for each in side] for side in (one, other)], np.float64)
    weights = np.array([each.weight for each in one], np.float64)
    _, clusters = np.unique([each.cluster for each in one], return_inverse=True)
    sign = 1.0 if score.higher_is_better else -1.0
    is_fraction = bool(np.isin(scores, (0.0, 1.0)).all() and (weights == 1).all())
    result = estimate(
        (sign * (scores[1] - scores[0]))[None],
        weights[None],
        clusters,
        binary=is_fraction,
        num_resamples=_NUM_RESAMPLES,
        seed=_SEED,
    )
    return ScoreDifference(
        task=task,
        metric=score.metric,
        first=float(np.average(scores[0], weights=weights)),
        second=float(np.average(scores[1], weights=weights)),
        difference=float(result.difference[0]),
        interval=(float(result.low[0]), float(result.high[0])),
        higher_is_better=score.higher_is_better,
        num_common=len(common),
        num_samples=(len(first.samples[task]), len(second.samples[task])),
        is_fraction=is_fraction,
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        # An empty mapping states nothing: another run may have keys in it.
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _short(texts: list[str]) -> list[str]:
    """Return the parts of different texts in which they begin to differ, if one of them is long."""
    if max(map(len, texts)) <= _MAX_CHARACTERS:
        return texts
    start = max(0, len(os.path.commonprefix(texts)) - _MAX_CHARACTERS // 3)
    parts = []
    for text in texts:
        part = text[start : start + _MAX_CHARACTERS]
        after = "..." if start + _MAX_CHARACTERS < len(text) else ""
        parts.append(f"{'...' if start else ''}{part}{after}")
    return parts


def _sources(run: FinishedRun) -> str:
    sources = run.dataset.sources
    if not sources:
        return run.dataset.source
    return ", ".join(f"{each.source} ({count(each.num_train_rows)} rows)" for each in sources)


def _exports(run: FinishedRun) -> str:
    return ", ".join(f"{each.format} {size(each.num_bytes)}" for each in run.summary.exports) or "-"
