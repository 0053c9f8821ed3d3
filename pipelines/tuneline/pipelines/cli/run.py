"""The commands for recipes and for runs on this machine: run, report, recipes, compile, schema."""

import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.markup import escape
from rich.table import Column, Table

from tuneline.artifacts import RunSummary
from tuneline.errors import OutputExistsError, RecipeError, UserError, WorldError
from tuneline.pipelines.catalog import find_recipe, shipped_recipes
from tuneline.pipelines.cli.options import RecipeArgument, SetOption
from tuneline.pipelines.cli.terminal import console, say
from tuneline.pipelines.local.watch import ARTIFACTS_DIR, EVENTS_FILE, read_events, watch
from tuneline.pipelines.recipe_reference import recipe_reference
from tuneline.recipe import Recipe, load_recipe
from tuneline.recorded_recipe import without_secrets
from tuneline.report.failed import render_failed
from tuneline.runtime.causes import explain
from tuneline.runtime.events import failed_run, step_runs
from tuneline.runtime.redaction import redacted
from tuneline.runtime.source_names import claim_problem, is_claim

PANEL = "Recipes and local runs"

REPORT_FILE = "report.html"
LOG_FILE = "run.log"
RECIPE_FILE = "recipe.yaml"

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
    ] = Path("runs"),
) -> None:
    """Run all steps of a recipe on this machine."""
    loaded = find_recipe(recipe, set_)
    for source in filter(is_claim, [loaded.base_model, *loaded.data_sources]):
        problem = claim_problem(source)
        if problem is not None:
            raise RecipeError(problem)
    if runner is Runner.DOCKER:
        # Imported here and in `compile` only, because importing kfp takes a second or two.
        from tuneline.pipelines.local.docker import check_images

        check_images(loaded)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    run_dir = (runs_dir / f"{loaded.name}-{stamp}").resolve()
    if run_dir.exists():
        raise OutputExistsError(f"{run_dir} exists: wait a second and run again")
    (run_dir / ARTIFACTS_DIR).mkdir(parents=True)
    (run_dir / RECIPE_FILE).write_text(
        yaml.safe_dump(without_secrets(loaded.model_dump(mode="json")), sort_keys=False),
        encoding="utf-8",
    )
    console.print(f"[bold]{loaded.name}[/bold]: ", end="")
    console.print(redacted(f"{loaded.base_model} on {loaded.data_names}"), markup=False)
    console.print(f"run: {run_dir}\n", highlight=False)
    events_path = run_dir / ARTIFACTS_DIR / EVENTS_FILE
    exit_code = _execute(run_dir, loaded, runner, events_path)
    page = _write_report(run_dir)
    if exit_code != 0:
        cause = _cause(read_events(events_path), exit_code)
        raise WorldError(f"{cause}\nlog: {run_dir / LOG_FILE}\nreport: {page}")
    _print_summary(run_dir)
    console.print(f"\nreport: {page}", highlight=False, soft_wrap=True)


def _cause(events: list[dict[str, Any]], exit_code: int) -> str:
    """Return which step failed, and why, as far as the events tell."""
    runs = step_runs(events)
    failed = [run for run in runs if run.status == "failed"]
    last = failed[-1] if failed else failed_run(runs)
    if last is None:
        return f"the pipeline ended with exit code {exit_code}, before or after all steps"
    if last.status == "failed":
        return f"step {last.step} failed: {last.message}"
    explained = explain(last)
    return f"step {last.step} failed: {explained.cause} {explained.advice}"


@app.command(rich_help_panel=PANEL)
def report(
    run_dir: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="Directory of a local run, below runs/."),
    ],
) -> None:
    """Rebuild the report.html of a local run and print its summary."""
    if not (run_dir / RECIPE_FILE).is_file():
        raise RecipeError(
            f"{run_dir} is not a run: it has no {RECIPE_FILE}; give a directory below runs/"
        )
    page = _write_report(run_dir.resolve())
    with contextlib.suppress(FileNotFoundError):
        _print_summary(run_dir.resolve())
    console.print(f"report: {page}", highlight=False, soft_wrap=True)


@app.command(rich_help_panel=PANEL)
def recipes() -> None:
    """List the recipes that ship with tuneline."""
    # Names are not cut even in a narrow terminal, because the user has to type one of them next.
    name = Column("name", no_wrap=True, min_width=20)
    table = Table(name, "base model", "dataset", "method", "description", box=None)
    for path in shipped_recipes():
        loaded = load_recipe(path)
        table.add_row(
            loaded.name,
            loaded.base_model,
            loaded.data_names,
            loaded.prepare.method,
            loaded.description,
        )
    console.print(table)


