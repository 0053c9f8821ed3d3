"""The command that lists runs: on this machine, and on a cluster if one is configured."""

import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from tuneline.artifacts import TrainingSummary
from tuneline.errors import RecipeError, TunelineError
from tuneline.html.units import duration
from tuneline.pipelines.cli.options import HostOption, NamespaceOption
from tuneline.pipelines.cli.run import PANEL
from tuneline.pipelines.cli.terminal import console, say
from tuneline.pipelines.local.run_dir import RUNS_DIR, LocalRun, local_runs
from tuneline.pipelines.local.watch import ARTIFACTS_DIR
from tuneline.records.in_words import score_pair

app = typer.Typer()


@app.command(rich_help_panel=PANEL)
def runs(
    runs_dir: Annotated[
        Path, typer.Argument(metavar="DIRECTORY", help="Directory that holds local runs.")
    ] = RUNS_DIR,
    limit: Annotated[
        int, typer.Option(min=1, metavar="COUNT", help="Number of runs to list, newest first.")
    ] = 20,
    host: HostOption = None,
    namespace: NamespaceOption = None,
) -> None:
    """List local runs with verdict, scores, time and cost, and the runs of a cluster.

    The cluster is the one of --host or of KFP_ENDPOINT.
    """
    found = local_runs(runs_dir)
    if found:
        # Names are not cut even in a narrow terminal, because the user has to type them next.
        table = Table(*(Column(name, no_wrap=True) for name in ("run", "result")), box=None)
        # The names of the tasks stay whole too; the scores then follow on a second line.
        rows = [(run.name, *_result(run)) for run in found[:limit]]
        longest = max((len(word) for row in rows for word in row[2].split()), default=0)
        table.add_column("scores", overflow="fold", min_width=longest)
        table.add_column("started", overflow="fold")
        table.add_column("time", justify="right")
        table.add_column("cost", justify="right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        if len(found) > limit:
            say(f"{len(found) - limit} older runs are not listed: --limit {len(found)} lists them")
    else:
        say(f"no runs in {runs_dir.absolute()}")
    if host is not None:
        _list_cluster(host, namespace, limit)


def _result(run: LocalRun) -> tuple[str, str, str, str, str]:
    """Return verdict or state, scores, start, time and cost of a run, as far as they are known."""
    try:
        summary = run.summary()
    except RecipeError:
        # Another version of tuneline wrote the record.
        summary = None
    state = run.state()
    verdict = summary.verdict if summary is not None and state == "succeeded" else state
    scores = "\n".join(
        f"{each.task} {' -> '.join(score_pair(each))}"
        for each in (summary.comparisons if summary is not None else ())
        if each.role not in ("prompted", "published")
    )
    steps = run.steps()
    if not steps:
        return verdict, scores, "", "", ""
    started = datetime.datetime.fromtimestamp(steps[0].started).strftime("%m-%d %H:%M")
    spent = max(step.started + (step.seconds or 0) for step in steps) - steps[0].started
    return verdict, scores, started, duration(spent), _cost(run)


def _cost(run: LocalRun) -> str:
    """Return the cost of the run's own training; "" if it came from the cache or has no price."""
    pattern = f"{ARTIFACTS_DIR}/*/train*/adapter/{TrainingSummary.filename}"
    for path in sorted(run.directory.glob(pattern), reverse=True):
        try:
            cost = TrainingSummary.read(path.parent).cost
        except RecipeError:
            continue
        return "" if cost is None else f"{cost:.2f}"
    return ""


def _list_cluster(host: str, namespace: str | None, limit: int) -> None:
    # Imported here only, because importing kfp takes a second or two.
    from tuneline.pipelines.kfp_client import connection
    from tuneline.pipelines.kfp_client import runs as cluster

    try:
        found = cluster.recent_runs(connection.connect(host), namespace=namespace, limit=limit)
    except TunelineError as error:
        say(f"note: the runs on {host} are not listed: {error}")
        return
    say(f"runs on {host}:")
    print_cluster_runs(found)


def print_cluster_runs(found: list[Any]) -> None:
    """Print a line per run as KFP's API has them.

    The lines are wider than many terminals, so it is the terminal that breaks them: names and IDs
    stay in one piece, because the user copies them.
    """
    from tuneline.pipelines.kfp_client import progress

    rows = [("run", "state", "created", "ID")]
    for run in found:
        created = run.created_at.strftime("%Y-%m-%d %H:%M") if run.created_at else ""
        rows.append((run.display_name, progress.state_of(run), created, run.run_id))
    *widths, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    for *cells, run_id in rows:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        say("  ".join([*padded, run_id]))
