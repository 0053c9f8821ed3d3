"""Create a TrainJob and follow it until it ends.

The launcher is the pod of the train step. It repeats three things until the job ends: it writes a
heartbeat to the job, copies new log lines of node 0 to its own log, and reads the job's conditions.

- Name. The job's name depends only on the run and the training. A launcher that restarts, or a
  retry of the step, therefore finds the existing job and follows it.
- Time. A job may wait in a queue without a limit; `timeout_seconds` counts from its first pod on.
- Failure. A rank that fails is restarted on the nodes, see `restarts`. If the cluster disrupted a
  pod, or the job failed before the step wrote an outcome (see `ranks.nodes`), the launcher deletes
  the job and creates it again; training resumes from the last checkpoint. The first is limited by
  `NUM_DISRUPTIONS`; the second, like the restarts of ranks, by `train.max_restarts`. If the step
  wrote an error, the launcher raises that error.
- Cancellation. The exit handler of the run deletes the job (`diagnose`), because a pod of KFP is
  gone about a second after SIGTERM. The launcher tries to delete it in that second. If neither
  succeeds, the job's pods stop by themselves (`lease`), and Kubernetes deletes the job together
  with the workflow that owns it. `tuneline doctor` reports jobs without a recent heartbeat.
- Kubernetes API. While the API is unreachable, requests are retried for a limited time. Each read
  of the log starts where the last successful read ended, so that a failed read loses no lines.
"""

