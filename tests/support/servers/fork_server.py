"""KFP's local subprocess runner with a fork in place of a new interpreter for each task.

Most of the time of a small run is the import of torch and the libraries around it, once per task.
Here, one server process imports them, and each task is a fork of that process which does what KFP's
command does: it writes the component's source to a file and calls KFP's executor on it. Processes
that a step starts itself are started as in every run. One thing differs: `hide_torch` finds torch
imported already, and does nothing.
"""

import gc
import multiprocessing
import os
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

import pytest
from kfp.dsl.executor_main import executor_main
from kfp.local import config, subprocess_task_handler

IMPORTED = [
    # This module's own imports: the server of Python 3.11 does not search the tests' folders.
    *("pytest", "kfp.dsl.executor_main", "kfp.local"),
    *(f"tuneline.{step}.run" for step in ("fetch", "prepare", "train", "merge", "evaluate")),
    *("tuneline.train.trainer.trainers", "bitsandbytes"),
]
"""Modules that the server imports before the first task."""


def fork_tasks(patched: pytest.MonkeyPatch) -> None:
    """Let KFP's local subprocess runner fork its tasks until `patched` is undone."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED)
    # Now, because its environment is that of all processes that other tests fork from it later.
    forkserver.ensure_running()
    patched.setattr(subprocess_task_handler, "run_local_subprocess", _run_fork)
    # A component that is called after `local.init` runs as a task, in other tests too.
    patched.setattr(config.LocalExecutionConfig, "instance", None)


def _run_fork(full_command: list[str], env_vars: dict[str, str] | None = None) -> int:
    """Run the command `sh -ec SCRIPT SOURCE ARGUMENT ...` of a task, and return its exit code.

    The output of the task is printed, as KFP prints it.
    """
    source, *arguments = full_command[3:]
    environment = {**os.environ, **(env_vars or {}), "_KFP_RUNTIME": "true"}
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory, "ephemeral_component.py")
        program.write_text(source, encoding="utf-8")
        output = Path(directory, "output.txt")
        process = multiprocessing.get_context("forkserver").Process(
            target=_execute,
            args=(["--component_module_path", str(program), *arguments], environment, output),
        )
        process.start()
        process.join()
        print(output.read_text(encoding="utf-8"))
    assert process.exitcode is not None
    return process.exitcode


def _execute(arguments: list[str], environment: dict[str, str], output: Path) -> None:
    # Without this, collections of garbage would copy the memory that the process shares.
    gc.freeze()
    os.environ.clear()
    os.environ.update(environment)
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv[1:] = arguments
    executor_main()
