"""The command that compares finished runs."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from tuneline.errors import UserError
from tuneline.pipelines.cli.run import PANEL
from tuneline.pipelines.cli.terminal import console, say
from tuneline.pipelines.local.run_dir import require_local_run

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
        score_differences,
    )
    from tuneline.pipelines.compare.finished import read_finished
    from tuneline.pipelines.compare.page import SCORE_COLUMNS, render_comparison, score_row

    if len(runs) < 2:
        raise UserError("name at least two runs: tuneline runs lists them")
    if output.suffix not in (".html", ".htm"):
        raise UserError(f"--output {output}: name a file that ends in .html")
    finished = [read_finished(require_local_run(name)) for name in runs]
    scores = [score_differences(finished[0], other) for other in finished[1:]]
    for other, (found, remark) in zip(finished[1:], scores, strict=True):
        say(f"{other.name} against {finished[0].name}:")
        # The metric is on the page; here, it would cut the figures in a narrow terminal.
        columns = [name for name in SCORE_COLUMNS if name != "metric"]
        table = Table(*(Column(name, overflow="fold") for name in columns), box=None)
        for each in found:
            cells = dict(zip(SCORE_COLUMNS, score_row(each), strict=True))
            table.add_row(*(cells[name] for name in columns))
        console.print(table)
        if remark:
            say(remark)
    rows = [*recipe_differences(finished), *figures(finished)]
    table = Table("", *(run.name for run in finished), box=None)
    for row in rows:
        table.add_row(row.name, *row.values)
    console.print(table)
    output.write_text(render_comparison(finished, scores), encoding="utf-8")
    say(f"page: {output.absolute()}")
