"""The command `verify`."""

from pathlib import Path
from typing import Annotated

import typer

from tuneline.errors import DataError

app = typer.Typer()


@app.command()
def verify(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIRECTORY", help="A run, an artifact or a downloaded repository."),
    ],
) -> None:
    """Check files and inputs against their records; say what differs."""
    from tuneline.verify import verify as check

    if not directory.is_dir():
        raise DataError(f"{directory} is no directory: give a run's, or a downloaded repository")
    checked = check(directory)
    for found in checked:
        state = "differs" if found.differences else "ok"
        name = found.path.relative_to(directory).as_posix()
        typer.echo(f"{state}: {name} ({found.num_files} files)")
        for line in found.differences:
            typer.echo(f"  {line}")
    versions = sorted({line for found in checked for line in found.versions})
    if versions:
        typer.echo("made with other versions than are here:")
    for line in versions:
        typer.echo(f"  {line}")
    if any(found.differences for found in checked):
        raise typer.Exit(1)
