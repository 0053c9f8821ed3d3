"""Send runs to Kubeflow Pipelines and follow them, through kfp.Client.

Authentication is kfp's own: a session cookie in ~/.config/kfp/context.json, the token that a
cluster projects into its pods, or one in the environment variable KFP_TOKEN; never an argument,
which others could read in the process list.
"""

import contextlib
import io
import json
import os
import re
import socket
import tempfile
import urllib.parse
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kfp
import kfp_server_api
import urllib3
import yaml
from kfp import compiler
from kfp.client import set_volume_credentials

from tuneline.errors import ClusterError, CredentialsError, RecipeError, UserError
from tuneline.pipelines.finetune import finetune
from tuneline.pipelines.lint.lint import lint_file
from tuneline.recipe import Recipe

HOST_VARIABLE = "KFP_ENDPOINT"
TOKEN_VARIABLE = "KFP_TOKEN"
KFP_HOST_VARIABLE = "KF_PIPELINES_ENDPOINT"
"""kfp's own name for it."""

POD_TOKEN_PATH = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
PROJECTED_TOKEN_PATH = Path("/var/run/secrets/kubeflow/pipelines/token")

CONNECT_SECONDS = 10

FINISHED_STATES = ("SUCCEEDED", "SKIPPED", "FAILED", "CANCELED")
RESUMABLE_STATES = ("FAILED", "CANCELED")

# Newer servers know the first path only, 2.17 the second only.
LOG_PATHS = (
    "/apis/v2beta1/runs/{run_id}/nodes/{pod}/log",
    "/apis/v1alpha1/runs/{run_id}/nodes/{pod}/log",
)


class Client(kfp.Client):
    """kfp.Client that asks for the server's health once instead of for 25 seconds."""

    def get_kfp_healthz(self, sleep_duration: int = 0) -> Any:
        """Return what the server says of itself; errors pass through."""
        health = self._healthz_api.healthz_service_get_healthz()
        if health.multi_user is None:
            # A login page is a successful answer, too.
            raise CredentialsError(
                "the answer is not that of Kubeflow Pipelines, perhaps a login page: check that "
                f"the host is the API's, and log in or set {TOKEN_VARIABLE}"
            )
        return health

    def read_log(self, run_id: str, pod: str) -> str:
        """Return what a pod's main container has written so far; kfp has no call for it."""
        for path in LOG_PATHS:
            try:
                response = self._run_api.api_client.call_api(
                    path,
                    "GET",
                    path_params={"run_id": run_id, "pod": pod},
                    auth_settings=["Bearer"],
                    _preload_content=False,
                    _return_http_data_only=True,
                )
            except kfp_server_api.ApiException as error:
                if error.status != 404 or path == LOG_PATHS[-1]:
                    raise
            else:
                return response.data.decode("utf-8", "replace")
        raise AssertionError("the last path returns or raises")

    def resume_run(self, run_id: str) -> None:
        """Have the server run a run's failed tasks again; kfp has no call for it."""
        self._run_api.run_service_retry_run(run_id)


def connect(host: str | None) -> Client:
    """Connect to `host`, or to what the environment names.

    Raises:
        UserError: there is no host, and nothing to find one by.
        CredentialsError: the server wants other credentials.
        ClusterError: the server cannot be reached.
    """
    host = host or os.environ.get(HOST_VARIABLE) or os.environ.get(KFP_HOST_VARIABLE)
    kube_config = Path(os.environ.get("KUBECONFIG") or Path.home() / ".kube" / "config")
    if not host and not POD_TOKEN_PATH.exists() and not kube_config.exists():
        raise UserError(
            f"no host: give --host URL or set {HOST_VARIABLE}, e.g. http://localhost:8080 after "
            "`kubectl port-forward -n kubeflow svc/ml-pipeline-ui 8080:80`"
        )
    if host:
        host = host if host.startswith("http") else f"https://{host}"
        _probe(host)
    projected = PROJECTED_TOKEN_PATH.exists() or "KF_PIPELINES_SA_TOKEN_PATH" in os.environ
    credentials = set_volume_credentials.ServiceAccountTokenVolumeCredentials()
    with plainly(), warnings.catch_warnings():
        # It warns of servers before 2.0.
        warnings.simplefilter("ignore", FutureWarning)
        return Client(
            host=host,
            existing_token=os.environ.get(TOKEN_VARIABLE),
            credentials=credentials if projected else None,
        )


