"""The commands for runs on this machine: run, report."""

import contextlib
import datetime
import shutil
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from tuneline.artifacts import RunSummary
from tuneline.errors import OutputExistsError, WorldError
from tuneline.pipelines.catalog import find_recipe
from tuneline.pipelines.cli.early import refuse_early
from tuneline.pipelines.cli.options import NoCacheOption, RecipeArgument, SetOption
from tuneline.pipelines.cli.terminal import console, say
from tuneline.pipelines.local.attempt import StoppedRun, execute, kept
from tuneline.pipelines.local.notification import tell
from tuneline.pipelines.local.report_page import finished_page
from tuneline.pipelines.local.run_dir import (
    RECIPE_FILE,
    REPORT_FILE,
    RUNS_DIR,
    LocalRun,
    Start,
    require_local_run,
)
from tuneline.pipelines.local.watch import ARTIFACTS_DIR, read_events
from tuneline.recipe import Recipe, load_recipe
from tuneline.recipe_file.yaml_document import dump_document
from tuneline.records.in_words import score_cells, verdict_sentence
from tuneline.report.failed import render_failed
from tuneline.runtime.events import StepRun, failed_run
from tuneline.runtime.failures.causes import explain
from tuneline.runtime.parameter_text import list_in_words
from tuneline.runtime.redaction import redacted, without_secrets

PANEL = "Recipes and local runs"

app = typer.Typer()


class Runner(StrEnum):
    """Where a local run executes its steps."""

    SUBPROCESS = "subprocess"
    DOCKER = "docker"


@app.command(rich_help_panel=PANEL)
def run(
    recipe: RecipeArgument,
    runner: Annotated[
        Runner,
        typer.Option(help="Run the steps in this Python environment, or in Docker containers."),
    ] = Runner.SUBPROCESS,
    set_: SetOption = [],  # noqa: B006, typer copies it
    runs_dir: Annotated[
        Path,
        typer.Option(metavar="DIRECTORY", help="Directory that holds the runs."),
    ] = RUNS_DIR,
    no_cache: NoCacheOption = [],  # noqa: B006, typer copies it
) -> None:
    """Run all steps of a recipe on this machine."""
    loaded = find_recipe(recipe, set_, is_local=True)
    if no_cache:
        # Imported here only, because importing kfp takes a second or two.
        from tuneline.pipelines.finetune import finetune

        finetune(loaded, on_cluster=False, uncached=no_cache)
    check_here(loaded, runner)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    run_dir = (runs_dir / f"{loaded.name}-{stamp}").resolve()
    if run_dir.exists():
        raise OutputExistsError(f"{run_dir} exists: wait a second and run again")
    (run_dir / ARTIFACTS_DIR).mkdir(parents=True)
    values = loaded.model_dump(mode="json")
    stored = without_secrets(values)
    start = Start(
        redacted(recipe),
        [redacted(each) for each in set_],
        runner.value,
        stored != values,
        uncached=no_cache,
    )
    save_recipe(run_dir, stored)
    attempt(LocalRun(run_dir), loaded, start)


def check_here(recipe: Recipe, runner: Runner) -> None:
    """Make the cheap checks of a recipe before a run on this machine.

    Raises:
        UserError: the run cannot work.
    """
    if runner is Runner.DOCKER:
        # Imported here only, because importing kfp takes a second or two.
        from tuneline.pipelines.local.docker import check_images

        check_images(recipe)
    refuse_early(recipe, is_local=True, has_packages=runner is Runner.DOCKER)


def save_recipe(run_dir: Path, values: dict[str, object]) -> None:
    """Write the values of a run's recipe, without secrets, into the run's directory."""
    (run_dir / RECIPE_FILE).write_text(dump_document(values), encoding="utf-8")


