"""Run other programs; a program that fails is an error in words."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tuneline.errors import ToolError

NUM_LINES = 12
"""Last lines of a failed program's output that its error repeats."""


def output_of(
    command: Sequence[str | Path],
    *,
    where: Path | None = None,
    variables: Mapping[str, str] | None = None,
    text: str | None = None,
) -> str:
    """Return what a program writes to its standard output.

    Args:
        command: the program and its arguments.
        where: directory in which it runs; None: the present one.
        variables: environment variables besides those of this process.
        text: its standard input; None: it has none.

    Raises:
        ToolError: there is no such program, or it failed.
    """
    words = [str(part) for part in command]
    try:
        done = subprocess.run(
            words,
            cwd=where,
            env={**os.environ, **(variables or {})},
            input=text,
            stdin=subprocess.DEVNULL if text is None else None,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise ToolError(f"there is no program {words[0]} on the PATH: install it") from None
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()[-NUM_LINES:]
        raise ToolError(f"`{' '.join(words)}` failed ({done.returncode}):\n" + "\n".join(lines))
    return done.stdout


def run(command: Sequence[str | Path], *, where: Path, variables: Mapping[str, str]) -> None:
    """Run a program whose output the user sees.

    Args:
        command: the program and its arguments.
        where: directory in which it runs.
        variables: environment variables besides those of this process.

    Raises:
        ToolError: there is no such program, or it failed.
    """
    words = [str(part) for part in command]
    try:
        code = subprocess.run(
            words, cwd=where, env={**os.environ, **variables}, check=False
        ).returncode
    except FileNotFoundError:
        raise ToolError(f"there is no program {words[0]} on the PATH: install it") from None
    if code:
        raise ToolError(f"`{' '.join(words)}` failed ({code}); its messages are above")
