"""The command that explains a run: doctor.

It imports kfp only when it is called, because the import takes a second or two.
"""

import re
from typing import Annotated, Any

import typer

from tuneline.errors import TunelineError, UserError
from tuneline.pipelines.cli.cluster import PANEL
from tuneline.pipelines.cli.local_runs import connect_for, explain_run
from tuneline.pipelines.cli.options import ContextOption, HostOption, RunArgument
from tuneline.pipelines.cli.terminal import say
from tuneline.pipelines.local.run_dir import find_local_run

app = typer.Typer()


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
    """Explain why a run failed or is waiting, and what to change.

    Works with KFP's API, with Kubernetes, or with both, which tell most.
    """
    if (local := find_local_run(run)) is not None:
        explain_run(local)
        return
    from tuneline.pipelines.doctor.examine import examine
    from tuneline.pipelines.kfp_client import connection, runs
    from tuneline.pipelines.run_view import find_kube, view

    kube = find_kube(namespace, context)
    client = details = None
    try:
        if connection.known_host(host) is None and kube is not None and runs.is_run_id(run):
            raise UserError("Kubeflow Pipelines is not asked, because no --host is given")
        client = connect_for(run, host)
        details = runs.find_run(client, run, namespace=namespace)
    except TunelineError as error:
        # Kubernetes knows runs by their ID only.
        if kube is None or not runs.is_run_id(run):
            raise
        client = None
        say(f"note: {error}")
    seen = view(details.run_id if details else run, client=client, run=details, kube=kube)
    findings = examine(seen, client)
    for finding in findings:
        say(f"{finding.step}: {finding.cause}\n  why: {finding.why}\n  seen: {finding.evidence}")
        advice = re.sub(r"\bRUN\b", seen.run_id, finding.advice)
        say(f"  change: {advice}")
    if not findings and seen.state == "failed":
        say(f"run {seen.name} failed, but nothing is left that tells at which step")
    elif not findings:
        say(f"run {seen.name}: {seen.state}, and nothing wrong was found")
    print_notes(seen)


def print_notes(view: Any) -> None:
    """Print what could not be read, and why."""
    if view.kube is None:
        say(
            "note: causes that only Kubernetes knows are not shown, because it cannot be reached "
            "or does not show the run's pods: set KUBECONFIG"
        )
    if view.is_deleted and view.has_ended:
        say(
            "note: the run's pods and workflow are deleted, as KFP does one hour after the end and "
            "when the schedule of the run is deleted; this is what its records and archived logs "
            "tell"
        )
    if view.is_frozen:
        say(
            "note: KFP stopped recording the steps before the run ended: its workflow was deleted "
            "too early, or the workflow's state is larger than 1 MiB; archived logs are in Argo's "
            "artifact repository only"
        )
