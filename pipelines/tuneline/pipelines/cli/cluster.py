"""The commands that start runs on a cluster, now or on a schedule.

Each command imports kfp only when it is called, because the import takes a second or two.
"""

import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from tuneline.errors import RecipeError, UserError
from tuneline.images import LOCAL, LOCAL_PREFIX, origin_in_words
from tuneline.pipelines.catalog import find_recipe
from tuneline.pipelines.cli.early import refuse_early
from tuneline.pipelines.cli.options import (
    AccountOption,
    ExperimentOption,
    HostOption,
    NamespaceOption,
    NoCacheOption,
    RecipeArgument,
    RootOption,
    SetOption,
)
from tuneline.pipelines.cli.terminal import console, say
from tuneline.pods import CACHE_PATH
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
    no_cache: NoCacheOption = [],  # noqa: B006, typer copies it
) -> None:
    """Start a run of a recipe on a cluster.

    Small files of this machine that the recipe names as data are sent with the run.
    """
    from tuneline.pipelines.inputs import prepare_upload
    from tuneline.pipelines.kfp_client import connection, runs

    upload = prepare_upload(load_for_cluster(recipe, set_))
    loaded = upload.recipe
    if upload.archive is not None:
        kib = len(upload.archive) / 1024
        say(f"sending {', '.join(upload.files)} with the run ({kib:.0f} KiB)")
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    run_name = name or f"{loaded.name}-{stamp}"
    client = connection.connect(host)
    with runs.compiled(loaded, uncached=no_cache, archive=upload.archive) as pipeline:
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
    from tuneline.pipelines.kfp_client import connection, runs, schedules

    if (cron is None) == (every is None):
        raise UserError("give one of --cron and --every, e.g. --cron '0 3 * * 1' or --every 12h")
    loaded = load_for_cluster(recipe, set_)
    trigger = schedules.cron_trigger(cron) if cron else schedules.interval_trigger(str(every))
    if cron and len(cron.split()) == 5:
        say(f"--cron has five fields: KFP gets '{trigger.cron}', with seconds first")
    client = connection.connect(host)
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
        typer.Option(metavar="NAME", help="Delete this schedule, but not the records of its runs."),
    ] = None,
) -> None:
    """List schedules, or enable, disable or delete one."""
    from tuneline.pipelines.kfp_client import connection
    from tuneline.pipelines.kfp_client import schedules as recurring

    client = connection.connect(host)
    for name, value in ((enable, True), (disable, False)):
        if name:
            recurring_run = recurring.find_schedule(client, name, namespace=namespace)
            recurring.set_enabled(client, recurring_run, value)
            say(f"schedule {name}: {'enabled' if value else 'disabled'}")
    if delete:
        recurring_run = recurring.find_schedule(client, delete, namespace=namespace)
        recurring.delete_schedule(client, recurring_run, namespace=namespace)
        say(f"schedule {delete}: deleted")
    if enable or disable or delete:
        return
    table = Table(Column("name", no_wrap=True), "state", "starts", "ID", box=None)
    for recurring_run in recurring.find_schedules(client, namespace=namespace):
        state = "enabled" if recurring.is_enabled(recurring_run) else "disabled"
        starts = str(recurring.trigger_of(recurring_run))
        table.add_row(recurring_run.display_name, state, starts, recurring_run.recurring_run_id)
    console.print(table)


def load_for_cluster(recipe: str, assignments: list[str]) -> Recipe:
    """Load a recipe for a cluster; warn if the published model would be lost with a pod.

    Raises:
        RecipeError: the recipe does not say where the nodes get the images, or cannot work.
    """
    loaded = find_recipe(recipe, assignments)
    registry = loaded.placement.registry
    if registry is None:
        raise RecipeError(
            f"{loaded.name} does not say where the nodes get the images: set placement.registry to "
            "the registry to which you pushed them, e.g. --set "
            f"placement.registry=registry.example.com/team, or to {LOCAL} if every node has them "
            f"as {LOCAL_PREFIX}/... (`make images` builds them)"
        )
    say(f"images: {origin_in_words(registry)}")
    refuse_early(loaded, is_local=False)
    lost = [
        each.text
        for each in loaded.targets
        if each.kind == "directory"
        and not (loaded.placement.cache_claim and Path(each.path).is_relative_to(CACHE_PATH))
    ]
    if lost:
        say(
            f"warning: publish_to {', '.join(lost)} is a directory inside a pod and is deleted "
            "with the pod; the model is still kept as an artifact of the run. To keep the "
            "directory, publish to claim:NAME/PATH"
        )
    return loaded
