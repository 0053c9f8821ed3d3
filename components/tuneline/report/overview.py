"""The first sections of a run's page: verdict, figures, and the diagram of the steps."""

from tuneline.artifacts import Published, TaskComparison, TrainingSummary
from tuneline.html.flow import Status
from tuneline.html.page import banner, line_diagram, section, tiles
from tuneline.html.units import count, duration, number, number_pair, parameters, size
from tuneline.records.in_words import change_text, is_fraction, score_pair, verdict_sentence
from tuneline.report.line import stages
from tuneline.report.records import Line
from tuneline.report.scores import answer_pairs
from tuneline.training_figures import loss_unit, weights_of_training

SHORT_ANSWER = 40
"""Characters up to which a reference counts as short, so that a right answer equals it."""


def verdict(line: Line) -> str:
    """Return the banner with the verdict, what was gained, and whether it was published."""
    decision = line.decision
    text = verdict_sentence(decision.verdict, decision.reason, decision.comparisons)
    if decision.verdict == "promote":
        tone = "warn" if line.place.problem or decision.held_exports() else "good"
        return banner("Promote", text, tone, small=_publishing(line))
    return banner("Hold", text, "warn", small=f"Nothing was published to {line.target}.")


def _publishing(line: Line) -> str:
    """Return what became of publishing, as far as it is known when the page is written."""
    place, held = line.place, line.decision.held_exports()
    without = f", without the exports that are held: {', '.join(held)}" if held else ""
    if place.problem:
        return f"Publishing to {line.target} failed: {place.problem}"
    if place.published is not None:
        return f"Published to {line.target}: {_repositories(place.published)}{without}."
    return (
        "This page was written before the model was published. The step publish uploads it to "
        f"{line.target}{without}."
    )


def unequal_answers(line: Line) -> str:
    """Return a warning if no sampled answer equals its reference; empty otherwise."""
    pairs = answer_pairs(line)
    if not pairs or any(tuned.strip() == reference.strip() for _, reference, _, tuned in pairs):
        return ""
    is_short = all(len(reference) <= SHORT_ANSWER for _, reference, _, _ in pairs)
    text = f"None of the {len(pairs)} sampled answers of the tuned model equals its reference. "
    text += (
        "The references are short, so right answers would be equal: read the answers below before "
        "you use the model."
        if is_short
        else "Long answers rarely are equal: read them below, and judge whether they are as good."
    )
    return banner("Read the answers", text, "warn")


def remarks(line: Line) -> str:
    """Return the banner with what the gate remarks; empty if it remarks nothing."""
    if not line.decision.remarks:
        return ""
    return banner("Remarks of the gate", ". ".join(line.decision.remarks) + ".", "plain")


def other_values(line: Line) -> str:
    """Return the banner of a run with other values than its recipe's; empty for other runs."""
    if not line.recipe.differences:
        return ""
    return banner("Other values than the recipe's", line.recipe.remark, "warn")


