"""The card that says whether the tuned model is safe to use, and what to do next."""

import shlex
from html import escape

from tuneline.artifacts import TaskComparison
from tuneline.html.page import Cell, code, paragraph, todo
from tuneline.html.units import percent
from tuneline.records.in_words import is_fraction, score_pair, with_unit
from tuneline.report.comparison import recommend
from tuneline.report.records import Line
from tuneline.verdict import mean_of_guards, rule_of


def answers(line: Line) -> str:
    """Return the two answers side by side."""
    safe = "".join(paragraph(sentence) for sentence in safety(line))
    return (
        '<section class="card"><div class="pair">'
        f"<div><h2>Is it safe to use?</h2>{safe}</div>"
        f"<div><h2>What next?</h2>{_next(line)}</div>"
        "</div></section>"
    )


def safety(line: Line) -> list[str]:
    """Return sentences on what the model may have lost, and on what was not measured."""
    comparisons, merge = line.decision.comparisons, line.merge
    guards = [item for item in comparisons if item.role == "guard"]
    sentences = []
    if guards:
        _, lower = mean_of_guards(guards)
        limit = rule_of(line.decision).max_regression
        changed = ", ".join(_changed(item) for item in guards[:4])
        others = f" and {len(guards) - 4} more" if len(guards) > 4 else ""
        tasks = "Other task" if len(guards) == 1 else "Other tasks"
        mean = "" if len(guards) == 1 else " on average"
        loss = _loss(guards, limit)
        if lower >= 0:
            says = f"With 95 % confidence, nothing was lost there{mean}."
        elif lower > -limit:
            says = f"With 95 % confidence, the loss{mean} is smaller than {loss}."
        else:
            says = f"A loss of {loss}{mean} cannot be ruled out with 95 % confidence."
        sentences.append(f"{tasks}: {changed}{others}. {says}")
    else:
        sentences.append(
            "What the model lost elsewhere is unknown, because no task besides the target was "
            "measured. The gate guards every other task that evaluate.tasks names."
        )
    control = next((item for item in comparisons if item.role == "control"), None)
    if control is not None and control.outcome != "worse":
        sentences.append("The tuned model still depends on its prompts (control task).")
    sentences.append(
        f"Merging kept what was learnt: at {percent(merge.top1_agreement)} of the positions, the "
        "merged model predicts the same token as the base model with the adapter."
    )
    leaked = [
        f"{found.num_found} of {found.num_questions} questions of {name}"
        for name, found in line.dataset.contamination.items()
        if found.num_found
    ]
    if leaked:
        sentences.append(
            f"The training rows contain {', '.join(leaked)}, so scores there prove little."
        )
    return sentences


def _next(line: Line) -> str:
    place, name = line.place, shlex.quote(line.place.run_name or "RUN")
    pairs: list[tuple[str, str]] = []
    is_held = line.decision.verdict == "hold"
    if place.is_local:
        pairs.append(("Talk to it", code(f"tuneline chat {name}")))
        pairs.append(("Base and tuned side by side", code(f"tuneline chat {name} --compare")))
    else:
        pairs.append(("State of the run", code(f"tuneline status {name}")))
    if is_held:
        pairs.append(("Change and run again", "See What to change, below."))
    elif place.published is not None:
        urls = (f"<code>{escape(repo.url)}</code>" for repo in place.published.repos)
        pairs.append(("Published", Cell("<br>".join(urls))))
    elif place.problem:
        pairs.append(("Publish again", code(f"tuneline resume {name}")))
    else:
        pairs.append(("Publishes to", code(line.target)))
    uses = recommend(line.decision.kept(line.exports))
    best = [
        f"<div><code>{each}</code>: {', '.join(uses[each])}</div>" for each in uses if uses[each]
    ]
    if best:
        pairs.append(("Which export to take", Cell("".join(best))))
    if place.is_local and not is_held:
        longer = f"train.max_steps={2 * line.training.num_steps}"
        pairs.append(("Train longer", code(f"tuneline resume {name} --set {longer}")))
    pairs += [(label, code(path)) for label, path in place.files]
    links = " &middot; ".join(
        f'<a href="{escape(address)}">{escape(label)}</a>' for label, address in place.links
    )
    if place.links:
        pairs.append(("Other pages", Cell(links)))
    where = (
        paragraph(f"The commands work in {place.working_dir}.", muted=True)
        if place.working_dir
        else ""
    )
    return todo(pairs) + where


def _changed(item: TaskComparison) -> str:
    """Return a task with its change, e.g. "boolq -2.0 points (worse)" or "x 9.8 \u2192 9.7"."""
    moved = with_unit(item) if is_fraction(item) else " \u2192 ".join(score_pair(item))
    outcome = "no clear change" if item.outcome == "undecided" else item.outcome
    return f"{item.task} {moved} ({outcome})"


def _loss(guards: list[TaskComparison], limit: float) -> str:
    """Return the limit of a loss with its unit, if all guards have the same one."""
    if all(is_fraction(item) for item in guards):
        return f"{100 * limit:g} points"
    metrics = {item.metric for item in guards}
    return f"{limit:g} {metrics.pop()}" if len(metrics) == 1 else f"{limit:g}"
