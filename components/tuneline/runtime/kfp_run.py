"""Read how the steps of a KFP run fared, from what Argo and KFP leave in Kubernetes.

There are two sources: the pods of the run (label pipeline/runid), and the Argo Workflow, which not
every service account may read. Pods know reasons, exit codes and exact times, but a pod can vanish.
The workflow knows every attempt, also those whose pod is gone, and which steps came from the cache.

KFP 2.17 on Argo 4.0 makes these nodes of one task of a loop (recorded in tests/data/kfp-2.17):

    W(0).root(0).exit-handler-1(0).export-gguf(0).for-loop-2(0).iteration-driver(0)
    W(0).root(0).[...].for-loop-2(0).iteration-iterations(2:2)(0).iteration-item(0)
        .quantize-gguf-driver(0)             # the driver's pod: cache, conditions, inputs
        .quantize-gguf(0).executor(0)        # the pod of the step, first attempt

`(0)` counts the attempts of the part in front of it: KFP's default retries every part, so that
attempts nest. `2:2` is the number of the loop's item. Between these are nodes of type Retry, DAG
and TaskGroup, which have no pod and are skipped here.
"""

import base64
import gzip
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from tuneline.pods import STEP_LABEL
from tuneline.runtime.pod_ending import RUN_STOPPED, PodEnding, ending_of_message, ending_of_pod
from tuneline.runtime.termination import Ending

NODE_ID = "workflows.argoproj.io/node-id"
NODE_NAME = "workflows.argoproj.io/node-name"
ROLE = "pipelines.kubeflow.org/runtime-role"
WORKFLOW_LABEL = "workflows.argoproj.io/workflow"

State = Literal["waiting", "running", "succeeded", "failed", "cached", "skipped", "unknown"]
"""State of an attempt. `skipped`: its condition was false. `unknown`: there is no pod and no
workflow, so that the step came from the cache, was skipped or never started."""

DRIVER_FAILED = "Driver"
"""Reason of an attempt if KFP's driver failed, so that the step was not started."""

_STATES: dict[str, State] = {
    "Pending": "waiting",
    "Running": "running",
    "Succeeded": "succeeded",
    "Failed": "failed",
    "Error": "failed",
}


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One execution of a step, or the reason why there was none."""

    step: str
    """Name as in the recipe, e.g. "evaluate base" or "quantize-gguf q4_k_m"."""
    state: State
    number: int = 1
    """Number of the attempt, from 1, over all levels of retries."""
    pod: str = ""
    """Name of the pod; the pod may be gone. "" if there was none."""
    reason: str = ""
    """Why the attempt failed or waits, in one word of Kubernetes or Argo: OOMKilled, Evicted,
    DeadlineExceeded, PodDeleted, ImagePullBackOff, Error ..., or `DRIVER_FAILED`."""
    exit_code: int | None = None
    message: str = ""
    """What Kubernetes or Argo says; "" if the step itself left a message."""
    ending: Ending | None = None
    """What the step left in its termination message."""
    started: str = ""
    """Time in RFC 3339 format; "" if unknown."""
    ended: str = ""
    is_on_exit: bool = False
    """Whether the step is the exit handler."""
    path: str = ""
    """Name of the task within the workflow, without numbers of attempts."""


def read_attempts(
    pods: Iterable[dict[str, Any]], workflow: dict[str, Any] | None = None
) -> list[Attempt]:
    """Return the attempts of all steps, in the order in which they started.

    Args:
        pods: The pods of the run, as the API returns them.
        workflow: The run's workflow; None if it is gone or cannot be read.
    """
    nodes = {node["name"]: node for node in workflow_nodes(workflow)}
    # Argo keeps the nodes of a very large workflow in a database, where nobody can read them here.
    if not nodes:
        workflow = None
    pods_by_node: dict[str, dict[str, Any]] = {}
    for pod in pods:
        name = pod["metadata"].get("annotations", {}).get(NODE_NAME)
        if name:
            pods_by_node[name] = pod
            nodes.setdefault(name, _node_of_pod(name, pod))
    drivers, executors, skipped = _sorted_out(nodes.values())
    found: list[Attempt] = []
    for path in dict.fromkeys([*drivers, *executors, *skipped]):
        pod_of_step = next(
            (pods_by_node[n["name"]] for n in executors.get(path, []) if n["name"] in pods_by_node),
            None,
        )
        step = _step_name(path, drivers, pod_of_step)
        if executors.get(path):
            for number, node in enumerate(executors[path], start=1):
                found.append(_attempt(step, path, number, node, pods_by_node.get(node["name"])))
        elif path in skipped:
            found.append(_passed_over(step, path, skipped[path]))
        else:
            driver = drivers[path]
            found += _without_executor(
                step, path, driver, pods_by_node.get(driver["name"]), workflow
            )
    return sorted(found, key=lambda attempt: (attempt.started or "9", attempt.path, attempt.number))


def workflow_nodes(workflow: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the nodes of a workflow, also if Argo compressed them; [] if there are none."""
    status = (workflow or {}).get("status", {})
    nodes = status.get("nodes")
    if not nodes and status.get("compressedNodes"):
        nodes = json.loads(gzip.decompress(base64.b64decode(status["compressedNodes"])))
    return list((nodes or {}).values())


