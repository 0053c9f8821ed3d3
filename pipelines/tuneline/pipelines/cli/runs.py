"""The commands that look at, stop and resume a run, on a cluster or on this machine.

Each command imports kfp only when it is called, because the import takes a second or two.
"""

import datetime
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from tuneline.errors import ClusterError, CredentialsError, UserError
from tuneline.html.units import duration
from tuneline.pipelines.cli.cluster import PANEL
from tuneline.pipelines.cli.doctor import print_notes
from tuneline.pipelines.cli.listing import print_cluster_runs
from tuneline.pipelines.cli.local_runs import connect_for, resume_run, show_logs, show_status
from tuneline.pipelines.cli.options import (
    ContextOption,
    HostOption,
    NamespaceOption,
    RunArgument,
    SetOption,
)
from tuneline.pipelines.cli.terminal import console, say
from tuneline.pipelines.local.run_dir import find_local_run

app = typer.Typer()


@app.command(rich_help_panel=PANEL)
def status(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            help="ID or name of a run, or directory of a local run. A name means its newest run.",
            show_default="list recent runs",
        ),
    ] = None,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
) -> None:
    """Show a run's progress; without RUN, list recent runs of the cluster.

    The causes of failures are shown if Kubernetes can be reached too.
    """
    if run is not None and (local := find_local_run(run)) is not None:
        show_status(local)
        return
    from tuneline.pipelines.kfp_client import connection, runs

    client = connection.connect(host) if run is None else connect_for(run, host)
    if run is None:
        print_cluster_runs(runs.recent_runs(client, namespace=namespace))
        return
    details, view = _look(client, run, namespace, context)
    say(f"{view.name}: {view.state}, created {_format_time(details.created_at)}")
    table = Table(Column("step", no_wrap=True), Column("state", no_wrap=True), box=None)
    table.add_column("tries", justify="right")
    table.add_column("time", justify="right")
    table.add_column("cause")
    for step in view.steps:
        tries = str(len(step.attempts)) if step.started and step.attempts else ""
        time = duration(step.seconds) if step.seconds is not None else ""
        table.add_row(step.name, step.state, tries, time, _cause(step))
    console.print(table)
    print_notes(view)
    if view.state == "failed":
        say(f"what to change: tuneline doctor {view.run_id}")


@app.command(rich_help_panel=PANEL)
def logs(
    run: RunArgument,
    step: Annotated[
        list[str],
        typer.Argument(
            metavar="[STEP]",
            help="Name of a step, as in `tuneline status`: train, evaluate base, q4_k_m. Only "
            "the log of a local run can be shown without it.",
            show_default=False,
        ),
    ] = [],  # noqa: B006, typer copies it
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print new lines until the step ends.")
    ] = False,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
) -> None:
    """Print the log of a step of a run.

    KFP has the logs of pods that ended, also of deleted pods. The log of a running pod is read from
    Kubernetes.
    """
    if (local := find_local_run(run)) is not None:
        show_logs(local, " ".join(step), follow=follow)
        return
    if not step:
        raise UserError("name a step, e.g. train: tuneline status RUN lists the steps of a run")
    from tuneline.pipelines import step_logs

    client = connect_for(run, host)
    details, view = _look(client, run, namespace, context)
    chosen = step_logs.choose(view, " ".join(step))
    if follow:
        if len(chosen) > 1:
            raise UserError(
                f"--follow takes one step: name {' or '.join(each.name for each in chosen)}"
            )
        for line in step_logs.follow(
            lambda: _look(client, details.run_id, namespace, context)[1], chosen[0]
        ):
            typer.echo(line)
        return
    attempts = [attempt for each in chosen for attempt in each.attempts if attempt.pod]
    if not attempts:
        states = ", ".join(f"step '{each.name}' is {each.state}" for each in chosen)
        raise UserError(f"run {view.name} has no log to show: {states}")
    missing = []
    for attempt in attempts:
        text = step_logs.read(view, client, attempt)
        if text is None:
            missing.append(attempt)
            continue
        if len(attempts) > 1:
            say(step_logs.heading(attempt))
        typer.echo(text, nl=not text.endswith("\n"))
    if missing:
        names = ", ".join(f"{each.pod} ({each.state})" for each in missing)
        hint = (
            "the pod was deleted before it started or before Argo archived its log, or the archive "
            "was emptied"
        )
        if view.is_frozen:
            hint = (
                "KFP does not find archived logs of a run whose workflow was deleted early or is "
                "larger than 1 MiB; they are in Argo's artifact repository (main.log below the "
                "pod's name)"
            )
        elif view.kube is None:
            hint = (
                "KFP has the logs of ended pods only, and Kubernetes, which has those of running "
                "pods, cannot be reached: set KUBECONFIG"
            )
        raise UserError(f"there is no log of {names}: {hint}")


