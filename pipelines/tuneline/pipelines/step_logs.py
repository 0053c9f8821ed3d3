"""Find the logs of a step: of pods that exist in Kubernetes, of others in KFP's archive."""

import time
from collections.abc import Iterator
from typing import Any

from tuneline.errors import UserError
from tuneline.pipelines.kfp_client.connection import readable_errors
from tuneline.pipelines.kfp_client.progress import Progress
from tuneline.pipelines.run_view import RunView
from tuneline.runtime.kfp_run import Attempt

CONTAINER = "main"
"""Name of the container that runs a step."""
POLL_SECONDS = 3.0


def choose(view: RunView, words: str) -> list[Progress]:
    """Return the steps of a name: the name as in `status`, or its first or last words.

    Raises:
        UserError: no step of the run has that name.
    """
    names = [step.name for step in view.steps]
    for chosen in (
        [step for step in view.steps if step.name == words],
        [step for step in view.steps if step.name.startswith(f"{words} ")],
        [step for step in view.steps if step.name.endswith(f" {words}")],
    ):
        if chosen:
            return chosen
    raise UserError(
        f"run {view.name} has no step '{words}': it has {', '.join(names) or 'none yet'}"
    )


def read(view: RunView, client: Any, attempt: Attempt, *, lines: int | None = None) -> str | None:
    """Return the log of an attempt; None if neither Kubernetes nor KFP has it.

    Args:
        view: the run.
        client: connection to KFP's API; None: it is out of reach.
        attempt: the attempt.
        lines: number of lines at the end of the log; None: the whole log.
    """
    if not attempt.pod:
        return None
    text = None
    if view.kube is not None and any(pod["metadata"]["name"] == attempt.pod for pod in view.pods):
        text = view.kube.log(attempt.pod, CONTAINER, lines=lines)
    if text is None and client is not None:
        with readable_errors():
            text = client.read_log(view.run_id, attempt.pod)
        if text is not None and lines is not None:
            text = "\n".join(text.splitlines()[-lines:])
    return text


def follow(look: Any, step: Progress) -> Iterator[str]:
    """Yield the lines of a step's log as they are written, over all its attempts.

    Args:
        look: function that reads the run again and returns its view.
        step: the step to follow.

    Raises:
        UserError: Kubernetes is out of reach, or the step did not run.
    """
    told: set[str] = set()
    while True:
        view: RunView = look()
        if view.kube is None:
            raise UserError(
                "--follow needs Kubernetes, because KFP has the logs of ended pods only: set "
                "KUBECONFIG, or leave --follow out"
            )
        now = next(each for each in view.steps if each.name == step.name)
        new = [each for each in now.attempts if each.pod not in told and each.state != "waiting"]
        for attempt in new:
            if told:
                yield heading(attempt)
            yield from view.kube.follow(attempt.pod, CONTAINER)
            told.add(attempt.pod)
        if now.state not in ("waiting", "running") or (view.has_ended and not new):
            return
        if not new:
            time.sleep(POLL_SECONDS)


def heading(attempt: Attempt) -> str:
    """Return the line that stands over the log of an attempt."""
    state = attempt.state + (f", {attempt.reason}" if attempt.reason else "")
    return f"--- {attempt.step}, attempt {attempt.number} ({state}): {attempt.pod}"
