"""Run a program, or a function, in a process that ends with the step: no signal leaves it behind.

Python sees a signal only between its own instructions, and llama.cpp computes for minutes in one
call; raised where llama.cpp calls back into Python, to log a line, the exception would be lost.
"""

import contextlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from tuneline.errors import ToolError

STOPPED = ", and nothing of the export was kept: run it again"
"""What is said of SIGTERM, after that it came."""
CALL, ANSWER = "call.pickle", "answer.pickle"

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def call(
    function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result:
    """Call a module's function in a process of its own; what interrupts the wait ends it at once.

    Its log goes on standard error, and its temporary files are removed, however it ended.

    Raises:
        ToolError: the process ended without an answer: memory ran out, or llama.cpp gave up.
        Exception: what the function raised, with its traceback as a note.
    """
    level = logging.getLogger().getEffectiveLevel()
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, CALL).write_bytes(pickle.dumps((function, args, kwargs, level)))
        done = run_to_end(
            # -P: not to import what lies in the working directory.
            [sys.executable, "-P", "-m", "tuneline.quantize.child_main", scratch],
            cwd=Path.cwd(),
            env={**os.environ, "TMPDIR": scratch},
            captured=False,
        )
        answer = Path(scratch, ANSWER)
        if not answer.is_file():
            raise ToolError(_end(done.returncode))
        result, error = pickle.loads(answer.read_bytes())
    if error is not None:
        raise error
    return result


def run_to_end(
    command: list[str], *, cwd: Path, env: dict[str, str], captured: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a program in a session of its own; what interrupts the wait ends it and its children.

    Args:
        command: the program and its arguments.
        cwd: where it runs.
        env: all of its environment.
        captured: whether its output is returned; else it goes where the step's own goes.
    """
    output = subprocess.PIPE if captured else None
    with subprocess.Popen(
        command,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        text=True,
        errors="replace",
        # gptqmodel's progress bars ask the terminal questions; in a background job that stops it.
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # Popen does not wait at an interrupt, and the files it writes are removed next.
            process.wait()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _end(code: int) -> str:
    """Say how a process ended that gave no answer."""
    if code == -signal.SIGKILL:
        return (
            "the process that makes the export was killed, as the kernel does where memory runs "
            "out: give the step more (`tuneline plan` says how much it takes), and run it again"
        )
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
    return f"the process that makes the export ended {how}; its log above says why"
