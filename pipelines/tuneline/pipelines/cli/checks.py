"""The commands that check a recipe, a compiled pipeline or an artifact: plan, lint, verify."""

from pathlib import Path
from typing import Annotated

import typer

from tuneline.errors import DataError, UserError
from tuneline.pipelines.catalog import find_recipe
from tuneline.pipelines.cli.options import ContextOption, RecipeArgument, SetOption
from tuneline.pipelines.cli.terminal import say
from tuneline.pipelines.lint.lint import lint_file
from tuneline.placement import PROFILES
from tuneline.verify import files_without_hash
from tuneline.verify import verify as verify_directory

PANEL = "Checks"

MARKS = {"ok": "ok     ", "warn": "WARN   ", "fail": "FAIL   ", "unknown": "unknown"}

app = typer.Typer()


@app.command(rich_help_panel=PANEL)
def plan(
    recipe: RecipeArgument,
    set_: SetOption = [],  # noqa: B006, typer copies it
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="PROFILE",
            help=f"Use this placement profile ({', '.join(PROFILES)}).",
            show_default="placement.profile of the recipe",
        ),
    ] = None,
    parameters: Annotated[
        float | None,
        typer.Option(
            min=1e6,
            metavar="COUNT",
            help="Number of parameters of the base model, e.g. 8e9.",
            show_default="read from the model's name",
        ),
    ] = None,
    price: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="AMOUNT",
            help="Price of one GPU per hour, in any currency.",
            show_default="train.price_per_hour of the recipe",
        ),
    ] = None,
    cluster: Annotated[
        bool,
        typer.Option("--cluster", help="Also check the cluster of your kubeconfig."),
    ] = False,
    context: ContextOption = None,
    namespace: Annotated[
        str,
        typer.Option(
            metavar="NAMESPACE",
            help="Namespace that the runs will use.",
            show_default="kubeflow",
        ),
    ] = "kubeflow",
    service_account: Annotated[
        str | None,
        typer.Option(
            metavar="ACCOUNT",
            help="Service account that the runs will use; plan checks its permissions.",
        ),
    ] = None,
) -> None:
    """Check a recipe's model, data and target; estimate the time, memory and cost of a run.

    Model and data are looked up, but not fetched. With --cluster, the cluster is checked too;
    --context implies --cluster. The exit code is 1 if a check fails.
    """
    # Imported only here, because importing the Kubernetes client takes a second or two.
    from tuneline.pipelines.kube import Kube
    from tuneline.pipelines.plan.base_model import read_base_model
    from tuneline.pipelines.plan.plan import plan as check_plan

    if profile is not None and profile not in PROFILES:
        raise UserError(f"--profile {profile} is unknown: choose one of {', '.join(PROFILES)}")
    assignments = [*set_, *([f"placement.profile={profile}"] if profile else [])]
    loaded = find_recipe(recipe, assignments, is_local=not (cluster or context))
    checks = check_plan(
        loaded,
        num_parameters=parameters,
        model=read_base_model(loaded) if parameters is None else None,
        price_per_gpu_hour=price,
        kube=Kube(namespace, context=context) if cluster or context else None,
        account=service_account,
        looks_up=True,
    )
    for check in checks:
        say(f"{MARKS[check.verdict]} {check.name}: {check.words}")
        if check.advice:
            say(f"{'':7} -> {check.advice}")
    if any(check.verdict == "fail" for check in checks):
        raise typer.Exit(1)


@app.command(rich_help_panel=PANEL)
def lint(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE", help="Compiled pipelines and Kubernetes manifests (YAML)."),
    ],
) -> None:
    """Check compiled pipelines and Kubernetes manifests for security problems.

    The exit code is 1 if a problem is found.
    """
    findings = [(path, finding) for path in files for finding in lint_file(path)]
    for path, finding in findings:
        say(f"{path}: {finding}")
    if findings:
        raise typer.Exit(1)
    say(f"{_files(len(files))} checked, nothing found")


@app.command(rich_help_panel=PANEL)
def verify(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIRECTORY", help="Directory of a run, an artifact or a downloaded repository."
        ),
    ],
) -> None:
    """Compare files with the hashes in their records, and list the differences.

    Files that have no hash are listed too. The exit code is 1 if a file differs from its record, or
    an artifact was made from another input than the one in DIRECTORY.
    """
    if not directory.is_dir():
        raise DataError(
            f"{directory} is not a directory: give the directory of a run, of an artifact or of a "
            "downloaded repository"
        )
    results = verify_directory(directory)
    for result in results:
        state = "differs" if result.differences else "ok"
        name = result.path.relative_to(directory).as_posix()
        typer.echo(f"{state}: {name} ({_files(result.num_files)})")
        for line in result.differences:
            typer.echo(f"  {line}")
    versions = sorted({line for result in results for line in result.versions})
    if versions:
        typer.echo("versions that differ from this machine's:")
    for line in versions:
        typer.echo(f"  {line}")
    if unchecked := files_without_hash(directory):
        typer.echo("not checked, because no record has their hash:")
    for name, what in unchecked.items():
        typer.echo(f"  {name}: {what}")
    if any(result.differences for result in results):
        raise typer.Exit(1)


def _files(num_files: int) -> str:
    return "1 file" if num_files == 1 else f"{num_files} files"
