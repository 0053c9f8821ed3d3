"""Find the state of each step of a run in the answers of KFP's API alone.

The API has no errors of tasks (`error` is null for every task), calls a cancelled run failed, and
lists a step whose result came from the cache as one that ran. It stops recording the steps when
Argo compresses the state of a workflow, above 1 MiB: then the last steps of a long run stay as they
were, although the run's own state goes on.
"""

import datetime
from dataclasses import dataclass
from typing import Any, Literal

from tuneline.pipelines.kfp_client.graph import EXECUTOR, Driver, Graph, PipelineStep, graph_of
from tuneline.pipelines.kfp_client.nodes import Node, Nodes, pod_name
from tuneline.runtime.kfp_run import DRIVER_FAILED, Attempt

State = Literal[
    "waiting",
    "running",
    "succeeded",
    "from cache",
    "failed",
    "cancelled",
    "skipped",
    "not started",
    "unknown",
]
"""State of a step. skipped: its condition was false. not started: what it depends on failed, or the
run was cancelled before. unknown: KFP stopped recording before the step ended."""
UNTIMED = ("waiting", "skipped", "not started")
"""States of steps that took no time."""

ENDED = ("SUCCEEDED", "SKIPPED", "FAILED", "CANCELED")
"""States of a run that has ended."""
FAILED = ("FAILED", "ERROR", "CANCELED")
SUCCEEDED, SKIPPED, CANCELING = "SUCCEEDED", "SKIPPED", "CANCELING"


@dataclass(frozen=True)
class Progress:
    """State of one step of a run."""

    name: str
    """Name of the step, with the format or the model that it is about, as in `evaluate base`."""
    state: State
    attempts: tuple[Attempt, ...] = ()
    """Pods that ran the step, oldest first; deleted pods too."""
    started: datetime.datetime | None = None
    ended: datetime.datetime | None = None

    @property
    def seconds(self) -> float | None:
        """Time from the start of the first attempt to the end of the last, or to now.

        None: unknown, as the step has not started, or by the clocks of two machines ended before.
        """
        if self.started is None:
            return None
        end = self.ended or datetime.datetime.now(datetime.UTC)
        seconds = (end - self.started).total_seconds()
        return seconds if seconds >= 0 else None


def progress_of(run: Any, spec: dict[str, Any]) -> list[Progress]:
    """Return the steps of a run, those that started first, then the others in their order.

    Args:
        run: the run, with its tasks, as KFP's client returns it.
        spec: the compiled pipeline of the run.
    """
    config = getattr(run, "runtime_config", None)
    graph = graph_of(spec, getattr(config, "parameters", None))
    reader = _Reader(run, graph)
    found = [reader.step(step) for step in graph.steps]
    failed = [each for driver in graph.drivers for each in reader.failed_driver(driver)]
    names = {each.name for each in failed}
    # A step whose driver failed was never started; the driver's line stands for both.
    found = [each for each in found if each.attempts or each.name not in names] + failed
    return in_order(found)


def in_order(found: list[Progress]) -> list[Progress]:
    """Return the steps that started by the time at which they did, then the others."""
    started = [each for each in found if each.started is not None]
    order = sorted(started, key=lambda each: (each.started, found.index(each)))
    return order + [each for each in found if each.started is None]


def state_of(run: Any) -> str:
    """Return the state of a run in one word: cancelled if it was, whatever KFP calls it."""
    words = {"CANCELING": "cancelling", "CANCELED": "cancelled", "PENDING": "waiting"}
    if run.state == "FAILED" and cancelled_at(run):
        return "cancelled"
    return words.get(str(run.state), str(run.state).lower())


def cancelled_at(run: Any) -> datetime.datetime | None:
    """Return when the run was cancelled; None if it was not, or was resumed since."""
    time = None
    for entry in run.state_history or []:
        if entry.state == CANCELING:
            time = entry.update_time
        elif entry.state in ("PENDING", "RUNNING", SUCCEEDED):
            time = None
    return time


def is_frozen(run: Any) -> bool:
    """Return whether KFP stopped recording the steps of a run before it ended.

    If a run was cancelled, steps may stay as they were although KFP went on: what it recorded after
    the cancel tells.
    """
    tasks = (run.run_details and run.run_details.task_details) or []
    if run.state not in ENDED or not any(task.state in ("RUNNING", "PENDING") for task in tasks):
        return False
    stop = cancelled_at(run)
    times = (time for task in tasks for time in (task.start_time, task.end_time) if time)
    return stop is None or not any(time >= stop for time in times)


def _resumed_at(run: Any) -> datetime.datetime | None:
    """Return when the run was resumed last; None if it was not."""
    history = run.state_history or []
    pairs = zip(history, history[1:], strict=False)
    times = [now.update_time for before, now in pairs if before.state in ENDED]
    return times[-1] if times else None