@app.command(name="compile", rich_help_panel=PANEL)
def compile_(
    recipe: RecipeArgument,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="File to write; its name ends in .yaml.",
            show_default="the recipe's name + .yaml",
        ),
    ] = None,
    set_: SetOption = [],  # noqa: B006, typer copies it
    resources: Annotated[
        str | None,
        typer.Option(
            metavar="NAMESPACE",
            help="Write Kubernetes resources for this namespace instead, for GitOps.",
        ),
    ] = None,
) -> None:
    """Compile a recipe to a KFP pipeline for a cluster."""
    from kfp import compiler

    from tuneline.pipelines.finetune import finetune
    from tuneline.pipelines.gitops import write_resources
    from tuneline.pipelines.inputs import local_problems

    loaded = find_recipe(recipe, set_)
    problems = local_problems(loaded)
    if problems:
        raise RecipeError("; ".join(problems))
    path = output or Path(f"{loaded.name}.yaml")
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"--output {path}: name a file that ends in .yaml")
    if not path.parent.is_dir():
        raise UserError(
            f"--output {path}: the directory {path.parent} does not exist: create it first"
        )
    if resources is not None:
        version = write_resources(loaded, path, namespace=resources)
        say(f"wrote {path}: version {version}")
        return
    compiler.Compiler().compile(finetune(loaded), str(path))
    say(f"wrote {path}")


@app.command(rich_help_panel=PANEL)
def schema(
    markdown: Annotated[
        bool,
        typer.Option("--markdown", help="Print a reference of every key in Markdown instead."),
    ] = False,
) -> None:
    """Print the JSON Schema of a recipe, for editors and other tools."""
    if markdown:
        typer.echo(recipe_reference(), nl=False)
        return
    typer.echo(json.dumps(Recipe.model_json_schema(), indent=2))


def _execute(run_dir: Path, recipe: Recipe, runner: Runner, events_path: Path) -> int:
    """Run the pipeline in a process group of its own, show its progress, return its exit code."""
    command = [sys.executable, "-m", "tuneline.pipelines.local.run"]
    # Otherwise, waiting OpenMP threads would spin on cores that other steps need.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", **os.environ}
    with open(run_dir / LOG_FILE, "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [*command, str(run_dir), recipe.model_dump_json(), runner.value],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        # Without these handlers, SIGTERM would end only this process, and the exit code after
        # Ctrl-C would depend on the version of typer.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda received, _: sys.exit(128 + received))
        try:
            return watch(process, events_path, console)
        except BaseException:
            # Signal the whole process group: the runner and the steps that it started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise


def _summary_path(run_dir: Path) -> Path | None:
    paths = sorted(run_dir.glob(f"artifacts/*/*/*/{RunSummary.filename}"))
    return paths[-1] if paths else None


def _write_report(run_dir: Path) -> Path:
    """Copy the report step's page, or render a page for a run that failed before that step."""
    events = read_events(run_dir / ARTIFACTS_DIR / EVENTS_FILE)
    page = run_dir / REPORT_FILE
    summary = _summary_path(run_dir)
    if summary is not None and not any(event["event"] == "failed" for event in events):
        shutil.copyfile(summary.parent.parent / "page", page)
    else:
        recipe = load_recipe(run_dir / RECIPE_FILE)
        page.write_text(render_failed(recipe.name, events), encoding="utf-8")
    return page


def _print_summary(run_dir: Path) -> None:
    path = _summary_path(run_dir)
    if path is None:
        raise FileNotFoundError(RunSummary.filename)
    summary = RunSummary.read(path.parent)
    scores = Table("task", "metric", "base", "tuned", "difference", "95 % interval", box=None)
    for comparison in summary.comparisons:
        scores.add_row(
            escape(comparison.title),
            comparison.metric,
            f"{comparison.base:.3f}",
            f"{comparison.tuned:.3f}",
            f"{comparison.difference:+.3f}",
            f"[{comparison.interval[0]:+.3f}, {comparison.interval[1]:+.3f}]",
        )
    exports = Table("export", "MB", "bits per weight", "generated text", box=None)
    for export in summary.exports:
        exports.add_row(
            export.format,
            f"{export.num_bytes / 1e6:.1f}",
            f"{export.bits_per_weight:.2f}",
            escape(" ".join(export.generated.split())[:60]),
        )
    console.print()
    console.print(scores)
    for remark in summary.remarks:
        console.print(escape(remark), highlight=False)
    console.print()
    console.print(exports)
    colour = "green" if summary.verdict == "promote" else "yellow"
    console.print(
        f"\n[bold {colour}]{summary.verdict}[/]: {escape(summary.reason)}", soft_wrap=True
    )
