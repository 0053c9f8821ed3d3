"""What status, logs, resume and doctor show of a run on this machine."""

import re
import time
from collections.abc import Iterator
from typing import Any

import typer
from rich.table import Column, Table

from tuneline.errors import CredentialsError, UserError
from tuneline.html.units import duration
from tuneline.pipelines.catalog import find_recipe
from tuneline.pipelines.cli.run import Runner, attempt, check_here, save_recipe
from tuneline.pipelines.cli.terminal import console, say
from tuneline.pipelines.doctor.log_errors import find_error
from tuneline.pipelines.local.attempt import kept
from tuneline.pipelines.local.run_dir import RECIPE_FILE, REPORT_FILE, LocalRun, Start
from tuneline.records.in_words import verdict_sentence
from tuneline.runtime.events import StepRun, failed_run
from tuneline.runtime.failures.causes import explain
from tuneline.runtime.redaction import without_secrets

POLL_SECONDS = 1.0


def connect_for(run: str, host: str | None) -> Any:
    """Connect to KFP's API for a run that is not one of this machine.

    Raises:
        UserError: no host is given, and none can be found; the message also names local runs.
    """
    # Imported here only, because importing kfp takes a second or two.
    from tuneline.pipelines.kfp_client import connection

    try:
        return connection.connect(host)
    except CredentialsError:
        raise
    except UserError as error:
        raise UserError(
            f"there is no local run {run} (`tuneline runs` lists them), and for one on a cluster "
            f"there is {error}"
        ) from None


def show_status(run: LocalRun) -> None:
    """Print the state of a run and of its steps, and what can be done next."""
    state, steps, now = run.state(), run.steps(), time.time()
    say(f"{run.directory}: {state}")
    table = Table(Column("step", no_wrap=True), Column("state", no_wrap=True), box=None)
    table.add_column("time", justify="right")
    table.add_column("remark")
    for name in run.cached():
        table.add_row(name, "from cache", "", "")
    for step in steps:
        table.add_row(step.name, *_state(step, now, is_running=state == "running"))
    console.print(table)
    if state in ("failed", "stopped"):
        say(kept(run))
        say(f"why: tuneline doctor {run.name}")
    summary = run.summary()
    if state == "succeeded" and summary is not None:
        sentence = verdict_sentence(summary.verdict, summary.reason, summary.comparisons)
        say(f"{summary.verdict}: {sentence}")
        for item in summary.export_verdicts:
            if item.is_held:
                say(f"held: the export {item.format}: {item.reason}")
        say(f"report: {run.directory / REPORT_FILE}\nchat: tuneline chat {run.argument}")


def show_logs(run: LocalRun, words: str, *, follow: bool) -> None:
    """Print the log of a step; of all steps if `words` is empty.

    Args:
        run: the run.
        words: name of a step, as `status` shows it, or its first or last word.
        follow: whether to print new lines until the step ends.

    Raises:
        UserError: the run has no such step.
    """
    if follow:
        for line in _follow(run, words):
            typer.echo(line)
        return
    sections = [each for each in run.sections() if not words or _is_named(each.name, words)]
    if not sections:
        # Its result came from the cache: the log is that of the attempt that made it.
        everything = run.sections(of_all_attempts=True)
        sections = [each for each in everything if _is_named(each.name, words)][-1:]
    if not sections:
        names = ", ".join(dict.fromkeys(each.name for each in everything))
        raise UserError(f"run {run.name} has no step '{words}': it has {names or 'none yet'}")
    for section in sections:
        if len(sections) > 1:
            say(f"--- {section.name}")
        for line in section.lines:
            typer.echo(line)


