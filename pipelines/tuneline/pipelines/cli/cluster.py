"""The commands for runs on a cluster, which use KFP's API.

Each command imports kfp only when it is called, because the import takes a second or two.
"""

import datetime
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from tuneline.errors import UserError
from tuneline.pipelines.catalog import find_recipe
from tuneline.pipelines.cli.options import (
    AccountOption,
    ContextOption,
    ExperimentOption,
    HostOption,
    NamespaceOption,
    RecipeArgument,
    RootOption,
    RunArgument,
    SetOption,
)
from tuneline.pipelines.cli.terminal import console, say
from tuneline.recipe import Recipe

PANEL = "Runs on a cluster"

app = typer.Typer()


@app.command(rich_help_panel=PANEL)
def submit(
    recipe: RecipeArgument,
    set_: SetOption = [],  # noqa: B006, typer copies it
    host: HostOption = None,
    namespace: NamespaceOption = None,
    experiment: ExperimentOption = None,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of the run.", show_default="RECIPE-DATE-TIME"),
    ] = None,
    service_account: AccountOption = None,
    pipeline_root: RootOption = None,
    cache: Annotated[
        bool,
        typer.Option(help="Reuse cached results of steps whose inputs are unchanged."),
    ] = True,
) -> None:
    """Start a run of a recipe on a cluster."""
    from tuneline.pipelines.kfp_client import runs

    loaded = _load(recipe, set_)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    run_name = name or f"{loaded.name}-{stamp}"
    client = runs.connect(host)
    with runs.compiled(loaded, cache=cache) as pipeline:
        run_id = runs.submit(
            client,
            pipeline,
            name=run_name,
            experiment=experiment or loaded.name,
            namespace=namespace,
            service_account=service_account,
            pipeline_root=pipeline_root,
        )
    say(f"run {run_name}: {run_id}\nfollow it with: tuneline status {run_id}")


@app.command(rich_help_panel=PANEL)
def schedule(
    recipe: RecipeArgument,
    cron: Annotated[
        str | None,
        typer.Option(
            metavar="FIELDS",
            help="Cron expression in UTC: the usual five fields, e.g. '0 3 * * 1' for Mondays at "
            "3:00, or KFP's six with seconds first.",
        ),
    ] = None,
    every: Annotated[
        str | None,
        typer.Option(metavar="INTERVAL", help="Interval between runs, e.g. 12h; replaces --cron."),
    ] = None,
    set_: SetOption = [],  # noqa: B006, typer copies it
    host: HostOption = None,
    namespace: NamespaceOption = None,
    experiment: ExperimentOption = None,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Name of the schedule.", show_default="the recipe's name"
        ),
    ] = None,
    service_account: AccountOption = None,
    pipeline_root: RootOption = None,
    enabled: Annotated[
        bool | None,
        typer.Option(
            "--enabled/--disabled",
            help="Whether the schedule starts runs.",
            show_default="unchanged; a new schedule is enabled",
        ),
    ] = None,
) -> None:
    """Create or change a schedule that starts runs of a recipe.

    If a schedule of that name exists, it is changed.
    """
    from tuneline.pipelines.kfp_client import runs, schedules

    if (cron is None) == (every is None):
        raise UserError("give one of --cron and --every, e.g. --cron '0 3 * * 1' or --every 12h")
    loaded = _load(recipe, set_)
    trigger = schedules.cron_trigger(cron) if cron else schedules.interval_trigger(str(every))
    if cron and len(cron.split()) == 5:
        say(f"--cron has five fields: KFP gets '{trigger.cron}', with seconds first")
    client = runs.connect(host)
    with runs.compiled(loaded) as pipeline:
        scheduled = schedules.schedule(
            client,
            pipeline,
            trigger,
            name=name or loaded.name,
            experiment=experiment or loaded.name,
            description=loaded.description,
            namespace=namespace,
            service_account=service_account,
            pipeline_root=pipeline_root,
            enabled=enabled,
        )
    state = "enabled" if scheduled.enabled else "disabled"
    say(f"schedule {name or loaded.name}: {scheduled.outcome}, {state}, {trigger}")


@app.command(rich_help_panel=PANEL)
def schedules(
    host: HostOption = None,
    namespace: NamespaceOption = None,
    enable: Annotated[
        str | None, typer.Option(metavar="NAME", help="Let this schedule start runs again.")
    ] = None,
    disable: Annotated[
        str | None, typer.Option(metavar="NAME", help="Stop this schedule from starting runs.")
    ] = None,
    delete: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Delete this schedule; the runs it started are kept."),
    ] = None,
) -> None:
    """List schedules, or enable, disable or delete one."""
    from tuneline.pipelines.kfp_client import runs
    from tuneline.pipelines.kfp_client import schedules as recurring

    client = runs.connect(host)
    for name, value in ((enable, True), (disable, False)):
        if name:
            recurring_run = recurring.find_schedule(client, name, namespace=namespace)
            recurring.set_enabled(client, recurring_run, value)
            say(f"schedule {name}: {'enabled' if value else 'disabled'}")
    if delete:
        recurring_run = recurring.find_schedule(client, delete, namespace=namespace)
        recurring.delete_schedule(client, recurring_run)
        say(f"schedule {delete}: deleted")
    if enable or disable or delete:
        return
    table = Table(Column("name", no_wrap=True), "state", "starts", "ID", box=None)
    for recurring_run in recurring.find_schedules(client, namespace=namespace):
        state = "enabled" if recurring.is_enabled(recurring_run) else "disabled"
        starts = str(recurring.trigger_of(recurring_run))
        table.add_row(recurring_run.display_name, state, starts, recurring_run.recurring_run_id)
    console.print(table)


