"""Make a TrainJob and follow it to its end.

- Its name comes from the run and the training, so a launcher that was started again finds the job
  that is there.
- Waiting in a queue has no end of its own; running has `timeout_hours`.
- SIGTERM deletes the job; the workflow owns it; a heartbeat tells a job that nobody looks after.
- A job that was disrupted, or that ended without a verdict of the step, is made again and goes on
  from its last checkpoint. An error of the step is raised here.
- An API that is away is asked again for a while. Logs are read from where they were, so a read that
  failed loses nothing.
"""

import contextlib
import datetime
import logging
import time
from collections.abc import Callable
from typing import Any

from tuneline import errors
from tuneline.errors import ClusterError, StoppedError, TrainingError, TunelineError
from tuneline.runtime.signals import raised_on_sigterm
from tuneline.train.ranks.board import Board, Verdict
from tuneline.train.trainjob.client import Away, TrainJobs
from tuneline.train.trainjob.pod_state import (
    CONFIG_REASON,
    IMAGE_REASONS,
    disruption,
    memory_kill,
    obstacle,
)

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 10.0
SECONDS_AWAY = 15 * 60.0
"""So long an API may be away."""
SECONDS_BETWEEN_BEATS = 60.0
SECONDS_BETWEEN_NEWS = 600.0
"""A job that waits says so this often."""
SECONDS_STUCK = 1800.0
"""So long a pod may lack its image or its secrets, while it has its GPUs already."""
SECONDS_LEFT = 20.0
"""Of the half a minute between SIGTERM and the end of a pod."""
NUM_RESTARTS = 5
NUM_LOG_LINES = 200
_LOG_SLACK_SECONDS = 60
"""A node's clock may differ from ours by so much."""


