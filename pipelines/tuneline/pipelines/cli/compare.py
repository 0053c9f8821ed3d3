"""The command that compares finished runs."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from tuneline.errors import UserError
from tuneline.pipelines.cli.run import PANEL
from tuneline.pipelines.cli.terminal import console, say
from tuneline.pipelines.local.run_dir import require_local_run
from tuneline.runtime.printable import printable

MAX_RUNS = 4
"""Largest number of runs: charts have so many colours."""

app = typer.Typer()


@app.command(rich_help_panel=PANEL)
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Finished local runs: directories, or names below runs/. The others are compared "
            "with the first.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="HTML page to write."),
    ] = Path("compare.html"),
) -> None:
    """Compare finished local runs: recipe, data, and scores on the samples that they share."""
    # Imported here only, because importing numpy takes a moment.
    from tuneline.pipelines.compare.differences import (
        figures,
        recipe_differences,
        remarks,
        score_differences,
    )
    from tuneline.pipelines.compare.finished import read_finished
    from tuneline.pipelines.compare.page import SCORE_COLUMNS, render_comparison, score_row

    if not 2 <= len(runs) <= MAX_RUNS:
        named = "1 run is" if len(runs) == 1 else f"{len(runs)} runs are"
        raise UserError(f"{named} named: name 2 to {MAX_RUNS}, which tuneline runs lists")
    if output.suffix not in (".html", ".htm"):
        raise UserError(f"--output {output}: name a file that ends in .html")
    local = [require_local_run(name) for name in runs]
    if len({run.directory for run in local}) < len(local):
        raise UserError(f"a run is named twice: {' '.join(runs)}")
    finished = [read_finished(run) for run in local]
    if len({run.name for run in finished}) < len(finished):
        # Directories of the same name below several directories of runs.
        finished = [
            replace(run, name=str(each.directory))
            for run, each in zip(finished, local, strict=True)
        ]
    scores = [score_differences(finished[0], other) for other in finished[1:]]
    # Written first: who pipes the tables into `head` gets the page too.
    output.write_text(render_comparison(finished, scores), encoding="utf-8")
    for other, (found, remark) in zip(finished[1:], scores, strict=True):
        say(f"{other.name} against {finished[0].name}:")
        # The metric is on the page; here, it would cut the figures in a narrow terminal.
        shown = [name for name in SCORE_COLUMNS if name != "metric"]
        table = Table(
            *(Column(name, overflow="fold", no_wrap=name == "task") for name in shown), box=None
        )
        for each in found:
            cells = dict(zip(SCORE_COLUMNS, score_row(each), strict=True))
            table.add_row(*(Text(printable(cells[name])) for name in shown))
        console.print(table)
        if remark:
            say(remark)
    rows = [*recipe_differences(finished), *figures(finished)]
    columns = ("", *(run.name for run in finished))
    table = Table(*(Column(name, overflow="fold") for name in columns), box=None)
    for row in rows:
        # A value may look like rich's markup, or hold control characters.
        table.add_row(*(Text(printable(text)) for text in (row.name, *row.values)))
    console.print(table)
    for remark in remarks(finished):
        say(remark)
    say(f"page: {output.absolute()}")