import contextlib
import datetime
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from tuneline import errors
from tuneline.errors import (
    ClusterError,
    CredentialsError,
    StoppedError,
    TrainingError,
    TunelineError,
)
from tuneline.runtime.kubernetes_client import true_conditions
from tuneline.runtime.signals import raised_on_sigterm
from tuneline.train.ranks.nodes import Outcome, SharedDirectory
from tuneline.train.trainjob.client import ApiUnavailable, TrainJobs
from tuneline.train.trainjob.logs import LogMirror
from tuneline.train.trainjob.pod_state import (
    STUCK_REASONS,
    disruption,
    exceeds_whole_quota,
    memory_kill,
    obstacle,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

POLL_SECONDS = 10.0
MAX_SECONDS_UNAVAILABLE = 15 * 60.0
"""Time for which requests to an unreachable API are retried."""
SECONDS_BETWEEN_HEARTBEATS = 60.0
SECONDS_BETWEEN_MESSAGES = 600.0
"""Time between log lines about a job that is still waiting."""
MAX_SECONDS_STUCK = 1800.0
"""Time for which a pod that occupies its GPUs may lack its image or a secret."""
SECONDS_TO_DELETE = 20.0
"""Longest time for deleting the job after SIGTERM; a pod of KFP does not even have this time."""
NUM_DISRUPTIONS = 5
"""How often a job is created again after the cluster took a pod from it."""
DISRUPTED, FAILED = "disrupted", "failed"


class Launcher:
    """Follows one job."""

    def __init__(
        self,
        jobs: TrainJobs,
        body: dict[str, Any],
        shared: SharedDirectory,
        *,
        timeout_seconds: float,
        max_restarts: int,
        wait: Callable[[float], None] = time.sleep,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Prepare to follow a job; `run` starts.

        Args:
            jobs: The TrainJobs of the namespace.
            body: The TrainJob, from `manifest.build`.
            shared: Directory in which the nodes write the outcome of the step.
            timeout_seconds: Longest running time of the job, without the time in a queue.
            max_restarts: How often to create the job again after it failed without an outcome.
            wait: Function that sleeps for some seconds; tests replace it.
            now: Function that returns the Unix time in seconds; tests replace it.
        """
        self._jobs, self._body, self._shared = jobs, body, shared
        self._name: str = body["metadata"]["name"]
        self._num_nodes: int = body["spec"]["trainer"]["numNodes"]
        self._timeout = timeout_seconds
        self._left = {DISRUPTED: NUM_DISRUPTIONS, FAILED: max_restarts}
        self._wait, self._now = wait, now
        self._num_recreated = 0
        self._last_answer = now()
        self._last_heartbeat = self._last_message = float("-inf")
        self._active_since: float | None = None
        self._stuck_since: float | None = None
        self._state = ""
        self._disruptions: dict[str, str] = {}
        self._logs = LogMirror(jobs, now)

    def run(self) -> None:
        """Create the job or find it, and return when it is complete.

        Raises:
            TunelineError: the error that the step raised on the nodes.
            TrainingError: the job was disrupted too often, or reached its time limit.
            ClusterError: the API is unreachable, or somebody else deleted the job.
            CredentialsError: the service account lacks a permission.
            StoppedError: SIGTERM came; the job is deleted.
        """
        with raised_on_sigterm(": run the step again, and it resumes from its last checkpoint"):
            try:
                while True:
                    self._begin()
                    loss = self._follow()
                    if loss is None:
                        return
                    kind, cause = loss
                    if not self._left[kind]:
                        raise TrainingError(
                            f"trainjob {self._name} {cause}, after it was recreated "
                            f"{self._num_recreated} times: check its nodes (`kubectl get events`), "
                            "or select nodes that are not preempted, and run the step again; it "
                            "resumes from its last checkpoint"
                        )
                    self._left[kind] -= 1
                    self._num_recreated += 1
                    logger.warning(
                        "trainjob %s %s; recreating it (%d left), training resumes from its last "
                        "checkpoint",
                        *(self._name, cause, self._left[kind]),
                    )
                    self._remove()
            except StoppedError:
                logger.warning("received SIGTERM: deleting trainjob %s", self._name)
                self._delete_before_exit()
                raise

    def _delete_before_exit(self) -> None:
        """Delete the job if this pod lives long enough; give up after `SECONDS_TO_DELETE`."""
        deadline = self._now() + SECONDS_TO_DELETE
        while True:
            try:
                return self._jobs.delete(self._name)
            except ApiUnavailable as error:
                if self._now() >= deadline:
                    logger.error(
                        "%s: trainjob %s will be deleted by the run's exit handler or with its "
                        "workflow",
                        *(error, self._name),
                    )
                    return None
                self._wait(1)

    def _begin(self) -> None:
        """Follow the existing job; create one if there is none or if it cannot be continued."""
        job = self._retrying(lambda: self._jobs.get(self._name))
        if job is not None and "deletionTimestamp" in job["metadata"]:
            self._remove()
            job = None
        if job is not None and true_conditions(job).get("Failed"):
            outcome = self._shared.read_outcome()
            if outcome and issubclass(_error_type(outcome), errors.UserError):
                raise _error_type(outcome)(outcome.message)
            logger.info("trainjob %s already exists but has failed: recreating it", self._name)
            self._remove()
            job = None
        if job is not None:
            logger.info("trainjob %s already exists: following it", self._name)
            return
        self._wait_until_gone()
        self._shared.clear()
        self._retrying(lambda: self._jobs.create(self._body))
        logger.info("created trainjob %s", self._name)
        self._active_since, self._stuck_since, self._state = None, None, ""
        self._disruptions = {}

    def _remove(self) -> None:
        """Delete the job, and wait until it is gone."""
        self._retrying(lambda: self._jobs.delete(self._name))
        while self._retrying(lambda: self._jobs.get(self._name)) is not None:
            self._wait(POLL_SECONDS)
        self._wait_until_gone()

    def _wait_until_gone(self) -> None:
        """Wait for the end of what an earlier job of this name left.

        A new job would take over the earlier job's JobSet, and its pods write to the same files.
        """
        if self._retrying(lambda: self._jobs.has_remains(self._name)):
            logger.info("trainjob %s was deleted: waiting until its pods are gone", self._name)
            while self._retrying(lambda: self._jobs.has_remains(self._name)):
                self._wait(POLL_SECONDS)

    def _follow(self) -> tuple[str, str] | None:
        """Return None when the job is complete, or the kind of its failure and the cause."""
        while True:
            job = self._retrying(lambda: self._jobs.get(self._name))
            if job is None:
                raise ClusterError(
                    f"trainjob {self._name} no longer exists, because somebody else deleted it: "
                    "run the step again, and it resumes from its last checkpoint"
                )
            self._beat()
            self._read_pods()
            if true_conditions(job).get("Complete"):
                return None
            failed = true_conditions(job).get("Failed")
            if failed:
                return self._cause_of(failed)
            self._log_state(job)
            self._check_time()
            self._wait(POLL_SECONDS)

    def _retrying(self, request: Callable[[], T]) -> T:
        """Return the answer to a request; retry while the API is unavailable."""
        while True:
            try:
                answer = request()
            except ApiUnavailable as error:
                if self._now() - self._last_answer > MAX_SECONDS_UNAVAILABLE:
                    raise ClusterError(
                        f"{error}, for {MAX_SECONDS_UNAVAILABLE / 60:.0f} minutes; the job itself "
                        "continues: run the step again, and it follows the job"
                    ) from None
                logger.warning("%s: retrying", error)
                self._shared.beat()
                self._wait(POLL_SECONDS)
            else:
                self._last_answer = self._now()
                return answer

    def _beat(self) -> None:
        """Write a heartbeat if one is due; if the API is unavailable, the next round retries."""
        self._shared.beat()
        if self._now() - self._last_heartbeat >= SECONDS_BETWEEN_HEARTBEATS:
            moment = datetime.datetime.fromtimestamp(self._now(), datetime.UTC)
            with contextlib.suppress(ApiUnavailable):
                self._jobs.beat(self._name, moment.strftime("%Y-%m-%dT%H:%M:%SZ"))
                self._last_heartbeat = self._now()

    def _read_pods(self) -> None:
        """Copy the log of node 0, and note which pods the cluster is removing.

        A pod that was evicted no longer exists when the job fails.
        """
        with contextlib.suppress(ApiUnavailable):
            pods = self._jobs.pods(self._name)
            for pod in pods:
                reason = disruption(pod)
                if reason:
                    self._disruptions[pod.metadata.name] = reason
            if pods:
                self._logs.copy_new_lines(pods[0].metadata.name)

    def _log_state(self, job: dict[str, Any]) -> None:
        """Log the state of the job if it has changed, or from time to time while it waits."""
        suspended = true_conditions(job).get("Suspended")
        counts = {"active": 0, "ready": 0, "failed": 0}
        for status in job.get("status", {}).get("jobsStatus", []):
            for key in counts:
                counts[key] += status.get(key, 0)
        if suspended:
            state = f"waits in its queue ({suspended.get('message') or suspended.get('reason')})"
            self._active_since = None
        elif counts["ready"]:
            state = "runs"
        else:
            state = f"waits for its pods{self._obstacle()}"
        if not suspended and counts["active"] and self._active_since is None:
            self._active_since = self._now()
        is_due = self._now() - self._last_message >= SECONDS_BETWEEN_MESSAGES
        if state != self._state or (state != "runs" and is_due):
            logger.info("trainjob %s %s", self._name, state)
            self._state, self._last_message = state, self._now()

    def _obstacle(self) -> str:
        """Return why pods do not start; delete the job if a pod has been stuck for too long."""
        pods = self._retrying(lambda: self._jobs.pods(self._name))
        obstacles = [(pod.metadata.name, *reason) for pod in pods if (reason := obstacle(pod))]
        stuck = [(pod, text) for pod, reason, text in obstacles if reason in STUCK_REASONS]
        if not stuck:
            self._stuck_since = None
        elif self._stuck_since is None:
            self._stuck_since = self._now()
        elif self._now() - self._stuck_since > MAX_SECONDS_STUCK:
            pod, text = stuck[0]
            self._jobs.delete(self._name)
            raise ClusterError(
                f"pod {pod} of trainjob {self._name} does not start ({text}): push the image or "
                "create the secret that the message names, or correct placement"
            )
        if stuck:
            return f" ({stuck[0][1]})"
        if obstacles:
            return f" ({obstacles[0][2]})"
        if len(pods) < self._num_nodes:
            return self._refusal()
        return ""

    def _refusal(self) -> str:
        """Return why pods are not created; delete the job if they never can be."""
        try:
            text = self._retrying(lambda: self._jobs.refusal(self._name))
        except CredentialsError:
            # Training does not depend on this permission.
            return ""
        if text is None:
            return ""
        if exceeds_whole_quota(text):
            self._jobs.delete(self._name)
            raise ClusterError(
                f"the pods of trainjob {self._name} cannot be created ({text}): request less in "
                "placement, or ask for a higher quota"
            )
        return f" ({text})"

    def _check_time(self) -> None:
        since = self._active_since
        if since is not None and self._now() - since > self._timeout:
            self._jobs.delete(self._name)
            raise _out_of_time(self._name, self._timeout)

    def _cause_of(self, failed: dict[str, Any]) -> tuple[str, str]:
        """Return why a failed job must be recreated, or raise the error that ended it."""
        pods = self._retrying(lambda: self._jobs.pods(self._name))
        for pod in pods:
            if pod.status.phase == "Failed":
                self._copy_end_of_log(pod.metadata.name)
        if failed.get("reason") == "DeadlineExceeded":
            raise _out_of_time(self._name, self._timeout)
        if self._disruptions:
            lost = (f"{name}: {reason}" for name, reason in self._disruptions.items())
            return DISRUPTED, f"lost a pod ({', '.join(lost)})"
        for pod in pods:
            limit = memory_kill(pod)
            if limit is not None:
                # Not recreated: the next job would be killed too.
                raise TrainingError(
                    f"pod {pod.metadata.name} was killed because it exceeded its memory limit "
                    f"({limit}): raise placement.steps.train.memory_limit, or lower "
                    "prepare.max_seq_length"
                )
        outcome = self._shared.read_outcome()
        if outcome is None or outcome.kind == StoppedError.__name__:
            reason = ": ".join(filter(None, (failed.get("reason"), failed.get("message"))))
            return FAILED, f"failed before the step ended ({reason or 'no reason given'})"
        raise _error_type(outcome)(outcome.message)

    def _copy_end_of_log(self, pod: str) -> None:
        self._retrying(lambda: self._logs.copy_end(pod))


def _error_type(outcome: Outcome) -> type[TunelineError]:
    error_type: type[TunelineError] = getattr(errors, outcome.kind, None) or TrainingError
    return error_type


def _out_of_time(name: str, seconds: float) -> TrainingError:
    return TrainingError(
        f"trainjob {name} has reached its time limit of {seconds / 3600:g} h: raise "
        "placement.steps.train.timeout_hours and run the step again; it resumes from its last "
        "checkpoint"
    )