def is_cancelled(workflow: dict[str, Any]) -> bool:
    """Return whether somebody terminated the run: KFP then sets the workflow's deadline to 0 s."""
    spec = workflow.get("spec", {})
    return spec.get("activeDeadlineSeconds") == 0 or bool(spec.get("shutdown"))


def group_phase(workflow: dict[str, Any]) -> str:
    """Return Argo's phase of the tasks under the exit handler; "" if it is not known.

    While the exit handler runs, this is the outcome of the run.
    """
    nodes = [
        node
        for node in workflow_nodes(workflow)
        if re.search(r"\.exit-handler-\d+$", without_attempts(node["name"]))
    ]
    # The Retry node stands for all attempts; its name has no number of an attempt at its end.
    last = min(nodes, key=lambda node: len(node["name"]), default=None)
    return str(last["phase"]) if last is not None else ""


def without_attempts(node_name: str) -> str:
    """Return the name of a node without the numbers of attempts; numbers of loop items stay."""
    return re.sub(r"\(\d+\)", "", node_name)


def _sorted_out(
    nodes: Iterable[dict[str, Any]],
) -> tuple[dict[str, Any], dict[str, list[Any]], dict[str, Any]]:
    """Return drivers, executors and skipped nodes by the path of their task."""
    drivers: dict[str, Any] = {}
    executors: dict[str, list[Any]] = {}
    skipped: dict[str, Any] = {}
    for node in sorted(nodes, key=lambda node: (node.get("startedAt") or "9", node["name"])):
        path = without_attempts(node["name"])
        if node["type"] == "Skipped" and node["phase"] == "Skipped":
            skipped[path.removesuffix(".executor")] = node
        elif node["type"] == "Pod" and path.endswith(".executor"):
            executors.setdefault(path.removesuffix(".executor"), []).append(node)
        elif node["type"] == "Pod" and path.endswith("-driver"):
            # The last attempt of a driver counts.
            drivers[path.removesuffix("-driver")] = node
    return drivers, executors, skipped


def _node_of_pod(name: str, pod: dict[str, Any]) -> dict[str, Any]:
    """Return what the workflow would say about a pod."""
    task, kind = _argument(pod, "--task"), _argument(pod, "--type")
    return {
        "name": name,
        "type": "Pod",
        "phase": pod["status"].get("phase", "Pending"),
        "startedAt": pod["metadata"].get("creationTimestamp", ""),
        "inputs": {"parameters": [{"name": "task", "value": task}]} if task else {},
        "templateName": "system-container-driver" if kind == "CONTAINER" else "",
    }


def _argument(pod: dict[str, Any], flag: str) -> str:
    """Return the value of an argument of KFP's driver or launcher in a pod, or ""."""
    for container in pod["spec"]["containers"]:
        if container["name"] == "main":
            words = [*container.get("command", []), *container.get("args", [])]
            if flag in words[:-1]:
                return str(words[words.index(flag) + 1])
    return ""


def _task_of(driver: dict[str, Any] | None) -> dict[str, Any]:
    """Return the specification of a driver's task, or {} if it cannot be read."""
    return _parsed(_input(driver, "task"))


def _input(driver: dict[str, Any] | None, name: str) -> str | None:
    """Return the value of an input parameter of a driver's node, or None."""
    for parameter in (driver or {}).get("inputs", {}).get("parameters", []):
        if parameter["name"] == name:
            return str(parameter.get("value", ""))
    return None


