"""The rule of the gate: from comparisons to the verdict. Publish applies it again.

Every probability below is of an error over the whole decision, whatever the number of tasks.

- Targets: each has to improve. The verdict is hold unless the whole 95 % interval of each lies
  above `min_gain`. With any number of targets, a model that does not improve one of them by more
  than `min_gain` is promoted with a probability of at most 2.5 %.
- Guards: on average they lost less than `max_regression`, with a confidence of 95 %, and the whole
  95 % interval of each lies above -2 x `max_regression`. A single guard is its own average. A model
  that lost `max_regression` on average passes with a probability of at most 5 %, and one that lost
  2 x `max_regression` on any guard with at most 2.5 %: each guard has to exclude this by itself, so
  the number of guards needs no correction.
- The model published last: the verdict is hold if the tuned model is proven to be worse on a target
  (the whole 95 % interval lies below 0). It is compared only if both were measured on the same
  samples.
- The control: the verdict is hold if the tuned model is proven to depend less on its prompts than
  the base model. Models tuned on answers that belong to other questions learn the form of answers
  only, and this is how they are found.

Each export that was scored has a verdict of its own. It is held unless it lost less than
`max_regression` against the merged model on the rows that both answered, and a loss of
2 x `max_regression` is excluded with a confidence of 95 %. An export that lost as much as that
passes with a probability of at most 5 %, whatever the number of rows. Excluding `max_regression`
itself would hold three of ten exports that lost nothing on 200 rows of which 10 % change.
"""

import math
from collections.abc import Iterable, Sequence

from pydantic import Field, field_validator

from tuneline.artifacts import Decision, TaskComparison, Verdict
from tuneline.records.in_words import score_cells
from tuneline.records.scores import HELDOUT_PREFIX
from tuneline.strict_model import StrictModel

MIN_CLUSTERS = 20
"""Smallest number of independent samples of a target or guard."""
MIN_EFFECTIVE_SAMPLES = 60
"""Smallest effective number of samples for scores other than 0 and 1. Of 60 samples, 95 % contain
at least one with a harm that occurs in 5 % of all; with fewer, such a harm would go unseen."""
MIN_CHANGED = 6
"""Smallest number of changed answers of a target whose scores are 0 or 1. Of five answers that
change by chance, all are gains with a probability of 3 %; of six, 1.6 %."""
Z_LEVEL = 1.645
Z_LEVEL_AND_POWER = 2.927
"""Standard errors between a true loss of 0 and a margin that 95 % confidence excludes 9 times of
10: 1.645 + 1.282."""

