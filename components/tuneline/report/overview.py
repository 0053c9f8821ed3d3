"""The first sections of a run's page: verdict, figures, and the diagram of the steps."""

from tuneline.html.flow import Status
from tuneline.html.page import banner, line_diagram, section, tiles
from tuneline.html.units import count, duration, number, parameters, signed, size
from tuneline.report.line import stages
from tuneline.report.records import Line
from tuneline.report.scores import interval


def verdict(line: Line) -> str:
    """Return the banner with the verdict."""
    decision = line.decision
    if decision.verdict == "promote":
        held = line.decision.held_exports()
        without = f", without the exports that are held: {', '.join(held)}" if held else ""
        after = f"It will be published to {line.target}{without}."
        return banner("Promote", decision.reason, "good", small=after)
    after = f"Nothing is published to {line.target}."
    return banner("Hold", decision.reason, "warn", small=after)


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
        shown.append(
            (
                f"{first.task}, {first.metric}",
                f"{number(first.base, 3)} \u2192 {number(first.tuned, 3)}",
                f"{signed(first.difference, 3)} {interval(first)}",
            )
        )
    training = line.training
    if training.final_eval_loss is not None:
        before = number(training.first_eval_loss, 3)
        shown.append(
            (
                "Evaluation loss",
                f"{before} \u2192 {number(training.final_eval_loss, 3)}",
                f"{count(training.num_steps)} steps, {count(training.num_tokens)} tokens",
            )
        )
    else:
        shown.append(("Training loss", number(training.final_loss, 3), "last logged"))
    if kept := line.kept_exports:
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
    return tiles(shown)


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
    known["publish"] = ("next", None, "") if promoted else ("skipped", None, "on hold")
    if not line.exports:
        known["quantize"] = ("skipped", None, "no exports")
    return section(
        "Steps of the run",
        line_diagram(stages(known)),
        note="A step whose result came from the cache shows the time of the run that made it.",
    )


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
