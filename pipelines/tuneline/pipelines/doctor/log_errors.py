"""Find the error that ended a step in the step's log.

KFP's launcher and Argo's executor write into the same log: configuration, paths, states and the
launcher's own remarks. So a line counts only if it has the form of an error: the line that
runtime/step.py prints for a known error, the last line of a Python traceback, NCCL's watchdog, or
what the launcher or the driver says about the end of its program.
"""

import re

from tuneline.pipelines.doctor.finding import BY_NAME, Finding, finding
from tuneline.runtime.failures.cause_table import Cause
from tuneline.runtime.failures.causes import OWN_ERRORS, RUN_AGAIN, find_cause
from tuneline.runtime.secrets import mask_within

_EXECUTOR = r"\[KFP Executor [\d :,-]+ \w+\]: "
_RANK = r"\[rank\d+\]: ?"
_PREFIX = re.compile(rf"^(?:{_EXECUTOR})?(?:{_RANK})?")
"""What stands before a line of the step: KFP's executor and torch's ranks."""
_OWN = re.compile(rf"^[a-z][a-z-]*(?: [\w.-]+)?: ({'|'.join(sorted(OWN_ERRORS))}): (.+)$")
_TRACEBACK = "Traceback (most recent call last):"
_CHAINS = (
    "During handling of the above exception, another exception occurred:",
    "The above exception was the direct cause of the following exception:",
)
_WATCHDOG = re.compile(
    r"^\[rank\d+\]:.*(Watchdog caught collective operation timeout|ncclSystemError"
    r"|ncclInternalError|ncclRemoteError|NCCL error)"
)
_ENDED = re.compile(
    r"^[EF]\d{4} [\d:.]+ +\d+ launcher_v2\.go:\d+\] "
    r"(Component failed to execute successfully: .+)$"
)
_DRIVER = re.compile(r"^F\d{4} [\d:.]+ +\d+ main\.go:\d+\] (KFP driver: .+)$")
NCCL = Cause(
    "nccl",
    "",
    "The GPUs lost their connection to each other.",
    "Set a larger placement.shared_memory. If the error returns, look for an earlier error of "
    "another rank, and for a GPU that reports errors (nvidia-smi -q).",
)
_RAISED = "Read the traceback in the step's log, and report it together with the recipe if the "
_RAISED += "recipe is correct."


def find_error(step: str, log: str) -> Finding | None:
    """Return the error that ended a step; None if its log has none.

    Args:
        step: name of the step.
        log: the log, or its end.
    """
    lines = log.splitlines()
    own = [match for line in lines if (match := _OWN.match(_PREFIX.sub("", line)))]
    if own:
        kind, message = own[-1][1], mask_within(own[-1][2])
        return Finding(step, kind, message, f"{kind}: {message}", RUN_AGAIN)
    raised = _raised(lines)
    for error in raised:
        cause = find_cause(error)
        if cause is not None:
            return finding(step, cause, error)
    watched = [line for line in lines if _WATCHDOG.match(line)]
    if watched:
        return finding(step, NCCL, watched[0])
    if raised:
        kind = raised[-1].partition(":")[0].rpartition(".")[2]
        why = "The step raised an error that tuneline does not know."
        return finding(step, Cause(kind, "", why, _RAISED), raised[-1])
    return _from_kfp(step, lines)


def _raised(lines: list[str]) -> list[str]:
    """Return the errors of the traceback that counts, the first of a chain first.

    That is the last one, because others may have been caught. Of several ranks it is the first,
    because the others fail when they lose that rank.
    """
    chains: list[list[str]] = []
    inside = is_chained = has_ranks = False
    for line in lines:
        text = _PREFIX.sub("", line).rstrip()
        if text.endswith(_TRACEBACK):
            inside = True
            has_ranks = has_ranks or bool(re.match(_RANK, line))
            if not is_chained:
                chains.append([])
        elif text.endswith(_CHAINS):
            is_chained = True
        elif inside and text and not text.startswith((" ", "\t")):
            inside = is_chained = False
            chains[-1].append(text)
    found = [chain for chain in chains if chain]
    return found[0 if has_ranks else -1] if found else []


def _from_kfp(step: str, lines: list[str]) -> Finding | None:
    """Return what the launcher or the driver says about the end of its program."""
    for line in reversed(lines):
        driver = _DRIVER.match(line)
        if driver:
            cause = find_cause(driver[1])
            why = "KFP could not start the step."
            return finding(step, cause or Cause("driver", "", why, "Read the message."), driver[1])
        ended = _ENDED.match(line)
        if ended and ended[1].endswith(("signal: killed", "exit status 137")):
            return finding(step, BY_NAME["host memory"], ended[1])
        if ended and ended[1].endswith(("signal: terminated", "exit status 143")):
            return finding(step, BY_NAME["terminated"], ended[1])
    return None