LIKELIHOODS = frozenset(
    {"log_perplexity", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"}
)
"""Metrics of how likely texts are, which do not say whether an answer is right."""


class GateRule(StrictModel):
    """The thresholds of the verdict."""

    min_gain: float = Field(default=0.0, ge=0)
    """Least improvement of a target task, in the unit of its metric. The verdict is hold unless the
    whole 95 % interval of the difference (positive: tuned is better) lies above it."""
    max_regression: float = 0.05
    """Loss of quality on the other tasks (guards) that has to be excluded, in the unit of their
    metric. With a confidence of 95 %, the guards' mean must have lost less, and if there are
    several, each must have lost less than twice as much. A smaller loss needs more samples: if 20 %
    of the answers change, one guard needs 686 samples for 0.05 and 4283 for 0.02; `tuneline plan`
    says how many a recipe needs. The default is a loss that most benchmarks have enough samples to
    exclude. An export that was scored (`quantize.num_benchmark_rows`) is published only if it lost
    less against the merged model, and with a confidence of 95 % less than twice as much."""

    @field_validator("max_regression")
    @classmethod
    def _can_be_excluded(cls, value: float) -> float:
        if not value > 0:
            raise ValueError(
                "no number of samples proves that a score did not get worse by any amount: name "
                "the loss that has to be excluded, such as 0.02 (needs thousands of samples) or "
                "0.05 (needs hundreds)"
            )
        return value


def decide(comparisons: Sequence[TaskComparison], rule: GateRule) -> tuple[Verdict, str]:
    """Return the verdict and its reason."""
    targets = [item for item in comparisons if item.role == "target"]
    guards = [item for item in comparisons if item.role == "guard"]
    controls = [item for item in comparisons if item.role == "control"]
    published = [item for item in comparisons if item.role == "published"]
    problem = (
        _first(_too_few(item) for item in [*targets, *guards])
        or _first(_no_gain(item, rule.min_gain) for item in targets)
        or _first(_worse_than_published(item) for item in published)
        or _first(_reads_less(item) for item in controls)
        or _first(_loss(item, rule.max_regression, alone=len(guards) == 1) for item in guards)
        or _mean_loss(guards, rule.max_regression)
    )
    if not targets:
        problem = "no task is a target, so nothing shows an improvement"
    if problem:
        alone = targets and not guards and _are_likelihoods(targets)
        return "hold", f"{problem}; only perplexity was measured" if alone else problem
    parts = [described(item) for item in targets]
    if guards:
        mean, lower = mean_of_guards(guards)
        what = guards[0].task if len(guards) == 1 else f"the mean of {len(guards)} guards"
        parts.append(f"{what} {mean:+.3f}, above {lower:+.3f} with 95 % confidence")
    shows_answers = any(item.num_changed and item.outcome == "better" for item in guards)
    if _are_likelihoods(targets) and not shows_answers:
        parts.append(
            "the gain rests on perplexity alone: the answers became likelier, which does not show "
            "that the model's own answers are right"
        )
    return "promote", "; ".join(parts)


def decide_export(item: TaskComparison | None, rule: GateRule) -> tuple[Verdict, str]:
    """Return the verdict on an export, and its reason.

    Args:
        item: comparison of the export with the merged model; None: the export was not scored.
        rule: the thresholds.
    """
    if item is None:
        return "promote", (
            "its answers were not compared with the merged model's, which needs held-out rows and "
            "quantize.num_benchmark_rows"
        )
    margin = rule.max_regression
    if item.difference <= -margin:
        return "hold", (
            f"{described(item)}: the export answers worse than the merged model by "
            f"gate.max_regression ({margin:g}) or more"
        )
    if item.lower <= -2 * margin:
        return "hold", (
            f"{described(item)}: a loss of {2 * margin:g} (2 x gate.max_regression) against the "
            f"merged model is not excluded{_needed(item, 2 * margin)}"
        )
    return "promote", f"{described(item)}, against the merged model"


def wrong_verdict(decision: Decision) -> str:
    """Return a sentence if a verdict does not follow from its comparisons, or ""."""
    rule = rule_of(decision)
    found = [(decision.verdict, *decide(decision.comparisons, rule), "")]
    found += [
        (item.verdict, *decide_export(item.comparison, rule), f" of the export {item.format}")
        for item in decision.exports
    ]
    for stated, verdict, reason, whose in found:
        if stated != verdict:
            return (
                f"{Decision.filename} says {stated}{whose}, but by its own comparisons the verdict "
                f"is {verdict} ({reason}), so it was changed after the gate wrote it"
            )
    return ""


def rule_of(decision: Decision) -> GateRule:
    """Return the rule that a decision was made by."""
    known = {
        key: decision.settings[key] for key in GateRule.model_fields.keys() & decision.settings
    }
    return GateRule.parse(known, where="the settings of the decision")


def described(item: TaskComparison) -> str:
    """Return the result of one task in words."""
    return (
        f"{item.task} {item.difference:+.3f} {item.metric}, 95 % interval "
        f"[{item.interval[0]:+.3f}, {item.interval[1]:+.3f}]"
    )


def mean_of_guards(guards: Sequence[TaskComparison]) -> tuple[float, float]:
    """Return the mean difference of the guards, and its lower bound with 95 % confidence.

    The distances from the differences to their own bounds are combined as standard errors are (Zou
    and Donner's method of variance estimates recovery). Tasks over the held-out rows ask the same
    questions, so their errors are added instead of their squares.
    """
    mean = sum(item.difference for item in guards) / len(guards)
    distances = [
        (item.difference - item.lower, item.task.startswith(HELDOUT_PREFIX)) for item in guards
    ]
    same_questions = sum(distance for distance, heldout in distances if heldout)
    squares = sum(distance**2 for distance, heldout in distances if not heldout)
    return mean, mean - math.sqrt(same_questions**2 + squares) / len(guards)


def samples_to_exclude(item: TaskComparison, distance: float) -> float:
    """Return with how many samples 95 % confidence excludes a distance 9 times of 10.

    Args:
        item: a comparison, for the standard error of a sample.
        distance: from the true difference to the one that has to be excluded.
    """
    error = (item.difference - item.lower) / Z_LEVEL
    return item.num_samples * (Z_LEVEL_AND_POWER * error / distance) ** 2


def _are_likelihoods(targets: Sequence[TaskComparison]) -> bool:
    return all(item.metric in LIKELIHOODS for item in targets)


def _first(problems: Iterable[str]) -> str:
    return next(filter(None, problems), "")


def _too_few(item: TaskComparison) -> str:
    if item.num_clusters < MIN_CLUSTERS:
        what = (
            f"{item.num_samples} samples"
            if item.num_clusters == item.num_samples
            else f"{item.num_samples} samples of {item.num_clusters} different questions"
        )
        return (
            f"{item.task} has {what}, but a decision needs {MIN_CLUSTERS} different questions: "
            f"{_more_rows(item)}"
        )
    if item.num_changed is None and item.effective_samples < MIN_EFFECTIVE_SAMPLES:
        return (
            f"{item.task} has {item.num_samples} samples, which weigh as much as "
            f"{item.effective_samples:.0f} equal ones (long answers weigh more), but a decision on "
            f"{item.metric} needs {MIN_EFFECTIVE_SAMPLES}: {_more_rows(item)}, or a target that is "
            f"right or wrong (heldout_choice, heldout_exact), which needs {MIN_CLUSTERS}"
        )
    return ""


def _no_gain(item: TaskComparison, min_gain: float) -> str:
    if item.interval[0] > min_gain:
        if item.num_changed is not None and item.num_changed < MIN_CHANGED:
            return (
                f"{described(item)}: only {item.num_changed} answers changed, but fewer than "
                f"{MIN_CHANGED} can all be gains by chance: {_more_rows(item)}"
            )
        return ""
    if item.interval[1] < 0:
        return f"{described(item)}: the score got worse"
    if min_gain and item.interval[0] > 0:
        return f"{described(item)}: the interval includes gains below gate.min_gain ({min_gain:g})"
    return f"{described(item)}: the interval includes 0"


def _worse_than_published(item: TaskComparison) -> str:
    if item.interval[1] >= 0:
        return ""
    published, now, change, interval = score_cells(item)
    return (
        f"the model published last is better: {item.task} {published}, but {now} now ({change}, "
        f"95 % interval {interval})"
    )


def _reads_less(item: TaskComparison) -> str:
    if item.interval[1] >= 0:
        return ""
    return (
        f"the tuned model depends less on its prompts than the base model: an answer is "
        f"{item.tuned:.3f} nats per token likelier after its own prompt than after that of another "
        f"row, and {item.base:.3f} with the base model (95 % interval of the change "
        f"[{item.interval[0]:+.3f}, {item.interval[1]:+.3f}]). Check that each answer of the "
        "dataset belongs to its prompt"
    )


def _loss(item: TaskComparison, max_regression: float, *, alone: bool) -> str:
    margin = max_regression if alone else 2 * max_regression
    low = item.lower if alone else item.interval[0]
    if low > -margin:
        return ""
    if item.interval[1] < 0:
        return f"{described(item)}: a task that is no target got worse"
    limit = "gate.max_regression" if alone else "2 x gate.max_regression"
    return (
        f"{described(item)}: a loss of {margin:g} ({limit}) is not excluded{_needed(item, margin)}"
    )


def _mean_loss(guards: Sequence[TaskComparison], max_regression: float) -> str:
    if len(guards) < 2:
        return ""
    mean, lower = mean_of_guards(guards)
    if lower > -max_regression:
        return ""
    return (
        f"the mean of {len(guards)} guards ({', '.join(item.task for item in guards)}) is "
        f"{mean:+.3f}, above {lower:+.3f} with 95 % confidence: a mean loss of {max_regression:g} "
        "(gate.max_regression) is not excluded"
    )


def _needed(item: TaskComparison, margin: float) -> str:
    """Return how many samples would exclude the margin, if it is the samples that are too few."""
    if item.difference <= -margin / 2:
        return ""
    rows = samples_to_exclude(item, margin)
    return (
        f"; a model that lost nothing needs about {rows:,.0f} samples to show it, and "
        f"{item.num_samples} were measured: {_more_rows(item)}, or set a higher gate.max_regression"
    )


def _more_rows(item: TaskComparison) -> str:
    if item.role == "export":
        return "raise quantize.num_benchmark_rows, and prepare.heldout.max_rows with it"
    if item.task.startswith(HELDOUT_PREFIX):
        return "raise prepare.heldout.max_rows"
    return "raise evaluate.limit or name a larger task"