def resume_run(run: LocalRun, settings: list[str]) -> None:
    """Run the steps of a run again that have not finished.

    Args:
        run: the run.
        settings: overrides of its recipe, as KEY=VALUE.

    Raises:
        UserError: the run is at work, has finished, or has not stored its credentials.
    """
    state = run.state()
    if state == "running":
        raise UserError(f"{run.directory} is running: wait until it ends, or stop it")
    if state == "succeeded" and not settings:
        raise UserError(f"{run.directory} has finished: start another run with `tuneline run`")
    start = run.start or Start(str(run.directory / RECIPE_FILE), [], Runner.SUBPROCESS.value)
    if start.has_secrets:
        given = " ".join(f"--set '{each}'" for each in [*start.settings, *settings])
        raise UserError(
            f"the recipe of {run.name} has credentials in it, which are not stored with the run: "
            f"run `tuneline run {start.recipe} {given}".rstrip()
            + "` again; finished steps are "
            "taken from the cache"
        )
    loaded = find_recipe(str(run.directory / RECIPE_FILE), settings, is_local=True)
    check_here(loaded, Runner(start.runner))
    if settings:
        save_recipe(run.directory, without_secrets(loaded.model_dump(mode="json")))
    attempt(run, loaded, start)


def explain_run(run: LocalRun) -> None:
    """Print why a run failed or holds its model, and what to change."""
    state = run.state()
    failed = failed_run(run.steps()) if state in ("failed", "stopped") else None
    summary = run.summary()
    if state == "stopped" and (failed is None or failed.kind in ("", "StoppedError")):
        say(f"run {run.name} was stopped\n{kept(run)}")
    elif failed is not None:
        _explain_step(run, failed)
        say(kept(run))
    elif state == "succeeded" and summary is not None and summary.verdict == "hold":
        say(f"gate: hold\n  why: {summary.reason}\n  seen: {run.directory / REPORT_FILE}")
    elif state == "failed":
        say(f"run {run.name} failed before or after all steps: read {run.log_path}")
    else:
        say(f"run {run.name}: {state}, and nothing wrong was found")


def _explain_step(run: LocalRun, failed: StepRun) -> None:
    explained = explain(failed)
    why, advice, seen = explained.cause, explained.advice, str(run.log_path)
    if not failed.kind:
        # The step left no event of its end: its log may tell more than that it was killed.
        log = [each for each in run.sections() if each.name == failed.name]
        found = find_error(failed.step, "\n".join(log[-1].lines)) if log else None
        if found is not None:
            why, advice, seen = found.why, found.advice, found.evidence
    advice = re.sub(r"tuneline (doctor|resume) RUN\b", rf"tuneline \1 {run.name}", advice)
    say(f"{failed.name}: {failed.kind or 'killed'}\n  why: {why}\n  seen: {seen}")
    say(f"  change: {advice}")


def _state(step: StepRun, now: float, *, is_running: bool) -> tuple[str, str, str]:
    """Return state, time and remark of a step."""
    if step.status == "finished":
        return "succeeded", duration(step.seconds), ""
    if step.status == "failed":
        state = "stopped" if step.kind == "StoppedError" else "failed"
        return state, duration(step.seconds), f"{step.kind}: {step.message}"
    reached = f"{step.done} of {step.total} {step.note}".strip() if step.total else ""
    if not is_running:
        return "stopped", "", reached
    left = step.seconds_left(now)
    remark = f"{reached}, about {duration(left)} left" if left is not None else reached
    return "running", duration(now - step.started), remark


def _is_named(name: str, words: str) -> bool:
    return name == words or name.startswith(f"{words} ") or name.endswith(f" {words}")


def _follow(run: LocalRun, words: str) -> Iterator[str]:
    """Yield the lines of the steps of a name as they are written, until the run ends."""
    shown: dict[int, int] = {}
    while True:
        is_last = run.state() != "running"
        for index, section in enumerate(run.sections()):
            if not words or _is_named(section.name, words):
                yield from section.lines[shown.get(index, 0) :]
                shown[index] = len(section.lines)
        if is_last:
            return
        time.sleep(POLL_SECONDS)
