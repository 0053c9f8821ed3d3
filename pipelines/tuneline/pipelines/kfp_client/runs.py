"""Start, find, cancel and resume runs on Kubeflow Pipelines, through kfp.Client.

Authentication is kfp's own: a session cookie in ~/.config/kfp/context.json, the token that a
cluster projects into its pods, or a token in the environment variable KFP_TOKEN. A token is never
an argument, which other users could read in the process list.
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
from typing import Any, cast

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
from tuneline.runtime.parameter_text import find_replaced

HOST_VARIABLE = "KFP_ENDPOINT"
TOKEN_VARIABLE = "KFP_TOKEN"
KFP_HOST_VARIABLE = "KF_PIPELINES_ENDPOINT"
"""Environment variable from which kfp also reads the host."""

POD_TOKEN_PATH = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
PROJECTED_TOKEN_PATH = Path("/var/run/secrets/kubeflow/pipelines/token")

CONNECT_SECONDS = 10
"""Time limit for opening a connection to the host."""

FINISHED_STATES = ("SUCCEEDED", "SKIPPED", "FAILED", "CANCELED")
RESUMABLE_STATES = ("FAILED", "CANCELED")

# Servers newer than 2.17 have only the first path, 2.17 has only the second.
LOG_PATHS = (
    "/apis/v2beta1/runs/{run_id}/nodes/{pod}/log",
    "/apis/v1alpha1/runs/{run_id}/nodes/{pod}/log",
)


# Any, because kfp.Client declares its optional arguments without None and its results as unions.
_KfpClient: Any = cast(Any, kfp.Client)


class Client(_KfpClient):  # type: ignore[misc, unused-ignore]  # kfp has no types
    """A kfp.Client that checks the server's health once; kfp's own repeats that for 25 seconds."""

    def get_kfp_healthz(self, sleep_duration: int = 0) -> Any:
        """Return the server's health record, or raise the first error."""
        health = self._healthz_api.healthz_service_get_healthz()
        if health.multi_user is None:
            # A login page also answers with status 200.
            raise CredentialsError(
                "the answer is not from Kubeflow Pipelines, perhaps a login page: check that the "
                f"host is that of the API, and log in or set {TOKEN_VARIABLE}"
            )
        return health

    def read_log(self, run_id: str, pod: str) -> str:
        """Return the log of a pod's main container; kfp.Client has no method for it."""
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
                return str(response.data, "utf-8", "replace")
        raise AssertionError("the last path returns or raises")

    def resume_run(self, run_id: str) -> None:
        """Ask the server to retry the failed tasks of a run; kfp.Client has no method for it."""
        self._run_api.run_service_retry_run(run_id)


def connect(host: str | None) -> Client:
    """Connect to the KFP API at `host`; None: the environment tells the host.

    Raises:
        UserError: no host is given, and none can be found.
        CredentialsError: the server does not accept the credentials.
        ClusterError: the server is unreachable.
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
    with readable_errors(), warnings.catch_warnings():
        # kfp warns that it does not support servers before 2.0.
        warnings.simplefilter("ignore", FutureWarning)
        return Client(
            host=host,
            existing_token=os.environ.get(TOKEN_VARIABLE),
            credentials=credentials if projected else None,
        )


def _probe(host: str) -> None:
    """Try to open a connection once; kfp.Client would retry an unreachable host for minutes."""
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
def readable_errors() -> Iterator[None]:
    """Translate kfp's exceptions into tuneline's errors, and suppress what kfp prints.

    Raises:
        CredentialsError: the server answered 401 or 403.
        ClusterError: the server answered with another error, or is unreachable.
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
    message = message_of(error)
    if error.status == 401:
        return CredentialsError(
            f"Kubeflow Pipelines cannot identify you (401: {message}): log in again, or set "
            f"{TOKEN_VARIABLE} to a token that has not expired"
        )
    if error.status == 403:
        return CredentialsError(
            f"Kubeflow Pipelines denies this request (403: {message}): name one of your namespaces "
            "with --namespace, or ask the owner of the namespace for permission"
        )
    return ClusterError(f"Kubeflow Pipelines answered {error.status}: {message}")


def message_of(error: kfp_server_api.ApiException) -> str:
    """Return the server's message on one line of at most 300 characters."""
    body = error.body.decode("utf-8", "replace") if isinstance(error.body, bytes) else error.body
    try:
        fields = json.loads(body or "")
        message = fields.get("message") or fields.get("error_message") or fields.get("error")
    except (ValueError, AttributeError):
        message = None
    return " ".join(str(message or error.reason or "no reason given").split())[:300]


@contextlib.contextmanager
def compiled(recipe: Recipe, *, cache: bool = True) -> Iterator[Path]:
    """Compile a recipe to a temporary file, and check the file as `tuneline lint` does.

    Args:
        recipe: the recipe to compile.
        cache: whether KFP may reuse results of earlier tasks.

    Raises:
        RecipeError: the pipeline has a security problem.
    """
    with tempfile.TemporaryDirectory(prefix="tuneline-") as directory:
        path = Path(directory) / "pipeline.yaml"
        compiler.Compiler().compile(finetune(recipe), str(path))
        if not cache:
            _forbid_cache(path)
        findings = lint_file(path)
        if findings:
            raise RecipeError(f"the pipeline was not sent because the lint found: {findings[0]}")
        yield path


