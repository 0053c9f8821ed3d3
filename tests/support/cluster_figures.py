"""Times of a run on a cluster, step by step, and the largest disk and memory of its pods."""

import datetime
import re
import threading
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from kubernetes import client
from kubernetes.stream import stream
from real_cluster import Run

from tuneline.pods import RUN_LABEL
from tuneline.runtime.kfp_run import read_attempts, without_attempts, workflow_nodes

MEGABYTE = 1e6
SAMPLE_SECONDS = 1
LOOKED_INTO = ("report", "publish")
"""Steps that may be too short for the kubelet, which measures volumes once per minute only."""
LOOK = """
du -skc /minio /s3 /gcs /tmp /scratch /kfp-launcher /var/run/argo 2>/dev/null | tail -n 1
grep -h VmHWM /proc/[0-9]*/status
"""
"""Script that prints the kB in the directories that a pod of KFP writes to, and the largest
resident memory of each of its processes so far."""


@dataclass
class PodSize:
    """The largest values that were seen of the pod of a step."""

    memory_bytes: int = 0
    """Memory of the main container."""
    disk_bytes: int = 0
    """Ephemeral storage of the pod: writable layers, emptyDir volumes and logs."""

    def grow(self, *, memory_bytes: int = 0, disk_bytes: int = 0) -> None:
        self.memory_bytes = max(self.memory_bytes, memory_bytes)
        self.disk_bytes = max(self.disk_bytes, disk_bytes)


class PodSizes(threading.Thread):
    """Samples the pods of a run: all in the kubelets' /stats/summary, a few from the inside."""

    def __init__(self, run: Run) -> None:
        super().__init__(daemon=True)
        self._run = run
        self._stopped = threading.Event()
        self.remarks: set[str] = set()
        """What could not be measured, and why."""
        self.by_pod: dict[str, PodSize] = defaultdict(PodSize)

    def __enter__(self) -> "PodSizes":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self.join()

    def run(self) -> None:
        core = self._run.cluster.core
        try:
            nodes = [node.metadata.name for node in core.list_node().items]
        except client.ApiException as error:
            nodes = self._refused("nodes", error)
        while not self._stopped.wait(SAMPLE_SECONDS):
            try:
                for node in nodes:
                    self._ask_kubelet(core.api_client, node)
            except client.ApiException as error:
                nodes = self._refused("the kubelet's /stats/summary (nodes/proxy)", error)
            for step in LOOKED_INTO:
                for pod in self._run.pods(step):
                    if pod.status.phase == "Running":
                        self._look_into(pod.metadata.name)

    def _refused(self, what: str, error: client.ApiException) -> list[str]:
        self.remarks.add(f"The API server answered {error.status} when asked for {what}.")
        return []

    def _ask_kubelet(self, api: client.ApiClient, node: str) -> None:
        answer: Any = api.call_api(
            f"/api/v1/nodes/{node}/proxy/stats/summary",
            "GET",
            response_type="object",
            auth_settings=["BearerToken"],
            _return_http_data_only=True,
        )
        for pod in answer["pods"]:
            size = self.by_pod[pod["podRef"]["name"]]
            size.grow(disk_bytes=pod.get("ephemeral-storage", {}).get("usedBytes", 0))
            for container in pod.get("containers", []):
                if container["name"] == "main":
                    memory = container.get("memory", {}).get("workingSetBytes", 0)
                    size.grow(memory_bytes=memory)

    def _look_into(self, pod: str) -> None:
        # A client of its own, because `stream` changes the client that it is given.
        core, namespace = self._run.cluster.core, self._run.cluster.pod_namespace
        try:
            text = stream(
                core.connect_get_namespaced_pod_exec,
                pod,
                namespace,
                container="main",
                command=["sh", "-c", LOOK],
                stderr=False,
                stdout=True,
            )
        except client.ApiException as error:
            # The pod may just have ended, which is no refusal.
            if error.status == 403:
                self._refused("a command in a pod (pods/exec)", error)
            return
        disk = re.search(r"^(\d+)\s+total$", text, re.M)
        memory = sum(int(kilobytes) for kilobytes in re.findall(r"VmHWM:\s+(\d+) kB", text))
        self.by_pod[pod].grow(
            memory_bytes=memory * 1024, disk_bytes=int(disk[1]) * 1024 if disk else 0
        )


@dataclass(frozen=True)
class StepTime:
    """The time of one step."""

    step: str
    seconds: float | None
    """Seconds in the step's container, with the transfer of artifacts; None: from the cache."""
    around_seconds: float
    """Seconds that KFP and Argo added: the driver's pod, and the waits between pods."""
    pod: str


def step_times(run: Run) -> list[StepTime]:
    """Return the times of a run's steps, in the order in which they started."""
    api, namespace = run.cluster.api, run.cluster.pod_namespace
    selector = f"{RUN_LABEL}={run.run_id}"
    workflows = client.CustomObjectsApi(api).list_namespaced_custom_object(
        "argoproj.io", "v1alpha1", namespace, "workflows", label_selector=selector
    )["items"]
    pods = api.sanitize_for_serialization(run.pods())
    nodes: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for node in workflow_nodes(workflows[0]):
        nodes[without_attempts(node["name"])].append(node)
    times = []
    for attempt in read_attempts(pods, workflows[0]):
        if attempt.state == "skipped":
            continue
        began = min(_time(node["startedAt"]) for node in nodes[f"{attempt.path}-driver"])
        ended = max(_time(node["finishedAt"]) for node in nodes[attempt.path])
        total = (ended - began).total_seconds()
        own = None
        if attempt.state != "cached":
            own = (_time(attempt.ended) - _time(attempt.started)).total_seconds()
        times.append(StepTime(attempt.step, own, total - (own or 0), attempt.pod))
    return times


def markdown(title: str, run: Run, sizes: PodSizes) -> str:
    """Return a table of the run's steps as Markdown."""
    rows = [
        f"## {title}",
        "",
        "| step | in the step, s | around it, s | memory, MB | disk, MB |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for step in step_times(run):
        own = "from the cache" if step.seconds is None else f"{step.seconds:.0f}"
        memory = disk = ""
        if step.pod in sizes.by_pod:
            size = sizes.by_pod[step.pod]
            memory = f"{size.memory_bytes / MEGABYTE:.0f}"
            disk = f"{size.disk_bytes / MEGABYTE:.0f}"
        rows.append(f"| {step.step} | {own} | {step.around_seconds:.0f} | {memory} | {disk} |")
    record = run.cluster.kfp.get_run(run.run_id)
    total = (record.finished_at - record.created_at).total_seconds()
    rows += ["", f"Whole run: {total:.0f} s.", ""]
    rows += [line for remark in sorted(sizes.remarks) for line in (remark, "")]
    return "\n".join(rows)


def _time(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text)
