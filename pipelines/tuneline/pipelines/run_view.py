"""Join what KFP's API and Kubernetes say about the steps of a run.

KFP's API knows every step that the pipeline has, keeps its records, and reads logs that Argo
archived. Kubernetes knows why a pod failed or waits and has the logs of running pods, but KFP
deletes the pods and the workflow of a run one hour after its end. Either may be out of reach.
"""

import datetime
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from tuneline.errors import ClusterError, CredentialsError, StoppedError, UserError
from tuneline.pipelines.kfp_client.progress import (
    UNTIMED,
    Progress,
    State,
    in_order,
    is_frozen,
    progress_of,
    state_of,
)
from tuneline.pipelines.kfp_client.runs import pipeline_of
from tuneline.pipelines.kube import Kube
from tuneline.pipelines.kube_api import Refused
from tuneline.pods import RUN_LABEL
from tuneline.runtime.kfp_run import Attempt, is_cancelled, read_attempts

CONNECT_SECONDS = 3.0
"""Time after which Kubernetes counts as out of reach if nothing requires it."""

STOPPED = StoppedError.__name__

_STATES: dict[str, State] = {
    "waiting": "waiting",
    "running": "running",
    "succeeded": "succeeded",
    "failed": "failed",
    "cached": "from cache",
    "skipped": "skipped",
}


@dataclass(frozen=True)
class RunView:
    """A run and its steps."""

    run_id: str
    name: str
    state: str
    """State in one word, e.g. failed or cancelled; "unknown" if nothing is left of the run."""
    steps: list[Progress]
    pods: list[dict[str, Any]] = field(default_factory=list)
    """Pods of the run that Kubernetes has."""
    workflow: dict[str, Any] | None = None
    is_frozen: bool = False
    """Whether KFP stopped recording the steps before the run ended."""
    kube: Kube | None = None
    """Where the pods were read; None if Kubernetes is out of reach."""

    @property
    def has_ended(self) -> bool:
        """Return whether no step runs any more."""
        return self.state in ("succeeded", "failed", "cancelled", "skipped")

    @property
    def is_deleted(self) -> bool:
        """Return whether Kubernetes answers but has nothing of the run any more."""
        return self.kube is not None and not self.pods and self.workflow is None


def find_kube(namespace: str | None, context: str | None) -> Kube | None:
    """Return the Kubernetes API of the kubeconfig or the pod; None if there is none in reach.

    Raises:
        UserError: `context` was given and cannot be used.
    """
    try:
        kube = Kube(namespace or "kubeflow", context=context)
    except UserError:
        if context is not None:
            raise
        return None
    return kube if kube.answers(CONNECT_SECONDS) else None


def view(run_id: str, *, client: Any = None, run: Any = None, kube: Kube | None = None) -> RunView:
    """Read a run.

    Args:
        run_id: ID of the run.
        client: connection to KFP's API; None: it is out of reach.
        run: the run as the API returned it; None with `client`.
        kube: connection to Kubernetes; None: it is out of reach.

    Raises:
        CredentialsError: KFP's API is out of reach, and these credentials may not list pods.
    """
    steps = progress_of(run, pipeline_of(client, run)) if run is not None else []
    pods: list[dict[str, Any]] = []
    workflow = None
    if kube is not None:
        try:
            pods = kube.pods(f"{RUN_LABEL}={run_id}")
            workflow = _workflow(kube, run_id)
        except (CredentialsError, ClusterError):
            if run is None:
                raise
            kube = None
    cancelled = workflow is not None and is_cancelled(workflow)
    steps = joined(steps, read_attempts(pods, workflow), cancelled=cancelled)
    name = run.display_name if run is not None else run_id
    state = state_of(run) if run is not None else _state_of_workflow(workflow, cancelled)
    frozen = run is not None and workflow is None and is_frozen(run)
    return RunView(run_id, name, state, steps, pods, workflow, frozen, kube)


def joined(
    steps: list[Progress], attempts: Iterable[Attempt], *, cancelled: bool = False
) -> list[Progress]:
    """Return the steps with what Kubernetes says about their attempts.

    Args:
        steps: the steps, as KFP's API knows them.
        attempts: the attempts, as Kubernetes knows them.
        cancelled: whether the workflow says that the run was cancelled.
    """
    seen: dict[str, list[Attempt]] = {}
    for attempt in attempts:
        if attempt.state != "unknown":
            seen.setdefault(attempt.step, []).append(attempt)
    found = [_join(step, seen.pop(step.name, []), cancelled) for step in steps]
    found += [_join(Progress(name, "waiting"), each, cancelled) for name, each in seen.items()]
    return in_order(found)


def _join(step: Progress, seen: list[Attempt], cancelled: bool) -> Progress:
    if not seen:
        return step
    by_pod = {attempt.pod: attempt for attempt in step.attempts}
    by_pod |= {attempt.pod: attempt for attempt in seen if attempt.pod}
    attempts = [replace(each, number=n) for n, each in enumerate(by_pod.values(), start=1)]
    last = seen[-1]
    state = _STATES[last.state]
    kind = last.ending.error if last.ending is not None else ""
    # A step that failed by itself before the run was cancelled has left its own error.
    if state == "failed" and (step.state == "cancelled" or cancelled) and kind in ("", STOPPED):
        state = "cancelled"
    if state == "waiting" and step.state == "not started":
        # Kubernetes keeps the driver's pod, but not that the run has ended.
        state = step.state
    # A step that waits may have a reason without a pod: a quota that refuses the pod.
    attempts = attempts if attempts or not last.reason else [last]
    started = next((each.started for each in seen if each.started), "")
    if state in UNTIMED or not started:
        return replace(step, state=state, attempts=tuple(attempts))
    return Progress(step.name, state, tuple(attempts), _time(started), _time(last.ended))


def _workflow(kube: Kube, run_id: str) -> dict[str, Any] | None:
    try:
        return next(iter(kube.workflows(f"{RUN_LABEL}={run_id}")), None)
    except Refused:
        # On Kubeflow with profiles, users may often list pods but not workflows.
        return None


def _state_of_workflow(workflow: dict[str, Any] | None, cancelled: bool) -> str:
    if workflow is None:
        return "unknown"
    phase = str(workflow.get("status", {}).get("phase") or "Pending").lower()
    if cancelled:
        return "cancelled" if phase in ("failed", "error") else "cancelling"
    return {"error": "failed", "pending": "waiting"}.get(phase, phase)


def _time(text: str) -> datetime.datetime | None:
    return datetime.datetime.fromisoformat(text) if text else None
