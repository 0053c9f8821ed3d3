"""A cluster with Kubeflow Pipelines, used as a person uses it: through the command line.

The APIs are used directly only for what the command line does not offer: to wait for a state, to
delete a pod, and to delete the runs of a test.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import kfp
import kfp_server_api
from claim_pod import claim_pod
from kubernetes import client, config

from tuneline import images
from tuneline.pods import RUN_LABEL, STEP_LABEL
from tuneline.runtime.termination import Ending, decode

T = TypeVar("T")

FINISHED = ("SUCCEEDED", "SKIPPED", "FAILED", "CANCELED")
POLL_SECONDS = 5
LONG_SECONDS = 3600
"""Time limit of a run. A small run takes four minutes on two idle cores."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """One namespace of a cluster, and the settings with which its runs are submitted."""

    host: str
    kubeconfig: str | None
    namespace: str | None
    """The user's namespace, on Kubeflow with profiles."""
    account: str
    registry: str
    claim: str
    shared_claim: str
    assignments: tuple[str, ...]
    """KEY=VALUE of the recipe that every run gets, such as placement.profile=small."""
    session: str
    """Part of the names of all recipes of a session. KFP's cache is per pipeline name, so the
    runs of a session share results with one another, but not with those of earlier sessions."""
    seed: int
    """Seed of all trainings. It differs from run to run of the tests, so that no training finds a
    result in the cache or a checkpoint on the claim."""

    @property
    def pod_namespace(self) -> str:
        return self.namespace or "kubeflow"

    @property
    def kfp(self) -> Any:
        return kfp.Client(host=self.host, existing_token=os.environ.get("KFP_TOKEN"))

    @property
    def api(self) -> client.ApiClient:
        return config.new_client_from_config(self.kubeconfig)

    @property
    def core(self) -> Any:
        return client.CoreV1Api(self.api)

    def tuneline(self, *arguments: str, fails: bool = False) -> str:
        """Run the command line; return what it prints on both streams.

        Args:
            arguments: the command and its options.
            fails: whether an exit code other than 0 is expected.
        """
        command = [str(Path(sys.executable).parent / "tuneline"), *arguments]
        variables = {"KFP_ENDPOINT": self.host, "COLUMNS": "200", "NO_COLOR": "1"}
        if self.kubeconfig:
            variables["KUBECONFIG"] = self.kubeconfig
        done = subprocess.run(
            command,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=180,
        )
        assert (done.returncode != 0) == fails, f"{' '.join(command[1:])}: {done.stdout}"
        return done.stdout

    def options(self) -> list[str]:
        """Return the option that names the user's namespace, if there is one."""
        return ["--namespace", self.namespace] if self.namespace else []

    def placed(self, *assignments: str) -> list[str]:
        """Return the --set options of a run: those of the session, then `assignments`."""
        registry = f"placement.registry={self.registry}"
        seed = f"train.seed={self.seed}"
        every = (registry, seed, *self.assignments, *assignments)
        return [part for text in every for part in ("--set", text)]

    def submit(self, recipe: str, *assignments: str, experiment: str) -> "Run":
        """Submit a recipe, with some KEY=VALUE of its own, through the command line."""
        text = self.tuneline(
            *("submit", recipe, "--experiment", experiment, "--service-account", self.account),
            *self.options(),
            *self.placed(*assignments),
        )
        match = re.search(r"^run (\S+): ([0-9a-f-]{36})$", text, re.M)
        assert match, text
        return Run(self, match[2], match[1])

    def run_on_claim(self, script: str) -> str:
        """Run a shell script in a pod that has the cache claim, and return what it prints."""
        image = images.in_registry(images.LIGHT, self.registry)
        core, namespace = self.core, self.pod_namespace
        manifest = claim_pod(self.claim, image, script, pulls=not images.is_on_nodes(self.registry))
        pod = core.create_namespaced_pod(namespace, manifest)
        name = pod.metadata.name

        def ended() -> str | None:
            phase = str(core.read_namespaced_pod(name, namespace).status.phase)
            return phase if phase in ("Succeeded", "Failed") else None

        try:
            phase = until(ended, f"pod {name} to end", seconds=600, every=1)
            text = str(core.read_namespaced_pod_log(name, namespace))
            assert phase == "Succeeded", text
            return text
        finally:
            core.delete_namespaced_pod(name, namespace)

    def runs_of(self, experiment: str) -> list["Run"]:
        """Return the runs of an experiment, oldest first."""
        group = self.kfp.get_experiment(experiment_name=experiment, namespace=self.namespace)
        page = self.kfp.list_runs(
            experiment_id=group.experiment_id, page_size=50, sort_by="created_at"
        )
        return [Run(self, run.run_id, run.display_name) for run in page.runs or []]

    def delete_experiment(self, experiment: str) -> None:
        """Delete an experiment and its runs, and thereby their pods."""
        group = self.kfp.get_experiment(experiment_name=experiment, namespace=self.namespace)
        for run in self.runs_of(experiment):
            self.kfp.delete_run(run.run_id)
        self.kfp.delete_experiment(group.experiment_id)


