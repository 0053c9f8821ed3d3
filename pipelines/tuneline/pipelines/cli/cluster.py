"""The commands that talk to KFP: submit, schedule(s), status, logs, cancel, resume."""

import datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from tuneline.errors import UserError
from tuneline.pipelines.catalog import find_recipe
from tuneline.recipe import Recipe

# What these commands need of kfp is imported when one runs: it takes a second or two.

app = typer.Typer()
console = Console()

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or a name from `tuneline recipes`.")
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run's id, or its name.")]
SetOption = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Change one value, e.g. train.max_steps=60."),
]
HostOption = Annotated[
    str | None,
    typer.Option(envvar="KFP_ENDPOINT", help="The API's URL; in a cluster it is found."),
]
NamespaceOption = Annotated[
    str | None, typer.Option(help="Your namespace, on Kubeflow with profiles.")
]
ExperimentOption = Annotated[str | None, typer.Option(help="Default: the recipe's name.")]
AccountOption = Annotated[
    str | None, typer.Option(help="Service account of the pods, e.g. tuneline-runner.")
]
RootOption = Annotated[str | None, typer.Option(help="Where artifacts go, e.g. s3://bucket/path.")]


@app.command()
def submit(
    recipe: RecipeArgument,
    set_: SetOption = [],  # noqa: B006, typer copies it
    host: HostOption = None,
    namespace: NamespaceOption = None,
    experiment: ExperimentOption = None,
    name: Annotated[str | None, typer.Option(help="Default: RECIPE-TIME.")] = None,
    service_account: AccountOption = None,
    pipeline_root: RootOption = None,
    cache: Annotated[bool, typer.Option(help="Take finished steps from the cache.")] = True,
) -> None:
    """Run a recipe's line on a cluster, once."""
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
    _say(f"run {run_name}: {run_id}\nfollow it: tuneline status {run_id}")


@app.command()
def schedule(
    recipe: RecipeArgument,
    cron: Annotated[
        str | None,
        typer.Option(help="Five fields, or KFP's six with the second first; UTC."),
    ] = None,
    every: Annotated[str | None, typer.Option(help="An interval instead, e.g. 12h.")] = None,
    set_: SetOption = [],  # noqa: B006, typer copies it
    host: HostOption = None,
    namespace: NamespaceOption = None,
    experiment: ExperimentOption = None,
    name: Annotated[str | None, typer.Option(help="Default: the recipe's name.")] = None,
    service_account: AccountOption = None,
    pipeline_root: RootOption = None,
    enabled: Annotated[
        bool | None, typer.Option("--enabled/--disabled", help="Default: as it was, or enabled.")
    ] = None,
) -> None:
    """Run a recipe's line on a cluster again and again; the same name changes the schedule."""
    from tuneline.pipelines.kfp_client import runs, schedules

    if (cron is None) == (every is None):
        raise UserError("give one of --cron and --every, e.g. --cron '0 3 * * 1' or --every 12h")
    loaded = _load(recipe, set_)
    trigger = schedules.cron_trigger(cron) if cron else schedules.interval_trigger(str(every))
    if cron and len(cron.split()) == 5:
        _say(f"five fields: KFP gets '{trigger.cron}', the second first")
    client = runs.connect(host)
    with runs.compiled(loaded) as pipeline:
        done = schedules.schedule(
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
    state = "enabled" if done.enabled else "disabled"
    _say(f"schedule {name or loaded.name}: {done.outcome}, {state}, {trigger}")


@app.command()
def schedules(
    host: HostOption = None,
    namespace: NamespaceOption = None,
    enable: Annotated[str | None, typer.Option(metavar="NAME", help="Let it start runs.")] = None,
    disable: Annotated[str | None, typer.Option(metavar="NAME", help="Stop it.")] = None,
    delete: Annotated[str | None, typer.Option(metavar="NAME", help="Its runs stay.")] = None,
) -> None:
    """List the schedules, or change one."""
    from tuneline.pipelines.kfp_client import runs
    from tuneline.pipelines.kfp_client import schedules as recurring

    client = runs.connect(host)
    for name, value in ((enable, True), (disable, False)):
        if name:
            found = recurring.find_schedule(client, name, namespace=namespace)
            recurring.set_enabled(client, found, value)
            _say(f"schedule {name}: {'enabled' if value else 'disabled'}")
    if delete:
        found = recurring.find_schedule(client, delete, namespace=namespace)
        recurring.delete_schedule(client, found)
        _say(f"schedule {delete}: deleted")
    if enable or disable or delete:
        return
    table = Table(Column("name", no_wrap=True), "state", "starts", "id", box=None)
    for found in recurring.find_schedules(client, namespace=namespace):
        state = "enabled" if recurring.is_enabled(found) else "disabled"
        starts = str(recurring.trigger_of(found))
        table.add_row(found.display_name, state, starts, found.recurring_run_id)
    console.print(table)


@app.command()
def status(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A run's id or name; none: list them.")
    ] = None,
    host: HostOption = None,
    namespace: NamespaceOption = None,
) -> None:
    """Say how far a run is; without one, list the newest."""
    from tuneline.pipelines.kfp_client import runs

    client = runs.connect(host)
    if run is None:
        table = Table(Column("run", no_wrap=True), "state", "created", "id", box=None)
        for each in runs.recent_runs(client, namespace=namespace):
            table.add_row(each.display_name, each.state, _time(each.created_at), each.run_id)
        console.print(table)
        return
    found = runs.find_run(client, run, namespace=namespace)
    _say(f"{found.display_name}: {found.state}, created {_time(found.created_at)}")
    if found.error and found.error.message:
        _say(f"error: {found.error.message}")
    names = set(runs.step_names(found))
    table = Table(Column("step", no_wrap=True), "state", "seconds", "error", box=None)
    details = found.run_details and found.run_details.task_details
    for task in details or []:
        if task.display_name in names:
            error = task.error.message if task.error and task.error.message else ""
            table.add_row(task.display_name, task.state, _seconds(task), error)
    console.print(table)


