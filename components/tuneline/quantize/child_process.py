"""Run a function or a program in a child process that never outlives the step.

Python handles a signal only between Python instructions, but one call of llama.cpp computes for
minutes. If the signal were handled where llama.cpp calls back into Python to log a line, the
exception of the signal handler would be lost. The step's process therefore only waits, in Python,
and kills the child process when the step is interrupted.

`call` starts the child process as `python -m tuneline.quantize.child_process DIRECTORY`.
"""

import contextlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from tuneline.errors import ToolError
from tuneline.runtime.scratch import scratch_directory
from tuneline.runtime.signals import deferred_signals

ADVICE_ON_SIGTERM = ", and nothing of the export was kept: run it again"
"""End of the error message of a step that SIGTERM stopped."""

_CALL, _ANSWER = "call.pickle", "answer.pickle"

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def call(
    function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result:
    """Call a module-level function in a child process and return its result.

    An exception in the parent process, such as an interrupt, kills the child at once. The child
    logs to standard error. The child's temporary files are removed, however the child ends.

    Raises:
        ToolError: the child ended without a result: it ran out of memory, or llama.cpp aborted.
        Exception: the exception that the function raised, with the child's traceback as a note.
    """
    level = logging.getLogger().getEffectiveLevel()
    with scratch_directory() as scratch:
        (scratch / _CALL).write_bytes(pickle.dumps((function, args, kwargs, level)))
        done = run_to_end(
            # -P: the child must not import modules from the working directory.
            [sys.executable, "-P", "-m", "tuneline.quantize.child_process", str(scratch)],
            cwd=Path.cwd(),
            env={**os.environ, "TMPDIR": str(scratch)},
            captured=False,
        )
        answer = scratch / _ANSWER
        if not answer.is_file():
            raise ToolError(_describe_end(done.returncode))
        result: Result
        result, error = pickle.loads(answer.read_bytes())
    if error is not None:
        raise error
    return result


def run_to_end(
    command: list[str], *, cwd: Path, env: dict[str, str], captured: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a program in its own session; an exception during the wait kills the whole session.

    Args:
        command: the program and its arguments.
        cwd: the working directory.
        env: the whole environment of the program.
        captured: whether to return the program's output; otherwise it goes to the step's output.
    """
    output = subprocess.PIPE if captured else None
    process: subprocess.Popen[str] | None = None
    try:
        # If a signal interrupted the start, the program could keep running with an unknown ID.
        with deferred_signals():
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                text=True,
                errors="replace",
                # In a session without a terminal: gptqmodel's progress bars would query the
                # terminal, and a background job that does so is stopped.
                start_new_session=True,
            )
        out, err = process.communicate()
    except BaseException:
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # Wait until the child has ended, because its files are removed next. Popen itself does
            # not wait after an interrupt.
            process.wait()
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _describe_end(code: int) -> str:
    """Return the error message for a child that ended with `code` and wrote no result."""
    if code == -signal.SIGKILL:
        return (
            "the process that makes the export was killed, which is what the kernel does when "
            "memory runs out: give the step more memory (`tuneline plan` estimates how much it "
            "needs), and run it again"
        )
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
    return f"the process that makes the export ended {how}; its log above says why"


def _answer(directory: Path) -> None:
    """Call the function that is pickled in `directory`, and write its result or error there."""
    function, args, kwargs, level = pickle.loads((directory / _CALL).read_bytes())
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    result, raised = None, None
    try:
        result = function(*args, **kwargs)
    except Exception as error:
        error.add_note(traceback.format_exc())
        raised = error
    answer = pickle.dumps((result, raised))
    # Some exceptions cannot be unpickled. If so, fail here, so that the log has the traceback.
    pickle.loads(answer)
    (directory / _ANSWER).write_bytes(answer)


if __name__ == "__main__":
    _answer(Path(sys.argv[1]))
