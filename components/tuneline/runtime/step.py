"""The frame that every step runs in, as a KFP component or from the command line.

Known errors become one sentence on stderr and an exit code; nobody has to read a traceback for
a full disk. What happened is appended to the file that the environment variable TUNELINE_EVENTS
names, one JSON object a line, where a runner or a shared volume offers one:

    {"step": "train", "event": "started", "time": 1732400000.0}
    {"step": "train", "event": "progress", "time": ..., "done": 10, "total": 60, "note": "loss 1.2"}
    {"step": "train", "event": "finished", "time": ..., "seconds": 81.2}
    {"step": "train", "event": "failed", "time": ..., "seconds": 3.1, "kind": "DataError",
     "message": "..."}
"""

import argparse
import contextlib
import errno
import inspect
import json
import logging
import os
import sys
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tuneline.errors import StorageError, TunelineError
from tuneline.strict_model import StrictModel

EVENTS_VARIABLE = "TUNELINE_EVENTS"


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Run the body as the step `name`.

    Raises:
        SystemExit: after a known error was said in one sentence; other errors pass through.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    started = time.time()
    emit(name, "started")
    try:
        yield
    except Exception as raw:
        error = _known(raw)
        emit(
            name,
            "failed",
            seconds=time.time() - started,
            kind=type(error).__name__,
            message=str(error),
        )
        if not isinstance(error, TunelineError):
            raise
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None
    emit(name, "finished", seconds=time.time() - started)


def emit(name: str, event: str, **values: Any) -> None:
    """Append one event, where a file for them is named; otherwise do nothing."""
    path = os.environ.get(EVENTS_VARIABLE)
    if not path:
        return
    line = json.dumps({"step": name, "event": event, "time": time.time(), **values})
    # One write of one short line: appends of several processes do not mix.
    with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as events:
        events.write(line + "\n")


def log_metrics(artifact: Any, values: dict[str, float]) -> None:
    """Log numbers on a KFP Metrics artifact, and write them to its file as JSON.

    KFP needs only the metadata; but its local cache takes an output without a file for one that
    was lost, and runs the step again.
    """
    for name, value in values.items():
        artifact.log_metric(name, value)
    Path(artifact.path).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def main(
    name: str,
    config: type[StrictModel],
    run: Callable[..., Any],
    argv: list[str] | None = None,
) -> None:
    """Run a step from the command line: `python -m tuneline.NAME --config FILE ...`.

    The flags are the keyword-only parameters of `run` with `_dir` and `_path` left off; a
    parameter annotated `list[...]` takes several values.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m tuneline.{name}", description=inspect.getdoc(run)
    )
    parser.add_argument(
        "--config", help=f"a JSON file with a {config.__name__}; default: all defaults"
    )
    hints = typing.get_type_hints(run)
    destinations = {}
    for parameter in inspect.signature(run).parameters.values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        flag = parameter.name.removesuffix("_dir").removesuffix("_dirs").removesuffix("_path")
        many = typing.get_origin(hints[parameter.name]) is list
        required = parameter.default is inspect.Parameter.empty
        parser.add_argument(
            f"--{flag.replace('_', '-')}",
            dest=parameter.name,
            required=required,
            default=None if required else parameter.default,
            **({"nargs": "*"} if many else {}),
        )
        destinations[parameter.name] = parameter
    values = vars(parser.parse_args(argv))
    with step(name):
        path = values.pop("config")
        text = Path(path).read_text(encoding="utf-8") if path else "{}"
        run(config.parse(text, where=path or ""), **values)


def _known(error: Exception) -> Exception:
    """Turn an operating system's error that has a plain cause into a sentence."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" while writing {cause.filename}" if cause.filename else ""
            return StorageError(
                f"the disk is full{where}: free some space or give the step a larger volume "
                "(ephemeral-storage), then run it again; finished artifacts are whole"
            )
        # Rust writers (safetensors) carry the number only in their text.
        if "os error 28" in str(cause).lower() or "no space left on device" in str(cause).lower():
            return StorageError(
                "the disk is full: free some space or give the step a larger volume "
                "(ephemeral-storage), then run it again; finished artifacts are whole"
            )
        cause = cause.__cause__ or cause.__context__
    return error