@app.command(rich_help_panel=PANEL)
def cancel(run: RunArgument, host: HostOption = None, namespace: NamespaceOption = None) -> None:
    """Cancel a run."""
    from tuneline.pipelines.kfp_client import connection, runs
    from tuneline.pipelines.kfp_client.progress import progress_of

    client = connection.connect(host)
    details = runs.find_run(client, run, namespace=namespace)
    steps = progress_of(details, runs.pipeline_of(client, details))
    running = [step.name for step in steps if step.state == "running"]
    if not runs.cancel(client, details):
        say(f"run {details.display_name} is being cancelled already")
        return
    stopped = f"; it stops {', '.join(running)}" if running else ""
    say(
        f"run {details.display_name}: cancellation requested{stopped}\n"
        f"KFP will call the run failed, tuneline calls it cancelled; finished steps are kept: "
        f"tuneline resume {details.run_id}"
    )


@app.command(rich_help_panel=PANEL)
def resume(
    run: RunArgument,
    set_: SetOption = [],  # noqa: B006, typer copies it
    host: HostOption = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
) -> None:
    """Re-run the failed steps of a run; finished steps are kept.

    --set changes the recipe of a local run. Steps that it does not concern are kept too.
    """
    if (local := find_local_run(run)) is not None:
        resume_run(local, set_)
        return
    if set_:
        raise UserError("--set needs a local run: KFP resumes a run with the values that it has")
    from tuneline.pipelines.exit_handler import forget_exit_handler
    from tuneline.pipelines.kfp_client import runs

    client = connect_for(run, host)
    details, view = _look(client, run, namespace, context)
    again = [step.name for step in view.steps if step.state in ("failed", "cancelled")]
    runs.resume(client, details, workflow=view.workflow)
    say(
        f"run {view.name}: resumed, from {', '.join(again) or 'where it stopped'}\n"
        f"follow it with: tuneline status {view.run_id}"
    )
    try:
        diagnosed = view.kube is not None and forget_exit_handler(view.kube, view.run_id)
    except (ClusterError, CredentialsError) as error:
        say(f"note: {error}")
        diagnosed = False
    if not diagnosed and "diagnose" not in again:
        say(
            "note: KFP does not run diagnose again. When the run has ended, `tuneline doctor "
            f"{view.run_id}` explains it."
        )


def _look(client: Any, name: str, namespace: str | None, context: str | None) -> tuple[Any, Any]:
    """Return a run as KFP's API has it, and the view of it."""
    from tuneline.pipelines.kfp_client import runs
    from tuneline.pipelines.run_view import find_kube, view

    run = runs.find_run(client, name, namespace=namespace)
    return run, view(run.run_id, client=client, run=run, kube=find_kube(namespace, context))


def _cause(step: Any) -> str:
    """Return the cause of a failed or waiting step in a few words."""
    if step.state not in ("failed", "waiting", "running") or not step.attempts:
        return ""
    last = step.attempts[-1]
    if last.ending is not None and last.ending.error:
        return f"{last.ending.error}: {last.ending.text}"
    code = f"exit code {last.exit_code}" if last.exit_code is not None else ""
    return ", ".join(part for part in (last.reason, code, last.message) if part)


def _format_time(value: datetime.datetime | None) -> str:
    return value.strftime("%Y-%m-%d %H:%M:%S") if value else ""