class _Reader:
    def __init__(self, run: Any, graph: Graph) -> None:
        tasks = (run.run_details and run.run_details.task_details) or []
        resumed = _resumed_at(run)
        # What failed before the run was resumed starts again; its old task is still listed.
        self.nodes = Nodes(
            [
                task
                for task in tasks
                if resumed is None
                or task.state in (SUCCEEDED, SKIPPED)
                or not (end := _end_of(task))
                or end >= resumed
            ]
        )
        self.run_succeeded = run.state == SUCCEEDED
        self.has_ended = run.state in ENDED
        self.is_frozen = is_frozen(run)
        self.cancelled_at = cancelled_at(run)

    def step(self, step: PipelineStep) -> Progress:
        found = self.nodes.find(step.path)
        if not found:
            return Progress(step.name, self._unseen(step))
        task = self.nodes.task(found[-1], EXECUTOR)
        executors = [
            attempt.below(EXECUTOR) for each in found for attempt in self.nodes.attempts(each)
        ]
        pods = [pod for each in executors for pod in self._pods(each, step.template, task)]
        state = self._state(step, task, pods)
        attempts = self._attempts(step, pods, state)
        end_is_unknown = self.is_frozen and task is not None and _end_of(task) is None
        if state in UNTIMED or task is None or end_is_unknown:
            return Progress(step.name, state, attempts)
        return Progress(step.name, state, attempts, task.start_time, _end_of(task))

    def _unseen(self, step: PipelineStep) -> State:
        """Return the state of a step that has no node."""
        if self.is_frozen:
            return self._frozen(step)
        groups = [self.nodes.find(step.path[:length]) for length in range(1, len(step.path))]
        tasks = [self.nodes.task(found[-1]) for found in groups if found]
        states = [task.state for task in tasks if task is not None]
        if SKIPPED in states or self.run_succeeded:
            return "skipped"
        return "not started" if self.has_ended or None in states else "waiting"

    def _frozen(self, step: PipelineStep) -> State:
        """Return the state of a step whose end was not recorded."""
        return "succeeded" if self.run_succeeded and not step.is_conditional else "unknown"

    def failed_driver(self, driver: Driver) -> list[Progress]:
        found = self.nodes.find(driver.path)
        task = self.nodes.task(found[-1]) if found else None
        if task is None or task.state not in FAILED:
            return []
        pods = [attempt for each in found for attempt in self.nodes.attempts(each)]
        state = self._failed(task)
        attempts = self._attempts(driver, pods, state, DRIVER_FAILED)
        return [Progress(driver.name, state, attempts, task.start_time, _end_of(task))]

    def _attempts(
        self, step: PipelineStep | Driver, pods: list[Node], state: State, reason: str = ""
    ) -> tuple[Attempt, ...]:
        last = "failed" if state == "cancelled" else state
        return tuple(
            Attempt(
                step=step.name,
                state=last if number == len(pods) else "failed",  # type: ignore[arg-type]
                number=number,
                pod=pod_name(self.nodes.workflow, step.template, pod),
                reason=reason,
                is_on_exit=any(part.endswith(".onExit") for part in step.path),
            )
            for number, pod in enumerate(pods, start=1)
        )

    def _pods(self, executor: Node, template: str, task: Any) -> list[Node]:
        """Return the nodes of the pods of one execution; none if the cache had the result."""
        attempts = self.nodes.attempts(executor)
        if task is None or attempts != [executor]:
            return [] if task is None else attempts
        if self.nodes.wraps or "retry-" in template:
            return []
        states = self.nodes.states_at(executor, task.start_time)
        return [] if states <= {SKIPPED} else [executor]

    def _state(self, step: PipelineStep, task: Any, pods: list[Node]) -> State:
        if task is not None and task.state is None:
            # Argo omits what depends on a failed step; KFP has no state for that.
            return "not started"
        if self.is_frozen and (task is None or task.state not in (SUCCEEDED, SKIPPED, *FAILED)):
            return self._frozen(step)
        if task is None:
            return "not started" if self.has_ended else "waiting"
        if task.state == SKIPPED:
            return "skipped"
        if task.state == SUCCEEDED:
            return "succeeded" if pods else "from cache"
        if task.state in FAILED:
            return self._failed(task)
        if not pods or self.nodes.states_at(pods[-1], task.start_time) == {"PENDING"}:
            return "not started" if self.has_ended else "waiting"
        return "cancelled" if self.has_ended else "running"

    def _failed(self, task: Any) -> State:
        end = _end_of(task)
        stopped = self.cancelled_at and (end is None or end >= self.cancelled_at)
        return "cancelled" if stopped else "failed"


def _end_of(task: Any) -> datetime.datetime | None:
    # The end of a task that is still running is the zero time of Go, in the year 1.
    end = task.end_time
    return end if end and task.start_time and end >= task.start_time else None