def _parsed(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _step_name(path: str, drivers: dict[str, Any], pod: dict[str, Any] | None) -> str:
    """Return a task's display name, and the item of each loop around it."""
    display = _task_of(drivers.get(path)).get("taskInfo", {}).get("name")
    values: dict[str, Any] = {}
    if pod is not None:
        inputs = _parsed(_argument(pod, "--executor_input")).get("inputs", {})
        values = inputs.get("parameterValues", {})
    if not display and pod is not None:
        # The driver's pod is gone.
        component = pod["metadata"].get("labels", {}).get(STEP_LABEL, "")
        parts = [component, values.get("label", ""), values.get("format", "")]
        if component:
            return " ".join(part for part in parts if part)
    display = display or path.rpartition(".")[2]
    items: list[str] = []
    for match in re.finditer(r"\.iteration-iterations\((\d+):[^)]*\)", path):
        here, number = path[: match.start()], int(match[1])
        loop = _task_of(drivers.get(f"{here}.iteration"))
        names = loop_items(loop, _parameters(here, drivers))
        known = number < len(names)
        items.append(str(names[number] if known else values.get("format", number)))
    return " ".join([display, *items])


def loop_items(task: dict[str, Any], values: Mapping[str, Any]) -> list[Any]:
    """Return the items of a loop's task; [] if they are not known.

    Args:
        task: specification of the task.
        values: its input parameters, as far as they are known.
    """
    source = task.get("parameterIterator", {}).get("items", {})
    items = (
        json.loads(source["raw"]) if "raw" in source else values.get(source.get("inputParameter"))
    )
    return items if isinstance(items, list) else []


def _parameters(path: str, drivers: dict[str, Any]) -> dict[str, Any]:
    """Return the input parameters of a DAG that are those of the run, from the drivers' inputs."""
    driver = drivers.get(path) or drivers.get(f"{path}.iteration")
    if path.endswith(".root"):
        # KFP adds the defaults of parameters that the run was not given.
        values: dict[str, Any] = _parsed(_input(driver, "runtime-config")).get(
            "parameterValues", {}
        )
        return values
    above = path.rpartition(".")[0]
    if not above or driver is None:
        return {}
    outer = _parameters(above, drivers)
    sources = _task_of(driver).get("inputs", {}).get("parameters", {})
    return {
        name: outer[source["componentInputParameter"]]
        for name, source in sources.items()
        if source.get("componentInputParameter") in outer
    }


def _attempt(
    step: str, path: str, number: int, node: dict[str, Any], pod: dict[str, Any] | None
) -> Attempt:
    state = _STATES.get(node["phase"], "unknown")
    is_on_exit = ".onExit" in path
    pod_phase = pod["status"].get("phase") if pod is not None else None
    if state == "running" and pod_phase == "Pending":
        state = "waiting"
    elif state == "waiting" and pod_phase is not None:
        # A busy Argo notices minutes later that a pod runs or has ended.
        state = _STATES.get(pod_phase, state)
    elif is_on_exit and pod_phase == "Succeeded" and node["name"].endswith(".executor(0)"):
        # Argo gives up the exit handler of a cancelled run, because its deadline is over, but lets
        # the pod go on. If it gave up the driver, the exit handler is not started.
        state = "succeeded"
    left = ending_of_pod(pod) if pod is not None else PodEnding()
    if not left.reason and state != "succeeded":
        left = ending_of_message(node.get("message", ""))
    return Attempt(
        step=step,
        state=state,
        number=number,
        pod=pod["metadata"]["name"] if pod is not None else _pod_name(node),
        reason=left.reason,
        exit_code=left.exit_code,
        message=left.message,
        ending=left.ending,
        started=left.started or node.get("startedAt") or "",
        ended=left.ended or node.get("finishedAt") or "",
        is_on_exit=is_on_exit,
        path=path,
    )


def _passed_over(step: str, path: str, node: dict[str, Any]) -> Attempt:
    """Return the attempt of a step that was not executed, by Argo's reason."""
    # The executor is skipped `when cached-decision != true`, a task `when condition != false`.
    cached = without_attempts(node["name"]).endswith(".executor")
    return Attempt(
        step=step,
        state="cached" if cached else "skipped",
        started=node.get("startedAt") or "",
        ended=node.get("finishedAt") or "",
        is_on_exit=".onExit" in path,
        path=path,
    )


def _without_executor(
    step: str,
    path: str,
    driver: dict[str, Any],
    pod: dict[str, Any] | None,
    workflow: dict[str, Any] | None,
) -> list[Attempt]:
    """Return the attempt of a step of which there is only KFP's driver; [] if it is not a step."""
    attempt = _attempt(step, path, 1, driver, pod)
    if attempt.state == "failed" and attempt.reason == RUN_STOPPED:
        return [attempt]
    if attempt.state == "failed":
        message = attempt.message or attempt.reason
        return [replace(attempt, reason=DRIVER_FAILED, message=message)]
    is_container = str(driver.get("templateName")).endswith("container-driver")
    if not is_container and not attempt.reason:
        return []
    # Without the workflow, nobody knows why there is no pod of the step.
    is_unknown = workflow is None and attempt.state == "succeeded"
    return [replace(attempt, state="unknown" if is_unknown else "waiting", pod="", ended="")]


def _pod_name(node: dict[str, Any]) -> str:
    """Return the name that Argo gives to the pod of a node (pod-name-format v2)."""
    workflow, _, number = node.get("id", "").rpartition("-")
    return f"{workflow}-{node['templateName']}"[:242] + f"-{number}" if workflow else ""
