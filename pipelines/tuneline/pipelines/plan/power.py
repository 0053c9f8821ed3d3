"""Say before the run what the gate can find with the samples that the recipe gives it."""

from collections.abc import Iterator

from tuneline.gate.power import (
    PASSING,
    POWER,
    SHARE_CHANGED_BY_EXPORTS,
    SHARE_OF_CHANGED_ANSWERS,
    least_effect,
    least_gain,
    least_rows_for_exports,
    rows_for_exports,
    samples_for_margin,
)
from tuneline.kinds import EXPORT_KINDS
from tuneline.pipelines.plan.check import Check
from tuneline.recipe import Recipe
from tuneline.records.scores import HELDOUT_PREFIX
from tuneline.verdict import MIN_CLUSTERS, MIN_EFFECTIVE_SAMPLES

PERPLEXITY = "heldout_perplexity"
ASSUMED = f"if {100 * SHARE_OF_CHANGED_ANSWERS:.0f} % of the answers change"


def check_power(recipe: Recipe) -> Iterator[Check]:
    """Check whether targets have enough samples for a gain, and guards and exports for the margin.

    Sizes of tasks of lm-eval are not known before they are loaded, unless evaluate.limit bounds
    them.
    """
    tasks = recipe.evaluate.tasks
    targets = recipe.gate.target_tasks or tasks
    for task in targets:
        yield from _target(task, num_samples(recipe, task))
    if targets and all(task == PERPLEXITY for task in targets):
        words = "the verdict will rest on perplexity alone, not on answers that the model gives"
        yield Check("gate", "ok", words)
    guards = [task for task in tasks if task not in targets]
    if guards:
        yield _guards(recipe, guards)
    if any(getattr(recipe.quantize, kind) for kind in EXPORT_KINDS):
        yield _exports(recipe)


def num_samples(recipe: Recipe, task: str) -> int | None:
    """Return the largest number of samples that a task can have; None if it is not known."""
    bounds = [recipe.evaluate.limit]
    if task.startswith(HELDOUT_PREFIX):
        bounds.append(recipe.prepare.heldout.max_rows)
    return min((bound for bound in bounds if bound is not None), default=None)


def _target(task: str, size: int | None) -> Iterator[Check]:
    if size is None:
        return
    least = MIN_EFFECTIVE_SAMPLES if task == PERPLEXITY else MIN_CLUSTERS
    if size < least:
        words = f"{task} has at most {size} samples; the gate holds every model with fewer than "
        yield Check("gate", "warn", f"{words}{least}", _advice(task))
        return
    if task == PERPLEXITY:
        found = f"{least_effect(size):.2f} standard deviations of the answers' differences"
        assumed = "if all answers are of one length; with unequal ones the gain has to be larger"
    else:
        found, assumed = f"{100 * least_gain(size):.1f} points", ASSUMED
    words = f"with {size} questions of {task}, a gain of {found} is found "
    yield Check("gate", "ok", f"{words}{100 * POWER:.0f} % of the time, {assumed}")


def _guards(recipe: Recipe, guards: list[str]) -> Check:
    margin = recipe.gate.max_regression
    needed = samples_for_margin(margin, len(guards))
    what = f"{guards[0]} needs {needed} samples"
    if len(guards) > 1:
        what = f"{len(guards)} guards need {needed} samples each"
    words = (
        f"{what} so that a model that lost nothing passes {100 * PASSING:.0f} % of the time "
        f"(gate.max_regression {margin:g}, {ASSUMED})"
    )
    small = {
        task: size
        for task in guards
        if (size := num_samples(recipe, task)) is not None and size < needed
    }
    if not small:
        return Check("gate", "ok", words)
    has = ", ".join(f"{task} has at most {size}" for task, size in small.items())
    advice = f"set a higher gate.max_regression, or {_advice(next(iter(small)))}"
    return Check("gate", "warn", f"{words}; {has}", advice)


def _exports(recipe: Recipe) -> Check:
    margin = recipe.gate.max_regression
    size = min(recipe.quantize.num_benchmark_rows, recipe.prepare.heldout.max_rows)
    needed = rows_for_exports(margin)
    advice = f"set quantize.num_benchmark_rows to {needed}"
    if recipe.prepare.heldout.max_rows < needed:
        advice += f", and prepare.heldout.max_rows to {needed} or more"
    if size == 0:
        return Check(
            "gate",
            "ok",
            "the answers of the exports are not compared with the merged model's, so no export is "
            f"held for a worse score; to compare them, {advice}",
        )
    words = (
        f"an export that lost nothing needs {needed} rows to be published {100 * PASSING:.0f} % of "
        f"the time (gate.max_regression {margin:g}, if {100 * SHARE_CHANGED_BY_EXPORTS:.0f} % of "
        f"the answers change), and each export answers {size}"
    )
    if size < least_rows_for_exports(margin):
        words = (
            f"every export will be held: {size} rows cannot exclude a loss of {2 * margin:g} "
            "(2 x gate.max_regression) even if no answer changes"
        )
    if size >= needed:
        return Check("gate", "ok", words)
    return Check("gate", "warn", words, f"{advice}, or set a higher gate.max_regression")


def _advice(task: str) -> str:
    if task.startswith(HELDOUT_PREFIX):
        return "raise prepare.heldout.max_rows (and evaluate.limit, if it is set)"
    return "raise evaluate.limit"