@dataclass(frozen=True)
class Run:
    """One run on the cluster."""

    cluster: Cluster
    run_id: str
    name: str

    def state(self) -> str:
        """Return the state that the KFP API reports."""
        return str(self.cluster.kfp.get_run(self.run_id).state)

    def wait(self, *, seconds: float = LONG_SECONDS) -> str:
        """Wait until the run has ended, and return its state in KFP."""
        api = self.cluster.kfp

        def ended() -> str | None:
            state = str(api.get_run(self.run_id).state)
            return state if state in FINISHED else None

        return until(ended, f"run {self.run_id} to end", seconds=seconds)

    def status(self) -> str:
        return self.cluster.tuneline("status", self.run_id, *self.cluster.options())

    def steps(self) -> dict[str, str]:
        """Return the state of each step, by its name, from the table that `status` prints."""
        rows = [re.split(r"\s{2,}", line.strip()) for line in self.status().splitlines()]
        start = next(number for number, row in enumerate(rows) if row[:2] == ["step", "state"])
        return {row[0]: row[1] for row in rows[start + 1 :] if len(row) > 1}

    def doctor(self) -> str:
        return self.cluster.tuneline(
            "doctor", self.run_id, "--namespace", self.cluster.pod_namespace
        )

    def logs(self, step: str) -> str:
        return self.cluster.tuneline("logs", self.run_id, step, *self.cluster.options())

    def diagnosis(self) -> Ending:
        """Return what the exit handler concluded: the outcome as `result`, the cause as `text`."""
        pod = max(self.pods("diagnose"), key=lambda pod: pod.metadata.creation_timestamp)
        states = {each.name: each.state for each in pod.status.container_statuses}
        ending = decode(states["main"].terminated.message)
        assert ending, f"diagnose left no termination message in pod {pod.metadata.name}"
        return ending

    def outputs(self, step: str) -> dict[str, dict[str, Any]]:
        """Return the metadata of a step's artifacts, which KFP's launcher writes to the log."""
        _, _, text = self.logs(step).rpartition("ExecutorOutput: ")
        record, _ = json.JSONDecoder().raw_decode(text)
        return {
            name: entry["artifacts"][0].get("metadata", {})
            for name, entry in record["artifacts"].items()
        }

    def pods(self, step: str | None = None) -> list[Any]:
        """Return the run's pods, or those of one step without KFP's drivers."""
        selector = f"{RUN_LABEL}={self.run_id}"
        if step:
            selector += f",{STEP_LABEL}={step}"
        pods: list[Any] = self.cluster.core.list_namespaced_pod(
            self.cluster.pod_namespace, label_selector=selector
        ).items
        return pods

    def wait_for_log(self, step: str, pattern: str, *, seconds: float = LONG_SECONDS) -> str:
        """Wait until a running pod of a step logs a line; return the pod's name."""
        core, namespace = self.cluster.core, self.cluster.pod_namespace

        def logged() -> str | None:
            for pod in self.pods(step):
                if pod.status.phase != "Running":
                    continue
                with contextlib.suppress(client.ApiException):
                    text = core.read_namespaced_pod_log(
                        pod.metadata.name, namespace, container="main"
                    )
                    if re.search(pattern, text, re.M):
                        return str(pod.metadata.name)
            assert self.state() not in FINISHED, f"the run ended before {step} logged {pattern}"
            return None

        return until(logged, f"{step} to log {pattern}", seconds=seconds, every=2)

    def wait_for_end(self, step: str, *, seconds: float = LONG_SECONDS) -> None:
        """Wait until a pod of a step has succeeded."""

        def ended() -> bool | None:
            return any(pod.status.phase == "Succeeded" for pod in self.pods(step)) or None

        until(ended, f"{step} of run {self.run_id} to succeed", seconds=seconds)

    def report(self) -> str:
        """Return what a person reads after a failure: status and doctor."""
        texts = []
        for command in (self.status, self.doctor):
            try:
                texts.append(command())
            except Exception as error:
                texts.append(f"{command.__name__}: {error}")
        return "\n".join(texts)

    def cancel_if_running(self) -> None:
        with contextlib.suppress(kfp_server_api.ApiException):
            if self.state() not in FINISHED:
                self.cluster.kfp.terminate_run(self.run_id)
                self.wait(seconds=180)


def losses(run: Run) -> dict[str, float]:
    """Return the figures of a training that do not depend on the machine's speed."""
    metrics = run.outputs("train")["metrics"]
    return {name: value for name, value in metrics.items() if "loss" in name}


def until(
    probe: Callable[[], T | None],
    what: str,
    *,
    seconds: float = LONG_SECONDS,
    every: float = POLL_SECONDS,
) -> T:
    """Call `probe` until it returns something.

    Args:
        probe: returns None as long as the state has not been reached.
        what: the state, for the message.
        seconds: time limit.
        every: seconds between two calls.
    """
    end = time.monotonic() + seconds
    while True:
        result = probe()
        if result is not None:
            return result
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(every)
