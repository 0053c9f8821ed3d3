"""The command line: run, compile, lint, schema, recipes, report; others in *_cli.py."""

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
from typing import Annotated, NoReturn

import typer
import yaml
from rich.console import Console
from rich.table import Column, Table

from tuneline.artifacts import RunSummary
from tuneline.errors import OutputExistsError, RecipeError, TunelineError, UserError, WorldError
from tuneline.pipelines.catalog import RECIPES_DIR, find_recipe
from tuneline.pipelines.cli import cluster, plan, verify
from tuneline.recipe import Recipe, load_recipe
from tuneline.version import VERSION

REPORT_FILE = "report.html"
LOG_FILE = "run.log"
RECIPE_FILE = "recipe.yaml"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cluster.app)
app.add_typer(plan.app)
app.add_typer(verify.app)
console = Console()


class Runner(StrEnum):
    """Where the steps of a local run are executed."""

    SUBPROCESS = "subprocess"
    DOCKER = "docker"


RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or a name from `tuneline recipes`.")
]
SetOption = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Change one value, e.g. train.max_steps=60."),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tuneline {VERSION}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print it and exit."
        ),
    ] = False,
) -> None:
    """A production line for fine-tuned language models on Kubeflow Pipelines."""


@app.command()
def run(
    recipe: RecipeArgument,
    runner: Annotated[Runner, typer.Option(help="This environment, or the images.")] = (
        Runner.SUBPROCESS
    ),
    set_: SetOption = [],  # noqa: B006, typer copies it
    runs_dir: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs"),
) -> None:
    """Run a recipe's whole line on this machine."""
    from tuneline.pipelines.local.run import ARTIFACTS_DIR, EVENTS_FILE
    from tuneline.pipelines.local.watch import read_events, watch

    loaded = find_recipe(recipe, set_)
    if runner is Runner.DOCKER:
        from tuneline.pipelines.local.docker import check_images

        check_images(loaded)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    run_dir = (runs_dir / f"{loaded.name}-{stamp}").resolve()
    if run_dir.exists():
        raise OutputExistsError(f"{run_dir} exists: wait a second and run again")
    (run_dir / ARTIFACTS_DIR).mkdir(parents=True)
    (run_dir / RECIPE_FILE).write_text(
        yaml.safe_dump(loaded.model_dump(mode="json"), sort_keys=False), encoding="utf-8"
    )
    console.print(f"[bold]{loaded.name}[/bold]: {loaded.base_model} on {loaded.dataset}")
    console.print(f"run: {run_dir}\n", highlight=False)
    events_path = run_dir / ARTIFACTS_DIR / EVENTS_FILE
    command = [sys.executable, "-m", "tuneline.pipelines.local.run"]
    # Waiting OpenMP threads would spin on cores that the other steps need.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", **os.environ}
    with open(run_dir / LOG_FILE, "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [*command, str(run_dir), loaded.model_dump_json(), runner.value],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        # SIGTERM would end this process alone, and Ctrl-C's code hangs on typer's version.
        for ending in (signal.SIGINT, signal.SIGTERM):
            signal.signal(ending, lambda number, _: sys.exit(128 + number))
        try:
            code = watch(process, events_path, console)
        except BaseException:
            # The whole group: the runner and the step that it waits for.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
    page = _write_report(run_dir)
    if code != 0:
        failed = [event for event in read_events(events_path) if event["event"] == "failed"]
        cause = (
            f"step {failed[-1]['step']} failed: {failed[-1]['message']}"
            if failed
            else f"the pipeline ended with exit code {code}"
        )
        raise WorldError(f"{cause}\nlog: {run_dir / LOG_FILE}\nreport: {page}")
    _print_summary(run_dir)
    console.print(f"\nreport: {page}", highlight=False, soft_wrap=True)


@app.command(name="compile")
def compile_(
    recipe: RecipeArgument,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: NAME.yaml.")] = (
        None
    ),
    set_: SetOption = [],  # noqa: B006, typer copies it
    resources: Annotated[
        str | None,
        typer.Option(metavar="NAMESPACE", help="As Kubernetes resources, for GitOps."),
    ] = None,
) -> None:
    """Compile a recipe to a KFP pipeline that a cluster takes."""
    from kfp import compiler

    from tuneline.pipelines.finetune import finetune
    from tuneline.pipelines.gitops import write_resources

    loaded = find_recipe(recipe, set_)
    path = output or Path(f"{loaded.name}.yaml")
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"--output {path}: name a file that ends in .yaml")
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: there is no directory {path.parent}, make it first")
    if resources is not None:
        version = write_resources(loaded, path, namespace=resources)
        console.print(f"wrote {path}: version {version}", highlight=False, soft_wrap=True)
        return
    compiler.Compiler().compile(finetune(loaded), str(path))
    console.print(f"wrote {path}", highlight=False)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    typer.echo(json.dumps(Recipe.model_json_schema(), indent=2))


