"""The command line `tuneline`; each panel of its help is a module of this package."""

import errno
import sys
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from tuneline.errors import TunelineError, WorldError
from tuneline.pipelines.cli import (
    chat,
    checks,
    cluster,
    compare,
    doctor,
    init,
    listing,
    recipes,
    run,
    runs,
    serve,
)
from tuneline.runtime.printable import printable
from tuneline.version import VERSION

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(init.app)
app.add_typer(run.app)
app.add_typer(listing.app)
app.add_typer(chat.app)
app.add_typer(compare.app)
app.add_typer(recipes.app)
app.add_typer(checks.app)
app.add_typer(cluster.app)
app.add_typer(runs.app)
app.add_typer(serve.app)
app.add_typer(doctor.app)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tuneline {VERSION}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Fine-tune, check and publish language models with Kubeflow Pipelines."""


def main() -> None:
    """Run the command line; print a known error as one message and exit with its code."""
    try:
        app()
    except TunelineError as error:
        _exit(str(error), error.exit_code)
    except OSError as error:
        # Of a copy, the second file is the one that is written.
        name = error.filename2 or error.filename
        if name is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        # A path that the user gave is missing, read-only or on a full disk.
        where = f"{name}: " if name is not None else ""
        _exit(f"{where}{error.strerror}", WorldError.exit_code)


def _exit(message: str, exit_code: int) -> NoReturn:
    console = Console(stderr=True, emoji=False)
    text = f"error: {printable(message)}"
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