def _forbid_cache(path: Path) -> None:
    # kfp.Client can switch off the cache only for tasks of the root pipeline. tuneline's tasks are
    # inside an exit handler, which is a nested pipeline.
    pipeline, *others = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    for component in (pipeline["root"], *pipeline["components"].values()):
        for task in component.get("dag", {}).get("tasks", {}).values():
            task["cachingOptions"] = {}
    path.write_text(yaml.safe_dump_all([pipeline, *others]), encoding="utf-8")


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
    """Start a run of a compiled pipeline and return the run's ID.

    Args:
        client: connection to the KFP API.
        pipeline: file of the compiled pipeline.
        name: display name of the run.
        experiment: KFP experiment of the run; created if it does not exist.
        namespace: the user's namespace, on Kubeflow with profiles.
        service_account: service account that the run's pods use; None: KFP's default.
        pipeline_root: URI under which KFP stores artifacts; None: KFP's default.

    Raises:
        UserError: Argo or Kubernetes would replace a part of the name or of the URI.
    """
    check_passed_on(name, pipeline_root)
    with readable_errors():
        group = client.create_experiment(experiment, namespace=namespace)
        run = client.run_pipeline(
            experiment_id=group.experiment_id,
            job_name=name,
            pipeline_package_path=str(pipeline),
            pipeline_root=pipeline_root,
            service_account=service_account,
        )
    return str(run.run_id)


def check_passed_on(name: str, pipeline_root: str | None) -> None:
    """Check the texts of a request that KFP passes to its own pods, where they cannot be decoded.

    Raises:
        UserError: Argo or Kubernetes would replace a part of a text.
    """
    for option, text in (("--name", name), ("--pipeline-root", pipeline_root or "")):
        found = find_replaced(text)
        if found is not None:
            raise UserError(
                f"{option} '{text}' contains '{found}', which Kubernetes or Argo would replace: "
                "write it without $$, $(, {{ and [[..."
            )


def recent_runs(client: Client, *, namespace: str | None = None, limit: int = 10) -> list[Any]:
    """Return the most recent runs, newest first."""
    with readable_errors():
        page = client.list_runs(
            page_size=limit, sort_by="created_at desc", namespace=namespace or None
        )
    return page.runs or []


def find_run(client: Client, name: str, *, namespace: str | None = None) -> Any:
    """Return the run with this ID, or the newest run with this name.

    Raises:
        UserError: there is no such run.
    """
    with readable_errors():
        if is_run_id(name):
            try:
                return client.get_run(name)
            except kfp_server_api.ApiException as error:
                if error.status != 404:
                    raise
        else:
            page = client.list_runs(
                page_size=1,
                sort_by="created_at desc",
                namespace=namespace or None,
                filter=by_display_name(name),
            )
            if page.runs:
                # A list of runs does not include their tasks, so the run is requested by its ID.
                return client.get_run(page.runs[0].run_id)
    names = [run.display_name for run in recent_runs(client, namespace=namespace)]
    hint = f"the newest are {', '.join(names)}" if names else "there are none yet"
    raise UserError(f"no run '{name}': {hint}")


def cancel(client: Client, run: Any) -> None:
    """Cancel a run.

    Raises:
        UserError: the run has ended already.
    """
    if run.state in FINISHED_STATES:
        raise UserError(f"run {run.display_name} has ended already: {run.state}")
    with readable_errors():
        client.terminate_run(run.run_id)


def resume(client: Client, run: Any) -> None:
    """Re-run the failed steps of a run and the steps after them, but no finished step.

    Raises:
        UserError: the run did not fail and was not cancelled.
    """
    if run.state not in RESUMABLE_STATES:
        raise UserError(
            f"run {run.display_name} is {run.state}: only a run that is "
            f"{' or '.join(RESUMABLE_STATES)} can be resumed"
        )
    with readable_errors():
        client.resume_run(run.run_id)


def step_names(run: Any) -> list[str]:
    """Return the names of a run's steps, in the order in which they started."""
    tasks = sorted(tasks_of(run), key=lambda task: (task.start_time is None, task.start_time))
    return [
        task.display_name
        for task in tasks
        if not task.display_name.endswith("driver")
        and task.display_name not in ("root", "executor")
        # KFP lists the workflow itself as a task.
        and task.display_name != task.task_id
    ]


def pods_of(run: Any, step: str) -> list[str]:
    """Return the names of the pods that ran a step's own container, one per attempt.

    Raises:
        UserError: the run has no such step, or the step has no pod.
    """
    tasks = {task.task_id: task for task in tasks_of(run)}
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
            # The name of an Argo node and the name of the node's pod end in the same number.
            wanted += [
                candidate
                for task_id, candidate in tasks.items()
                if task_id == child.task_id
                or (child.pod_name and task_id.rpartition("-")[2] == child.pod_name.split("-")[-1])
            ]
    executor_pods = [pod for pod in dict.fromkeys(pods) if "-impl-" in pod]
    if not executor_pods:
        raise UserError(
            f"step '{step}' of run {run.display_name} has no pod: it is still waiting, or its "
            "result came from the cache"
        )
    return executor_pods


def by_display_name(name: str) -> str:
    """Return the filter that selects one display name in requests to KFP."""
    predicate = {"operation": "EQUALS", "key": "display_name", "stringValue": name}
    return json.dumps({"predicates": [predicate]})


def tasks_of(run: Any) -> list[Any]:
    """Return the tasks of a run; KFP lists drivers and the workflow itself among them."""
    return list((run.run_details and run.run_details.task_details) or [])


def is_run_id(name: str) -> bool:
    """Return whether `name` is a run ID (a UUID)."""
    try:
        return str(uuid.UUID(name)) == name.lower()
    except ValueError:
        return False