@app.command()
def recipes() -> None:
    """List the recipes that come with tuneline."""
    # Names are what a person types next: never cut, however narrow the terminal.
    name = Column("name", no_wrap=True, min_width=20)
    table = Table(name, "base model", "data", "method", "description", box=None)
    for path in sorted(RECIPES_DIR.glob("*.yaml")):
        loaded = load_recipe(path)
        table.add_row(
            loaded.name,
            loaded.base_model,
            loaded.dataset,
            loaded.prepare.method,
            loaded.description,
        )
    console.print(table)


@app.command()
def lint(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Compiled pipelines and manifests.")
    ],
) -> None:
    """Check compiled pipelines and Kubernetes manifests for security faults."""
    from tuneline.pipelines.lint.lint import lint_file

    found = [(path, finding) for path in files for finding in lint_file(path)]
    for path, finding in found:
        console.print(f"{path}: {finding}", markup=False, highlight=False, soft_wrap=True)
    if found:
        raise typer.Exit(1)
    console.print(f"{len(files)} file(s) checked, nothing found", highlight=False)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A directory below runs/.")],
) -> None:
    """Write a run's report.html anew and print its summary."""
    if not (run_dir / RECIPE_FILE).is_file():
        raise RecipeError(
            f"{run_dir} is not a run: it has no {RECIPE_FILE}; give a directory below runs/"
        )
    page = _write_report(run_dir.resolve())
    with contextlib.suppress(FileNotFoundError):
        _print_summary(run_dir.resolve())
    console.print(f"report: {page}", highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command line; known errors become one message and an exit code."""
    try:
        app()
    except TunelineError as error:
        _end(str(error), error.exit_code)
    except OSError as error:
        if error.filename is None:
            raise
        # A path that was given: not there, not to be written, on a full disk.
        _end(f"{error.filename}: {error.strerror}", WorldError.exit_code)


def _end(message: str, exit_code: int) -> NoReturn:
    Console(stderr=True).print(f"error: {message}", markup=False, highlight=False, soft_wrap=True)
    sys.exit(exit_code)


def _summary_path(run_dir: Path) -> Path | None:
    found = sorted(run_dir.glob(f"artifacts/*/*/*/{RunSummary.filename}"))
    return found[-1] if found else None


def _write_report(run_dir: Path) -> Path:
    """Copy the report step's page, or make the page of a run that did not get that far."""
    from tuneline.pipelines.local.run import ARTIFACTS_DIR, EVENTS_FILE
    from tuneline.pipelines.local.watch import read_events
    from tuneline.report.failed import render_failed

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
            comparison.task,
            comparison.metric,
            f"{comparison.base:.3f}",
            f"{comparison.tuned:.3f}",
            f"{comparison.difference:+.3f}",
            f"[{comparison.interval[0]:+.3f}, {comparison.interval[1]:+.3f}]",
        )
    exports = Table("export", "MB", "bits a weight", "answers", box=None)
    for export in summary.exports:
        exports.add_row(
            export.format,
            f"{export.num_bytes / 1e6:.1f}",
            f"{export.bits_per_weight:.2f}",
            " ".join(export.generated.split())[:60],
        )
    console.print()
    console.print(scores)
    console.print()
    console.print(exports)
    colour = "green" if summary.verdict == "promote" else "yellow"
    console.print(f"\n[bold {colour}]{summary.verdict}[/]: {summary.reason}", soft_wrap=True)


if __name__ == "__main__":
    main()
