"""The command that proposes a recipe for rows."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from tuneline.errors import UserError
from tuneline.gpu_profiles import GPU_PROFILES
from tuneline.pipelines.catalog import parse_assignments
from tuneline.pipelines.cli.options import SetOption
from tuneline.pipelines.cli.run import PANEL
from tuneline.pipelines.cli.terminal import say
from tuneline.pipelines.init.machine import node_of, this_machine
from tuneline.runtime.torch_free import hide_torch

app = typer.Typer()


@app.command(rich_help_panel=PANEL)
def init(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Rows to learn from: a file, a directory, a glob, a Hub ID, or an address in a "
            "store.",
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Base model: a Hub ID, a directory, a .gguf file or builtin:smollm2-135m.",
            show_default="what fits this machine",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Recipe to write; an existing file is never overwritten.",
            show_default="NAME.yaml, beside the data",
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="PROFILE",
            help="Propose for a cluster with this kind of GPU instead of for this machine: "
            f"{', '.join(GPU_PROFILES)}.",
        ),
    ] = None,
    columns: Annotated[
        list[str],
        typer.Option(
            metavar="OURS=YOURS",
            help="What the columns hold, e.g. prompt=question,completion=answer. Can be repeated.",
            show_default="by names and contents",
        ),
    ] = [],  # noqa: B006, typer copies it
    set_: SetOption = [],  # noqa: B006
) -> None:
    """Look at rows, and write a commented recipe for them that runs as it stands."""
    if profile is not None and profile not in GPU_PROFILES:
        raise UserError(f"--profile {profile} is unknown: choose one of {', '.join(GPU_PROFILES)}")
    given = parse_assignments(set_)
    if columns:
        given["prepare.columns"] = _parse_columns(columns)
    machine = this_machine() if profile is None else node_of(profile)
    say(f"machine: {machine}")
    hide_torch()  # Before the next imports, which import transformers.
    # Imported here only, because transformers and pyarrow take seconds.
    from tuneline.pipelines.init.write import init as write_recipe
    from tuneline.pipelines.init.write import output_for

    path = output_for(data, output)
    proposed = write_recipe(data, path, machine, base_model=base, given=given)
    for line in proposed.sentences():
        say(line)
    say(f"\nwrote {path.absolute()}; next:")
    name = shlex.quote(str(path))
    commands = {
        f"tuneline plan {name}": "checks model, data and target; estimates time and memory",
        f"tuneline run {name}": "trains and measures; Ctrl-C says how to go on",
        "tuneline chat RUN": "talks to the model; RUN is the directory that run prints",
    }
    if machine.is_elsewhere:
        if "placement.registry" not in given:
            say(
                "  first set placement.registry: the registry of the images, or local if the nodes "
                "have them"
            )
        commands = {
            f"tuneline plan {name} --cluster": "checks model, data, memory, and the cluster",
            f"tuneline submit {name}": "starts a run on the cluster",
        }
    width = max(map(len, commands))
    for command, what in commands.items():
        say(f"  {command.ljust(width)}  # {what}")


def _parse_columns(texts: list[str]) -> dict[str, Any]:
    columns = {}
    for pair in (pair for text in texts for pair in text.split(",")):
        ours, equals, theirs = (part.strip() for part in pair.partition("="))
        if not (ours and equals and theirs):
            raise UserError(
                f"--columns {pair}: write OURS=YOURS, e.g. --columns prompt=question; a column "
                "whose name has a comma goes into --set 'prepare.columns={...}'"
            )
        columns[ours] = theirs
    return columns