def attempt(run: LocalRun, recipe: Recipe, start: Start) -> None:
    """Run the steps of a new or resumed run, and show the result.

    Raises:
        WorldError: a step failed.
    """
    console.print(f"[bold]{recipe.name}[/bold]: ", end="")
    console.print(redacted(f"{recipe.base_model} on {recipe.data_names}"), markup=False)
    say(f"publishes to: {list_in_words(recipe.publish_to)}\nrun: {run.directory}\n")
    try:
        exit_code = execute(run, recipe, start, console)
    except StoppedRun as stopped:
        page = write_report(run)
        say(str(stopped))
        _tell(recipe, run, page, stopped=str(stopped).partition("\n")[0])
        raise typer.Exit(stopped.exit_code) from None
    page = write_report(run)
    if exit_code != 0:
        why = cause(run.steps(), exit_code)
        _tell(recipe, run, page, failure=why)
        raise WorldError(f"{why}\n{kept(run)}\nlog: {run.log_path}\nreport: {page}")
    _print_summary(run)
    say(f"\nreport: {page}\nchat: tuneline chat {run.argument}")
    _tell(recipe, run, page)


def _tell(recipe: Recipe, run: LocalRun, page: Path, **ending: str) -> None:
    if recipe.notify:
        for problem in tell(recipe.notify, recipe.name, run, page, **ending):
            say(problem)


def cause(runs: list[StepRun], exit_code: int) -> str:
    """Return which step failed, and why, as far as the events tell."""
    failed = [run for run in runs if run.status == "failed"]
    last = failed[-1] if failed else failed_run(runs)
    if last is None:
        return f"the pipeline ended with exit code {exit_code}, before or after all steps"
    if last.status == "failed":
        return f"step {last.name} failed: {last.message}"
    explained = explain(last)
    return f"step {last.name} failed: {explained.cause} {explained.advice}"


@app.command(rich_help_panel=PANEL)
def report(
    run_dir: Annotated[
        str,
        typer.Argument(metavar="RUN", help="Directory of a local run, or its name below runs/."),
    ],
) -> None:
    """Rebuild the report.html of a local run and print its summary."""
    run = require_local_run(run_dir)
    page = write_report(run)
    with contextlib.suppress(FileNotFoundError):
        _print_summary(run)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)


def write_report(run: LocalRun) -> Path:
    """Write the page of a run into its directory, also if the run failed before its report."""
    events = read_events(run.events_path)
    page = run.directory / REPORT_FILE
    summary = run.summary_path()
    failed = {event["step"] for event in events if event["event"] == "failed"}
    if summary is not None and failed <= {"publish"}:
        if (text := finished_page(run)) is not None:
            page.write_text(text, encoding="utf-8")
        else:
            shutil.copyfile(summary.parent.parent / "page", page)
    else:
        recipe = load_recipe(run.directory / RECIPE_FILE)
        page.write_text(render_failed(recipe.name, events), encoding="utf-8")
    return page


def _print_summary(run: LocalRun) -> None:
    summary = run.summary()
    if summary is None:
        raise FileNotFoundError(RunSummary.filename)
    # The metrics are in the report; here, they would cut names and figures in a narrow terminal.
    words = (word for comparison in summary.comparisons for word in comparison.title.split())
    scores = Table(Column("task", min_width=max(map(len, words), default=0)), box=None)
    for name in ("base", "tuned", "change", "95 % interval"):
        scores.add_column(name, no_wrap=True)
    for comparison in summary.comparisons:
        scores.add_row(
            escape(comparison.title),
            *score_cells(comparison),
        )
    exports = Table("export", "MB", "bits per weight", "verdict", "generated text", box=None)
    verdicts = {item.format: item for item in summary.export_verdicts}
    for export in summary.exports:
        decided = verdicts.get(export.format)
        exports.add_row(
            export.format,
            f"{export.num_bytes / 1e6:.1f}",
            f"{export.bits_per_weight:.2f}",
            "-" if decided is None or decided.comparison is None else decided.verdict,
            escape(" ".join(export.generated.split())[:60]),
        )
    console.print()
    console.print(scores)
    for remark in summary.remarks:
        console.print(escape(remark), highlight=False)
    console.print()
    console.print(exports)
    colour = "green" if summary.verdict == "promote" else "yellow"
    sentence = verdict_sentence(summary.verdict, summary.reason, summary.comparisons)
    console.print(f"\n[bold {colour}]{summary.verdict}[/]: {escape(sentence)}", soft_wrap=True)
    for item in summary.export_verdicts:
        if item.is_held:
            console.print(
                f"[bold yellow]held[/]: {item.format}: {escape(item.reason)}", soft_wrap=True
            )