def _probe(host: str) -> None:
    """Open a connection, because kfp's client would wait for minutes where nobody answers."""
    address = urllib.parse.urlsplit(host)
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname or "", port), CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise _unreachable(host, str(error)) from None


def _unreachable(host: str, reason: str) -> ClusterError:
    return ClusterError(
        f"Kubeflow Pipelines cannot be reached at {host} ({reason}): check --host or "
        f"{HOST_VARIABLE}, the network, and a port-forward that may have ended"
    )


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Turn the client's errors into sentences, and keep its prints away from ours.

    Raises:
        CredentialsError, ClusterError: what the body's error means.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except kfp_server_api.ApiException as error:
        raise _explain(error) from None
    except urllib3.exceptions.HTTPError as error:
        reason = getattr(error, "reason", None) or error
        address = getattr(getattr(error, "pool", None), "host", "the host")
        text = re.sub(r"^<.*?>: |^\w+\(.*?\): ", "", str(reason))
        raise _unreachable(address, text) from None


def _explain(error: kfp_server_api.ApiException) -> Exception:
    said = message_of(error)
    if error.status == 401:
        return CredentialsError(
            f"Kubeflow Pipelines does not know who asks (401: {said}): log in again, or set "
            f"{TOKEN_VARIABLE} to a token that has not expired"
        )
    if error.status == 403:
        return CredentialsError(
            f"Kubeflow Pipelines refuses this (403: {said}): name a namespace of yours with "
            "--namespace, or ask its owner for the rights"
        )
    return ClusterError(f"Kubeflow Pipelines answered {error.status}: {said}")


def message_of(error: kfp_server_api.ApiException) -> str:
    """Return the server's own words, on one line."""
    body = error.body.decode("utf-8", "replace") if isinstance(error.body, bytes) else error.body
    try:
        fields = json.loads(body or "")
        words = fields.get("message") or fields.get("error_message") or fields.get("error")
    except (ValueError, AttributeError):
        words = None
    return " ".join(str(words or error.reason or "no reason given").split())[:300]


@contextlib.contextmanager
def compiled(recipe: Recipe, *, cache: bool = True) -> Iterator[Path]:
    """Compile a recipe to a temporary file, and check it as `tuneline lint` does.

    Args:
        recipe: what to compile.
        cache: False: no task is taken from the cache.

    Raises:
        RecipeError: the pipeline has a fault that must not reach a cluster.
    """
    with tempfile.TemporaryDirectory(prefix="tuneline-") as directory:
        path = Path(directory) / "pipeline.yaml"
        compiler.Compiler().compile(finetune(recipe), str(path))
        if not cache:
            _forbid_cache(path)
        findings = lint_file(path)
        if findings:
            raise RecipeError(f"not sent, because of {findings[0]}")
        yield path


def _forbid_cache(path: Path) -> None:
    # The client's own switch reaches the root's tasks only, and ours are in an exit handler.
    pipeline, *rest = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    parts = [pipeline["root"], *pipeline["components"].values()]
    for task in (task for part in parts for task in part.get("dag", {}).get("tasks", {}).values()):
        task["cachingOptions"] = {}
    path.write_text(yaml.safe_dump_all([pipeline, *rest]), encoding="utf-8")


def submit(
    client: Client,
    pipeline: Path,
    *,
    name: str,
    experiment: str,
    namespace: str | None = None,
    service_account: str | None = None,
    pipeline_root: str | None = None,
) -> str:
    """Start a run of a compiled pipeline and return its id."""
    with plainly():
        found = client.create_experiment(experiment, namespace=namespace)
        run = client.run_pipeline(
            experiment_id=found.experiment_id,
            job_name=name,
            pipeline_package_path=str(pipeline),
            pipeline_root=pipeline_root,
            service_account=service_account,
        )
    return run.run_id