@app.command(rich_help_panel=PANEL)
def status(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            help="ID or name of a run. A name means its newest run.",
            show_default="list recent runs",
        ),
    ] = None,
    host: HostOption = None,
    namespace: NamespaceOption = None,
) -> None:
    """Show a run's progress; without RUN, list recent runs."""
    from tuneline.pipelines.kfp_client import runs

    client = runs.connect(host)
    if run is None:
        table = Table(Column("run", no_wrap=True), "state", "created", "ID", box=None)
        for recent in runs.recent_runs(client, namespace=namespace):
            created = _format_time(recent.created_at)
            table.add_row(recent.display_name, recent.state, created, recent.run_id)
        console.print(table)
        return
    details = runs.find_run(client, run, namespace=namespace)
    say(f"{details.display_name}: {details.state}, created {_format_time(details.created_at)}")
    if details.error and details.error.message:
        say(f"error: {details.error.message}")
    names = set(runs.step_names(details))
    table = Table(Column("step", no_wrap=True), "state", "seconds", "error", box=None)
    for task in runs.tasks_of(details):
        if task.display_name in names:
            error = task.error.message if task.error and task.error.message else ""
            table.add_row(task.display_name, task.state, _duration(task), error)
    console.print(table)


@app.command(rich_help_panel=PANEL)
def logs(
    run: RunArgument,
    step: Annotated[str, typer.Argument(metavar="STEP", help="Name of a step, e.g. train.")],
    host: HostOption = None,
    namespace: NamespaceOption = None,
) -> None:
    """Print the log of one step of a run."""
    from tuneline.pipelines.kfp_client import runs

    client = runs.connect(host)
    details = runs.find_run(client, run, namespace=namespace)
    pods = runs.pods_of(details, step)
    for pod in pods:
        if len(pods) > 1:
            say(f"--- {pod}")
        with runs.readable_errors():
            text = client.read_log(details.run_id, pod)
        typer.echo(text, nl=not text.endswith("\n"))


@app.command(rich_help_panel=PANEL)
def cancel(run: RunArgument, host: HostOption = None, namespace: NamespaceOption = None) -> None:
    """Cancel a run."""
    from tuneline.pipelines.kfp_client import runs

    client = runs.connect(host)
    details = runs.find_run(client, run, namespace=namespace)
    runs.cancel(client, details)
    say(f"run {details.display_name}: cancellation requested")


@app.command(rich_help_panel=PANEL)
def resume(run: RunArgument, host: HostOption = None, namespace: NamespaceOption = None) -> None:
    """Re-run the failed steps of a run; finished steps are kept."""
    from tuneline.pipelines.kfp_client import runs

    client = runs.connect(host)
    details = runs.find_run(client, run, namespace=namespace)
    runs.resume(client, details)
    say(f"run {details.display_name}: resumed\nfollow it with: tuneline status {details.run_id}")


@app.command(rich_help_panel=PANEL)
def doctor(
    run: RunArgument,
    host: HostOption = None,
    context: ContextOption = None,
    namespace: Annotated[
        str | None,
        typer.Option(
            metavar="NAMESPACE", help="Namespace of the run's pods.", show_default="kubeflow"
        ),
    ] = None,
) -> None:
    """Explain why a run failed or is waiting, and what to change."""
    from tuneline.pipelines.doctor import examine
    from tuneline.pipelines.kfp_client import runs
    from tuneline.pipelines.kube import Kube

    run_id = run
    if not runs.is_run_id(run):
        run_id = runs.find_run(runs.connect(host), run, namespace=namespace).run_id
    kube = Kube(namespace or "kubeflow", context=context)
    findings = examine(kube, run_id)
    for finding in findings:
        say(f"{finding.step}: {finding.cause}\n  why: {finding.why}\n  seen: {finding.evidence}")
        say(f"  change: {finding.advice}")
    if not findings:
        say(
            f"nothing wrong was found with run {run_id} in namespace {kube.namespace}. If the run "
            "failed, its pods have been deleted; `tuneline status` shows what KFP recorded."
        )


def _load(recipe: str, assignments: list[str]) -> Recipe:
    """Load a recipe for a cluster; warn if the published model would be lost with a pod."""
    loaded = find_recipe(recipe, assignments)
    if loaded.publish_to.startswith("dir:"):
        say(
            f"warning: publish_to {loaded.publish_to} is a directory inside a pod and is deleted "
            "with the pod; the model is still kept as an artifact of the run"
        )
    return loaded


def _format_time(value: datetime.datetime | None) -> str:
    return value.strftime("%Y-%m-%d %H:%M:%S") if value else ""


def _duration(task: Any) -> str:
    # The end of a task that is still running is the zero time of Go, in the year 1.
    if not task.start_time or not task.end_time or task.end_time < task.start_time:
        return ""
    return f"{(task.end_time - task.start_time).total_seconds():.0f}"