def headline(line: Line) -> str:
    """Return the row of tiles with the most important figures."""
    shown: list[tuple[str, str, str]] = []
    comparisons = line.decision.comparisons
    first = next(
        (c for c in comparisons if c.role == "target"), comparisons[0] if comparisons else None
    )
    if first:
        base, tuned = score_pair(first)
        base = base.removesuffix(" %")
        unit = " points" if is_fraction(first) else ""
        low, high = (change_text(first, end) for end in first.change_interval)
        change = change_text(first, first.change)
        shown.append(
            (
                f"Right answers, {first.task}" if is_fraction(first) else _measured(first),
                f"{base} \u2192 {tuned}",
                f"{change}{unit}, 95 % interval {low} to {high}",
            )
        )
    training = line.training
    unit, steps = loss_unit(training), f"{count(training.num_steps)} steps"
    if training.final_eval_loss is not None:
        before, after = number_pair(training.first_eval_loss, training.final_eval_loss)
        shown.append(
            (
                f"Evaluation loss, {weights_of_training(training)}",
                f"{before} \u2192 {after}",
                ", ".join(filter(None, (unit, steps, f"{count(training.num_tokens)} tokens"))),
            )
        )
    else:
        shown.append(
            (
                "Last training loss",
                number(training.final_loss, 3),
                ", ".join(filter(None, (unit, steps))),
            )
        )
    if kept := line.decision.kept(line.exports):
        smallest = min(kept, key=lambda export: export.num_bytes)
        plural = "s" if len(kept) > 1 else ""
        shown.append(
            (
                f"Smallest of {len(kept)} export{plural}",
                size(smallest.num_bytes),
                f"{smallest.format}; merged model {size(line.merge.num_bytes)}",
            )
        )
    times = _times(line)
    longest = max(times, key=lambda name: times[name])
    shown.append(
        (
            "Time of all steps",
            duration(sum(times.values())),
            f"longest: {longest}, {duration(times[longest])}",
        )
    )
    spent = [
        (label, text)
        for value, label, text in (
            (training.cost, "Cost of training, at price_per_hour", f"{training.cost or 0:,.2f}"),
            (training.energy_kwh, "Energy of training", f"{number(training.energy_kwh, 3)} kWh"),
            (
                training.device_hours,
                "Time of training",
                f"{number(training.device_hours, 2)} {_hours(training)}",
            ),
        )
        if value is not None
    ]
    if spent:
        label, text = spent[0]
        shown.append((label, text, ", ".join(text for _, text in spent[1:])))
    return tiles(shown)


def _measured(item: TaskComparison) -> str:
    """Return a task with its metric, unless the name of the task holds the metric."""
    return item.task if item.metric in item.task else f"{item.task}, {item.metric}"


def _hours(training: TrainingSummary) -> str:
    return "GPU-hours" if training.device.startswith("cuda") else "device hours"


def picture(line: Line) -> str:
    """Return the diagram of the steps."""
    training, promoted = line.training, line.decision.verdict == "promote"
    details = {
        "fetch": parameters(line.origin.num_parameters),
        "prepare": f"{count(line.dataset.num_train_rows)} rows",
        "train": f"{count(training.num_steps)} steps",
        "merge": f"{count(line.merge.num_merged_modules)} modules",
        "evaluate base": _tasks(len(line.base_scores.tasks)),
        "evaluate tuned": _tasks(len(line.tuned_scores.tasks)),
        "gate": line.decision.verdict,
        "quantize": f"{len(line.exports)} export{'s' if len(line.exports) > 1 else ''}",
    }
    known: dict[str, tuple[Status, float | None, str]] = {
        name: ("finished", seconds, details[name]) for name, seconds in _times(line).items()
    }
    known["publish"] = _publish_stage(line) if promoted else ("skipped", None, "on hold")
    if not line.exports:
        known["quantize"] = ("skipped", None, "no exports")
    return section(
        "Steps of the run",
        line_diagram(stages(known)),
        note="A step whose result came from the cache shows the time of the run that made it.",
    )


def _publish_stage(line: Line) -> tuple[Status, float | None, str]:
    place = line.place
    if place.problem:
        return ("failed", None, "")
    if place.published is not None:
        return ("finished", place.published.seconds, _repositories(place.published))
    return ("next", None, "")


def _repositories(published: Published) -> str:
    num = len(published.repos)
    noun = "repositor" if any(repo.commit for repo in published.repos) else "director"
    return f"{num} {noun}{'y' if num == 1 else 'ies'}"


def _times(line: Line) -> dict[str, float]:
    times = {
        "fetch": line.origin.seconds,
        "prepare": line.dataset.seconds,
        "evaluate base": line.base_scores.seconds,
        "train": line.training.seconds,
        "merge": line.merge.seconds,
        "evaluate tuned": line.tuned_scores.seconds,
        "gate": line.decision.seconds,
    }
    if line.exports:
        times["quantize"] = sum(export.seconds for export in line.exports)
    return times


def _tasks(num_tasks: int) -> str:
    return "1 task" if num_tasks == 1 else f"{num_tasks} tasks"