def recent_runs(client: Client, *, namespace: str | None = None, limit: int = 10) -> list[Any]:
    """Return the newest runs, the newest first."""
    with plainly():
        found = client.list_runs(
            page_size=limit, sort_by="created_at desc", namespace=namespace or None
        )
    return found.runs or []


def find_run(client: Client, name: str, *, namespace: str | None = None) -> Any:
    """Return a run by its id, or the newest one of a name.

    Raises:
        UserError: there is none.
    """
    with plainly():
        if is_id(name):
            try:
                return client.get_run(name)
            except kfp_server_api.ApiException as error:
                if error.status != 404:
                    raise
        else:
            found = client.list_runs(
                page_size=1,
                sort_by="created_at desc",
                namespace=namespace or None,
                filter=by_display_name(name),
            )
            if found.runs:
                # A list has no tasks in it.
                return client.get_run(found.runs[0].run_id)
    known = [run.display_name for run in recent_runs(client, namespace=namespace)]
    near = f"the newest are {', '.join(known)}" if known else "there are none yet"
    raise UserError(f"no run '{name}': {near}")


def cancel(client: Client, run: Any) -> None:
    """End a run.

    Raises:
        UserError: it has ended already.
    """
    if run.state in FINISHED_STATES:
        raise UserError(f"run {run.display_name} has ended already: {run.state}")
    with plainly():
        client.terminate_run(run.run_id)


def resume(client: Client, run: Any) -> None:
    """Run again what failed of a run, and what comes after it; finished steps stay as they are.

    Raises:
        UserError: it did not fail, so there is nothing to run again.
    """
    if run.state not in RESUMABLE_STATES:
        raise UserError(
            f"run {run.display_name} is {run.state}: only a run that is "
            f"{' or '.join(RESUMABLE_STATES)} can be resumed"
        )
    with plainly():
        client.resume_run(run.run_id)


def step_names(run: Any) -> list[str]:
    """Return the names of a run's steps: what a person calls a task, in the order of starting."""
    return [
        task.display_name
        for task in sorted(_tasks(run), key=lambda task: (task.start_time is None, task.start_time))
        if not task.display_name.endswith("driver")
        and task.display_name not in ("root", "executor")
        # The workflow itself.
        and task.display_name != task.task_id
    ]


def pods_of(run: Any, step: str) -> list[str]:
    """Return the pods that ran a step's own container, several after retries.

    Raises:
        UserError: the run has no such step, or it has no pod yet.
    """
    tasks = {task.task_id: task for task in _tasks(run)}
    wanted = [task for task in tasks.values() if task.display_name == step]
    if not wanted:
        names = ", ".join(step_names(run)) or "none yet"
        raise UserError(f"run {run.display_name} has no step '{step}': it has {names}")
    pods: list[str] = []
    seen: set[str] = set()
    while wanted:
        task = wanted.pop(0)
        if task.task_id in seen:
            continue
        seen.add(task.task_id)
        pods += [task.pod_name] if task.pod_name else []
        for child in task.child_tasks or []:
            pods += [child.pod_name] if child.pod_name else []
            # Argo ends the names of a node and of its pod with the same number.
            wanted += [
                found
                for task_id, found in tasks.items()
                if task_id == child.task_id
                or (child.pod_name and task_id.rpartition("-")[2] == child.pod_name.split("-")[-1])
            ]
    own = [pod for pod in dict.fromkeys(pods) if "-impl-" in pod]
    if not own:
        raise UserError(
            f"step '{step}' of run {run.display_name} has no pod: it waits, or it came from the "
            "cache"
        )
    return own


def by_display_name(name: str) -> str:
    """Return KFP's filter for one display name."""
    predicate = {"operation": "EQUALS", "key": "display_name", "stringValue": name}
    return json.dumps({"predicates": [predicate]})


def _tasks(run: Any) -> list[Any]:
    return list((run.run_details and run.run_details.task_details) or [])


def is_id(name: str) -> bool:
    """Say whether it is a run's id; otherwise it is a name."""
    try:
        return str(uuid.UUID(name)) == name.lower()
    except ValueError:
        return False
