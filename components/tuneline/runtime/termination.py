"""What a step leaves behind when it ends: a few lines of JSON in its container's termination log.

Kubernetes copies the file /dev/termination-log into the status of the pod when the container ends.
Argo repeats the text in the message of the workflow's node, and KFP's UI shows that message. So the
cause of a failure is known to everyone who can read a pod, also after the log is gone:

    {"step": "prepare", "error": "DataError", "text": "31 of 90 rows were rejected", "advice": ...}
    {"step": "gate", "text": "heldout_exact +0.012 ...: the interval includes 0", "result": "hold"}
    {"step": "merge", "result": "finished"}

If a failed container left "started", then the step was killed; if "finished", then KFP's launcher
could not store the step's outputs; if nothing, then the step never began.

The file exists only in a pod. The kubelet keeps the last 4096 bytes of the file of a container, and
of each container's text only the first 12 KiB / number of containers (a pod of KFP has four, more
with a service mesh), so this module writes at most `MAX_BYTES`.
"""

import contextlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from tuneline.pods import POD_NAME_VARIABLE
from tuneline.runtime.printable import printable
from tuneline.runtime.redaction import redacted

TERMINATION_LOG = "/dev/termination-log"
PATH_VARIABLE = "TUNELINE_TERMINATION_LOG"
"""Environment variable with another path of the termination log, for tests."""
STARTED, FINISHED = "started", "finished"
"""Results of a step that runs, and of a step that has ended and has no other result."""
MAX_BYTES = 2000
"""Longest termination message; a pod with six containers keeps 2048 bytes of each."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """What a step left behind: an error with advice, or a result."""

    step: str
    text: str = ""
    """One or two sentences."""
    error: str = ""
    """Class name of the error; "" if the step succeeded."""
    advice: str = ""
    """What to change after an error."""
    result: str = ""
    """Short result of a step that succeeded, e.g. the verdict of the gate."""
    scores: str = ""
    """Scores of the report, as JSON."""


def leave(ending: Ending) -> None:
    """Write the termination message of this container, in a pod of KFP; elsewhere do nothing."""
    path = _path()
    if path is not None:
        # A message is an aid: a step never fails because of it.
        with contextlib.suppress(OSError):
            path.write_text(encode(ending), encoding="utf-8")


def leave_finished(step: str) -> None:
    """Leave that a step has finished, unless it has already left a result."""
    path = _path()
    if path is not None:
        with contextlib.suppress(OSError):
            left = decode(path.read_text(encoding="utf-8", errors="replace"))
            if left is None or left.result == STARTED:
                leave(Ending(step=step, result=FINISHED))


def _path() -> Path | None:
    path = Path(os.environ.get(PATH_VARIABLE) or TERMINATION_LOG)
    return path if os.environ.get(POD_NAME_VARIABLE) and path.is_file() else None


def encode(ending: Ending) -> str:
    """Return an ending as JSON of at most `MAX_BYTES` bytes, without secrets."""
    # Cut before, because redacting megabytes would take long; `MAX_BYTES` cuts again.
    values = {
        key: printable(redacted(value[: 5 * MAX_BYTES]))
        for key, value in asdict(ending).items()
        if value
    }
    # Scores that are cut would not be JSON.
    if len(_json(values).encode()) > MAX_BYTES:
        values.pop("scores", None)
    # The advice is cut first, because the text names the cause.
    for key in ("advice", "text", "result", "error", "step"):
        excess = len(_json(values).encode()) - MAX_BYTES
        if excess > 0 and key in values:
            values[key] = _shortened(values[key], excess)
    return _json(values)


def decode(message: str | None) -> Ending | None:
    """Return the ending in the message of a pod or of a workflow's node, or None if it has none.

    Argo writes its own words in front: `main: Error (exit code 1): {...}`.
    """
    match = re.search(r"\{.*\}", message or "", re.DOTALL)
    if match is None:
        return None
    try:
        values = json.loads(match[0])
    except ValueError:
        return None
    known = {name: values.get(name, "") for name in Ending.__dataclass_fields__}
    if not known["step"] or not all(isinstance(value, str) for value in known.values()):
        return None
    return Ending(**known)


def _json(values: dict[str, str]) -> str:
    return json.dumps(values, ensure_ascii=False)


def _shortened(text: str, excess: int) -> str:
    """Return the text with its end replaced by "...", so that its JSON is `excess` bytes shorter.

    JSON writes some characters with more bytes than UTF-8 has: a quote with 2, a control with 6.
    """
    saved, kept = -len("..."), len(text)
    while saved < excess and kept > 0:
        kept -= 1
        saved += len(json.dumps(text[kept], ensure_ascii=False).encode()) - len('""')
    return text[:kept] + "..."
