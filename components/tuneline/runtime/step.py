"""The wrapper in which every step runs, as a KFP component or from the command line.

The wrapper turns known errors into one sentence on stderr and an exit code, so that nobody has to
read a traceback because a disk is full. If the environment variable TUNELINE_EVENTS names a file,
events are appended to that file, one JSON object per line:

    {"step": "train", "event": "started", "time": 1732400000.0}
    {"step": "train", "event": "progress", "time": ..., "done": 10, "total": 60, "note": "loss 1.2"}
    {"step": "train", "event": "finished", "time": ..., "seconds": 81.2}
    {"step": "train", "event": "failed", "time": ..., "seconds": 3.1, "kind": "DataError",
     "message": "..."}

The events of a step that runs several times also have "part", e.g. the model that is evaluated.

In a pod of KFP, the wrapper also leaves the cause of a failure as the container's termination
message (termination.py).
"""

import argparse
import contextlib
import errno
import inspect
import json
import logging
import os
import re
import sys
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tuneline.errors import StorageError, TunelineError
from tuneline.runtime.environment import check_versions
from tuneline.runtime.events import StepRun
from tuneline.runtime.failures.causes import explain
from tuneline.runtime.parameter_text import encode_text
from tuneline.runtime.printable import printable
from tuneline.runtime.redaction import redact_logs, redacted
from tuneline.runtime.termination import STARTED, Ending, leave, leave_finished
from tuneline.seals import sealed_json
from tuneline.strict_model import StrictModel

EVENTS_VARIABLE = "TUNELINE_EVENTS"
"""Environment variable with the path of the events file."""


_part = ""
"""What the step of this process is about."""


@contextlib.contextmanager
def step(name: str, part: str = "") -> Iterator[None]:
    """Run the body as the step `name`.

    Args:
        name: name of the step.
        part: what the step is about if a run has several of it, e.g. the model it evaluates.

    Raises:
        SystemExit: a known error occurred and was printed; other errors are raised unchanged.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    redact_logs()
    global _part
    _part = part
    started = time.monotonic()
    emit(name, "started")
    leave(Ending(step=name, result=STARTED))
    try:
        check_versions(name)
        yield
    except Exception as raw:
        error = _as_known_error(raw)
        # First of all, because after SIGTERM the process may have only milliseconds left.
        leave(_ending(name, error))
        emit(
            name,
            "failed",
            seconds=time.monotonic() - started,
            kind=type(error).__name__,
            message=redacted(str(error)),
        )
        if not isinstance(error, TunelineError):
            raise
        text = printable(redacted(f"{name}: {type(error).__name__}: {error}"))
        print(text, file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None
    leave_finished(name)
    emit(name, "finished", seconds=time.monotonic() - started)


def emit(name: str, event: str, **values: Any) -> None:
    """Append an event to the events file, if the environment names one."""
    path = os.environ.get(EVENTS_VARIABLE)
    if not path:
        return
    # What reads the events shows their texts on a terminal.
    values = {key: printable(v) if isinstance(v, str) else v for key, v in values.items()}
    about = {"part": _part} if _part else {}
    line = json.dumps({"step": name, **about, "event": event, "time": time.time(), **values})
    # Each event is a single write of a short line, so that lines of several processes do not mix.
    with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as events:
        events.write(line + "\n")


def log_metrics(artifact: Any, values: dict[str, float]) -> None:
    """Log numbers on a KFP Metrics artifact and write them to its file as JSON.

    KFP reads only the metadata. The file is for KFP's local cache, which runs a step again if the
    file of an output is missing, and for `tuneline verify`.
    """
    for name, value in values.items():
        artifact.log_metric(name, value)
    Path(artifact.path).write_text(sealed_json(values), encoding="utf-8")


def set_metadata(artifact: Any, **values: Any) -> None:
    """Set metadata of an output of a KFP component.

    KFP passes the metadata to the steps that get the artifact, so texts are written as in
    parameters.
    """
    artifact.metadata.update(
        {
            name: encode_text(value) if isinstance(value, str) else value
            for name, value in values.items()
        }
    )


def main(
    name: str,
    config: type[StrictModel],
    run: Callable[..., Any],
    argv: list[str] | None = None,
) -> None:
    """Run a step from the command line: `python -m tuneline.NAME --config FILE ...`.

    Each keyword-only parameter of `run` becomes a flag, whose name lacks the ending `_dir`, `_dirs`
    or `_path`. A parameter annotated `list[...]` becomes a flag that takes several values. The help
    is the docstring of `run`.

    Args:
        name: the step's name.
        config: the step's config class.
        run: the step's function, with a Google-style docstring; its first argument is the config.
        argv: command line arguments; None: those of the process.
    """
    description, help_of = _parse_docstring(run)
    parser = argparse.ArgumentParser(
        prog=f"python -m tuneline.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parameters = inspect.signature(run).parameters
    has_defaults = not any(field.is_required() for field in config.model_fields.values())
    parser.add_argument(
        "--config",
        metavar="FILE",
        help=f"JSON file: {help_of.get(next(iter(parameters)), '')}"
        + (" Default: the default of every key." if has_defaults else ""),
    )
    hints = typing.get_type_hints(run)
    for parameter in parameters.values():
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
            help=help_of.get(parameter.name),
            **({"nargs": "*"} if many else {}),
        )
    values = vars(parser.parse_args(argv))
    with step(name):
        path = values.pop("config")
        text = Path(path).read_text(encoding="utf-8") if path else "{}"
        run(config.parse(text, where=path or ""), **values)


def _parse_docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """Return the description of a Google-style docstring, and argparse's help per argument."""
    docstring = inspect.getdoc(function) or ""
    description, *sections = re.split(r"^(\w+):\n", docstring, flags=re.MULTILINE)
    arguments = dict(zip(sections[::2], sections[1::2], strict=True)).get("Args", "")
    items = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", arguments, flags=re.MULTILINE)
    return description.strip(), {
        # argparse would replace formats such as %(default)s, so % is doubled.
        name: " ".join(text.split()).replace("%", "%%")
        for name, text in items
    }


def _ending(name: str, error: Exception) -> Ending:
    """Return what a failed step leaves behind."""
    kind = type(error).__name__
    if isinstance(error, TunelineError):
        # Its message states what to do.
        return Ending(step=name, error=kind, text=str(error))
    explained = explain(StepRun(name, 0, "failed", kind=kind, message=str(error)))
    return Ending(step=name, error=kind, text=explained.cause, advice=explained.advice)


def _as_known_error(error: Exception) -> Exception:
    """Return a StorageError if a full disk caused the error, otherwise the error itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            # Of a copy, the second file is the one that is written.
            written = cause.filename2 or cause.filename
            return _full_disk(f" while writing {written}" if written else "")
        # Libraries written in Rust (safetensors) give the error number only in their message.
        if "os error 28" in str(cause).lower() or "no space left on device" in str(cause).lower():
            return _full_disk()
        cause = cause.__cause__ or cause.__context__
    return error


def _full_disk(where: str = "") -> StorageError:
    return StorageError(
        f"the disk is full{where}: free some space or give the step a larger volume "
        "(ephemeral-storage), then run it again; finished artifacts are complete"
    )