class Launcher:
    """One job, followed."""

    def __init__(
        self,
        jobs: TrainJobs,
        body: dict[str, Any],
        board: Board,
        *,
        timeout_seconds: float,
        wait: Callable[[float], None] = time.sleep,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Follow nothing yet.

        Args:
            jobs: the API.
            body: the TrainJob.
            board: where its nodes leave their verdict.
            timeout_seconds: that it may run.
            wait: sleeps.
            now: seconds since 1970.
        """
        self._jobs, self._body, self._board = jobs, body, board
        self._name: str = body["metadata"]["name"]
        self._timeout = timeout_seconds
        self._wait, self._now = wait, now
        self._heard = now()
        self._beaten = self._told = float("-inf")
        self._active_since: float | None = None
        self._stuck_since: float | None = None
        self._state = ""
        self._seen: dict[str, str] = {}

    def run(self) -> None:
        """Return when the job is complete.

        Raises:
            TunelineError: what the step raised on the nodes.
            TrainingError: it was disrupted too often, or ran out of time.
            ClusterError: the API is away, or the job was deleted by somebody.
            CredentialsError: this service account may not do that.
            StoppedError: SIGTERM came; the job is deleted.
        """
        with raised_on_sigterm(": run the step again, and it goes on where it was"):
            try:
                for number in range(NUM_RESTARTS + 1):
                    self._begin()
                    cause = self._follow()
                    if cause is None:
                        return
                    logger.warning(
                        "trainjob %s %s; made again (%d of %d), it goes on from its last "
                        "checkpoint",
                        *(self._name, cause, number + 1, NUM_RESTARTS),
                    )
                    self._remove()
            except StoppedError:
                logger.warning("told to stop: trainjob %s is deleted", self._name)
                self._delete_before_the_end()
                raise
        raise TrainingError(
            f"trainjob {self._name} was disrupted {NUM_RESTARTS + 1} times, at last because it "
            f"{cause}: look at its nodes (`kubectl get events`), or choose ones that stay"
        )

    def _delete_before_the_end(self) -> None:
        """Delete the job in the seconds that a pod has left; its owner takes it along otherwise."""
        deadline = self._now() + SECONDS_LEFT
        while True:
            try:
                return self._jobs.delete(self._name)
            except Away as error:
                if self._now() >= deadline:
                    logger.error("%s: it goes when its workflow does", error)
                    return None
                self._wait(1)

    def _begin(self) -> None:
        job = self._patiently(lambda: self._jobs.get(self._name))
        if job is not None and "deletionTimestamp" in job["metadata"]:
            logger.info("trainjob %s is being deleted: waiting for its end", self._name)
            self._remove()
            job = None
        if job is not None and _condition(job, "Failed"):
            verdict = self._board.verdict()
            if verdict and issubclass(_kind_of(verdict), errors.UserError):
                raise _kind_of(verdict)(verdict.message)
            logger.info("trainjob %s is there, and has failed: made again", self._name)
            self._remove()
            job = None
        if job is not None:
            logger.info("trainjob %s is there: following it", self._name)
            return
        self._board.clear()
        self._patiently(lambda: self._jobs.create(self._body))
        logger.info("made trainjob %s", self._name)
        self._active_since, self._stuck_since, self._state = None, None, ""

    def _remove(self) -> None:
        """Delete the job, and wait until it is gone: its name is taken until then."""
        self._patiently(lambda: self._jobs.delete(self._name))
        while self._patiently(lambda: self._jobs.get(self._name)) is not None:
            self._wait(SECONDS_BETWEEN_LOOKS)

    def _follow(self) -> str | None:
        """Return None when the job is complete, or the cause that it has to be made again for."""
        while True:
            job = self._patiently(lambda: self._jobs.get(self._name))
            if job is None:
                raise ClusterError(
                    f"trainjob {self._name} is gone: somebody has deleted it; run the step again, "
                    "and it goes on from its last checkpoint"
                )
            self._beat()
            self._mirror_logs()
            if _condition(job, "Complete"):
                return None
            failed = _condition(job, "Failed")
            if failed:
                return self._cause_of(failed)
            self._say_state(job)
            self._check_time()
            self._wait(SECONDS_BETWEEN_LOOKS)

    def _patiently(self, ask: Callable[[], Any]) -> Any:
        while True:
            try:
                answer = ask()
            except Away as error:
                if self._now() - self._heard > SECONDS_AWAY:
                    raise ClusterError(
                        f"{error}, for {SECONDS_AWAY / 60:.0f} minutes; the job goes on, and a "
                        "retry of this step finds it"
                    ) from None
                logger.warning("%s: asked again", error)
                self._wait(SECONDS_BETWEEN_LOOKS)
            else:
                self._heard = self._now()
                return answer

    def _beat(self) -> None:
        if self._now() - self._beaten >= SECONDS_BETWEEN_BEATS:
            moment = datetime.datetime.fromtimestamp(self._now(), datetime.UTC)
            with contextlib.suppress(Away):
                self._jobs.beat(self._name, moment.strftime("%Y-%m-%dT%H:%M:%SZ"))
                self._beaten = self._now()

    def _mirror_logs(self) -> None:
        """Write what the first node has written since the last look."""
        with contextlib.suppress(Away):
            pods = self._jobs.pods(self._name)
            for pod in pods[:1]:
                self._mirror(pod.metadata.name)

    def _mirror(self, pod: str) -> None:
        which: dict[str, Any] = {"timestamps": True}
        last = self._seen.get(pod, "")
        if last:
            seconds = self._now() - _seconds_of(last) + _LOG_SLACK_SECONDS
            which["since_seconds"] = max(1, int(seconds))
        for line in self._jobs.log(pod, **which):
            moment, _, text = line.partition(" ")
            # Times of one container rise, and have nine digits behind the point.
            if moment > last:
                self._seen[pod] = moment
                logger.info("%s: %s", pod, text)

    def _say_state(self, job: dict[str, Any]) -> None:
        suspended = _condition(job, "Suspended")
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
        waits = state != "runs" and self._now() - self._told >= SECONDS_BETWEEN_NEWS
        if state != self._state or waits:
            logger.info("trainjob %s %s", self._name, state)
            self._state, self._told = state, self._now()

    def _obstacle(self) -> str:
        """Say what keeps pods from starting, and end a job that will not mend itself."""
        pods = self._patiently(lambda: self._jobs.pods(self._name))
        found = [(pod.metadata.name, *said) for pod in pods if (said := obstacle(pod))]
        stuck = [each for each in found if each[1] in (*IMAGE_REASONS, CONFIG_REASON)]
        if not stuck:
            self._stuck_since = None
        elif self._stuck_since is None:
            self._stuck_since = self._now()
        elif self._now() - self._stuck_since > SECONDS_STUCK:
            pod, _, words = stuck[0]
            self._jobs.delete(self._name)
            raise ClusterError(
                f"pod {pod} of trainjob {self._name} does not start ({words}): push the image or "
                "make the secret that it names, or correct placement"
            )
        return f" ({stuck[0][2] if stuck else found[0][2]})" if found else ""

    def _check_time(self) -> None:
        since = self._active_since
        if since is not None and self._now() - since > self._timeout:
            self._jobs.delete(self._name)
            raise _out_of_time(self._name, self._timeout)

    def _cause_of(self, failed: dict[str, Any]) -> str:
        """Say what befell a failed job, or raise what its step did."""
        pods = self._patiently(lambda: self._jobs.pods(self._name))
        for pod in pods:
            if pod.status.phase == "Failed":
                self._tell_end_of(pod.metadata.name)
        disruptions = [f"{pod.metadata.name}: {why}" for pod in pods if (why := disruption(pod))]
        if failed.get("reason") == "DeadlineExceeded":
            raise _out_of_time(self._name, self._timeout)
        if disruptions:
            return f"lost a pod ({', '.join(disruptions)})"
        for pod in pods:
            limit = memory_kill(pod)
            if limit is not None:
                # Another try would end there too.
                raise TrainingError(
                    f"pod {pod.metadata.name} was killed for memory, its limit is {limit}: raise "
                    "placement.steps.train.memory_limit, or lower prepare.max_seq_length"
                )
        verdict = self._board.verdict()
        if verdict is None or verdict.kind == StoppedError.__name__:
            reason = ": ".join(filter(None, (failed.get("reason"), failed.get("message"))))
            return f"ended before the step did ({reason or 'no reason given'})"
        raise _kind_of(verdict)(verdict.message)

    def _tell_end_of(self, pod: str) -> None:
        lines = self._patiently(lambda: self._jobs.log(pod, tail_lines=NUM_LOG_LINES))
        logger.error("pod %s failed; its log's last %d lines:", pod, len(lines))
        for line in lines:
            logger.error("%s: %s", pod, line)


def _kind_of(verdict: Verdict) -> type[TunelineError]:
    return getattr(errors, verdict.kind, None) or TrainingError


def _out_of_time(name: str, seconds: float) -> TrainingError:
    return TrainingError(
        f"trainjob {name} has run for {seconds / 3600:g} h, which is its limit: raise "
        "placement.steps.train.timeout_hours, and it goes on from its last checkpoint"
    )


def _condition(job: dict[str, Any], kind: str) -> dict[str, Any] | None:
    for each in job.get("status", {}).get("conditions", []):
        if each["type"] == kind and each["status"] == "True":
            return each
    return None


def _seconds_of(moment: str) -> float:
    # Kubernetes writes nanoseconds, Python reads six digits.
    whole = moment.partition(".")[0].rstrip("Z")
    return datetime.datetime.fromisoformat(f"{whole}+00:00").timestamp()