@app.command()
def logs(
    run: RunArgument,
    step: Annotated[str, typer.Argument(metavar="STEP", help="E.g. train.")],
    host: HostOption = None,
    namespace: NamespaceOption = None,
) -> None:
    """Print what a step of a run has written so far."""
    from tuneline.pipelines.kfp_client import runs

    client = runs.connect(host)
    found = runs.find_run(client, run, namespace=namespace)
    pods = runs.pods_of(found, step)
    for pod in pods:
        if len(pods) > 1:
            _say(f"--- {pod}")
        with runs.plainly():
            text = client.read_log(found.run_id, pod)
        typer.echo(text, nl=not text.endswith("\n"))


@app.command()
def cancel(run: RunArgument, host: HostOption = None, namespace: NamespaceOption = None) -> None:
    """End a run."""
    from tuneline.pipelines.kfp_client import runs

    client = runs.connect(host)
    found = runs.find_run(client, run, namespace=namespace)
    runs.cancel(client, found)
    _say(f"run {found.display_name}: asked to end")


@app.command()
def resume(run: RunArgument, host: HostOption = None, namespace: NamespaceOption = None) -> None:
    """Run again what failed of a run; finished steps are kept."""
    from tuneline.pipelines.kfp_client import runs

    client = runs.connect(host)
    found = runs.find_run(client, run, namespace=namespace)
    runs.resume(client, found)
    _say(f"run {found.display_name}: goes on\nfollow it: tuneline status {found.run_id}")


def _load(recipe: str, assignments: list[str]) -> Recipe:
    loaded = find_recipe(recipe, assignments)
    if loaded.publish_to.startswith("dir:"):
        _say(
            f"warning: publish_to {loaded.publish_to} is a directory inside a pod, and goes with "
            "it; the model stays as an artifact of the run"
        )
    return loaded


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _time(value: datetime.datetime | None) -> str:
    return value.strftime("%Y-%m-%d %H:%M:%S") if value else ""


def _seconds(task: Any) -> str:
    # Go's zero time stands for a task that has not ended.
    if not task.start_time or not task.end_time or task.end_time < task.start_time:
        return ""
    return f"{(task.end_time - task.start_time).total_seconds():.0f}"
