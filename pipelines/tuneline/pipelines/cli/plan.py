"""The commands that look before and after: plan, doctor."""

from typing import Annotated

import typer

from tuneline.errors import UserError
from tuneline.pipelines.catalog import find_recipe
from tuneline.pipelines.cli.cluster import (
    HostOption,
    RecipeArgument,
    RunArgument,
    SetOption,
    console,
)
from tuneline.placement import PROFILES

app = typer.Typer()

MARKS = {"ok": "ok     ", "warn": "WARN   ", "fail": "FAIL   ", "unknown": "unknown"}

ContextOption = Annotated[str | None, typer.Option(help="Of your kubeconfig; default: current.")]


@app.command()
def plan(
    recipe: RecipeArgument,
    set_: SetOption = [],  # noqa: B006, typer copies it
    profile: Annotated[
        str | None, typer.Option(help=f"In place of placement.profile: {', '.join(PROFILES)}.")
    ] = None,
    parameters: Annotated[
        float | None,
        typer.Option(min=1e6, help="Of the base model, e.g. 8e9; default: by its name."),
    ] = None,
    price: Annotated[
        float | None,
        typer.Option(min=0, help="Of an hour of one GPU; default: train.price_per_hour."),
    ] = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Ask the cluster of your kubeconfig, too.")
    ] = False,
    context: ContextOption = None,
    namespace: Annotated[str, typer.Option(help="Where runs go.")] = "kubeflow",
    service_account: Annotated[
        str | None, typer.Option(help="Of the runs: is it allowed what they need?")
    ] = None,
) -> None:
    """Estimate what a recipe takes, and check that a cluster has it; exit code 1 where not."""
    from tuneline.pipelines.kube import Kube
    from tuneline.pipelines.plan.plan import plan as check

    if profile is not None and profile not in PROFILES:
        raise UserError(f"--profile {profile}: there are {', '.join(PROFILES)}")
    assignments = [*set_, *([f"placement.profile={profile}"] if profile else [])]
    loaded = find_recipe(recipe, assignments)
    checks = check(
        loaded,
        num_parameters=parameters,
        price_per_gpu_hour=price,
        kube=Kube(namespace, context=context) if cluster or context else None,
        account=service_account,
    )
    for each in checks:
        _say(f"{MARKS[each.verdict]} {each.name}: {each.words}")
        if each.advice:
            _say(f"{'':7} -> {each.advice}")
    if any(each.verdict == "fail" for each in checks):
        raise typer.Exit(1)


@app.command()
def doctor(
    run: RunArgument,
    host: HostOption = None,
    context: ContextOption = None,
    namespace: Annotated[
        str | None, typer.Option(help="Where the run's pods are; default: kubeflow.")
    ] = None,
) -> None:
    """Say why a run failed or waits: cause, evidence, what to change."""
    from tuneline.pipelines.doctor import examine
    from tuneline.pipelines.kfp_client import runs
    from tuneline.pipelines.kube import Kube

    run_id = run
    if not runs.is_id(run):
        run_id = runs.find_run(runs.connect(host), run, namespace=namespace).run_id
    kube = Kube(namespace or "kubeflow", context=context)
    findings = examine(kube, run_id)
    for found in findings:
        _say(f"{found.step}: {found.cause}\n  why: {found.why}\n  seen: {found.evidence}")
        _say(f"  change: {found.advice}")
    if not findings:
        _say(
            f"nothing wrong was found with run {run_id} in namespace {kube.namespace}: if it did "
            "fail, its pods are gone; `tuneline status` has what KFP kept"
        )


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
