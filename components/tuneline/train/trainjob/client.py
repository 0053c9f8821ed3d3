"""The Kubernetes API as the launcher uses it: TrainJobs, their pods, and the launcher's own pod."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import urllib3
from kubernetes import client

from tuneline.errors import ClusterError, CredentialsError
from tuneline.pods import RUN_LABEL
from tuneline.runtime.kubernetes_client import AWAY
from tuneline.train.trainjob.manifest import CONTAINER, GROUP, HEARTBEAT, PLURAL, VERSION
from tuneline.train.trainjob.pod_state import refusal

JOBSETS = ("jobset.x-k8s.io", "v1alpha2")
"""API group and version of JobSet; Trainer creates one for each job, with the job's name."""
JOBSET_LABEL = "jobset.sigs.k8s.io/jobset-name"


class ApiUnavailable(ClusterError):
    """The API is unreachable or temporarily cannot answer."""


class TrainJobs:
    """The TrainJobs of a namespace."""

    def __init__(self, api: client.ApiClient, namespace: str) -> None:
        self.namespace = namespace
        # Any: the types of the generated client are unions with what its other modes return.
        self._api: Any = api
        self._core: Any = client.CoreV1Api(api)
        self._custom: Any = client.CustomObjectsApi(api)
        self._where = (GROUP, VERSION, namespace, PLURAL)

    def supported(self) -> set[str]:
        """Return the fields of `spec` that the installed Trainer knows.

        The fields are read from the API's OpenAPI schema, which every authenticated user may read.
        To read the custom resource definition instead, one has to be an administrator.

        Raises:
            ClusterError: Kubeflow Trainer v2 is not installed.
        """
        with self._errors_named("reading the schema of TrainJob"):
            try:
                schemas = self._api.call_api(
                    f"/openapi/v3/apis/{GROUP}/{VERSION}",
                    "GET",
                    header_params={"Accept": "application/json"},
                    auth_settings=["BearerToken"],
                    response_type="object",
                    _return_http_data_only=True,
                )
            except client.ApiException as error:
                if error.status != 404:
                    raise
                raise ClusterError(
                    f"this cluster has no {GROUP}/{VERSION}, but several nodes need Kubeflow "
                    "Trainer 2.0 or later: install it, or set placement.num_nodes to 1"
                ) from None
        for schema in schemas["components"]["schemas"].values():
            names = schema.get("x-kubernetes-group-version-kind", [])
            if any(name["kind"] == "TrainJob" for name in names):
                return set(schema["properties"]["spec"]["properties"])
        raise ClusterError(
            f"{GROUP}/{VERSION} has no kind TrainJob: install Kubeflow Trainer 2.0 or later, or "
            "set placement.num_nodes to 1"
        )

    def get(self, name: str) -> dict[str, Any] | None:
        """Return a job, or None if it does not exist."""
        with self._errors_named(f"reading trainjob {name}"):
            try:
                job: dict[str, Any] = self._custom.get_namespaced_custom_object(*self._where, name)
                return job
            except client.ApiException as error:
                if error.status == 404:
                    return None
                raise

    def create(self, body: dict[str, Any]) -> None:
        """Create a job, unless a job of that name exists."""
        with self._errors_named(f"creating trainjob {body['metadata']['name']}"):
            try:
                # Without Strict, the API would silently drop a field that this Trainer lacks.
                self._custom.create_namespaced_custom_object(
                    *self._where, body, field_validation="Strict"
                )
            except client.ApiException as error:
                if error.status != 409:
                    raise

    def delete(self, name: str) -> None:
        """Delete a job, if it exists; Kubernetes then deletes what was created for it.

        With the propagation policy Foreground, the job would exist until its pods are gone, and
        Trainer 2.3 would meanwhile create its JobSet again, and so new pods.
        """
        with self._errors_named(f"deleting trainjob {name}"):
            try:
                self._custom.delete_namespaced_custom_object(
                    *self._where, name, propagation_policy="Background"
                )
            except client.ApiException as error:
                if error.status != 404:
                    raise

    def has_remains(self, name: str) -> bool:
        """Return whether a JobSet or pods of a job still exist, although the job was deleted."""
        with self._errors_named(f"reading jobset {name}"):
            try:
                self._custom.get_namespaced_custom_object(*JOBSETS, self.namespace, "jobsets", name)
            except client.ApiException as error:
                if error.status != 404:
                    raise
            else:
                return True
        return bool(self.pods(name))

    def beat(self, name: str, moment: str) -> None:
        """Write the time of the launcher's heartbeat to a job.

        Args:
            name: Name of the job.
            moment: The time, in RFC 3339 format.
        """
        with self._errors_named(f"writing the heartbeat of trainjob {name}"):
            self._custom.patch_namespaced_custom_object(
                *self._where, name, {"metadata": {"annotations": {HEARTBEAT: moment}}}
            )

    def pods(self, name: str) -> list[Any]:
        """Return the pods of a job, sorted by name."""
        with self._errors_named(f"listing the pods of trainjob {name}"):
            pods = self._core.list_namespaced_pod(
                self.namespace, label_selector=f"{JOBSET_LABEL}={name}"
            ).items
        return sorted(pods, key=lambda pod: str(pod.metadata.name))

    def refusal(self, name: str) -> str | None:
        """Return why Kubernetes last refused to create the pods of a job; None if it did not."""
        with self._errors_named(f"listing the events of trainjob {name}"):
            events = self._core.list_namespaced_event(
                self.namespace, field_selector="type=Warning"
            ).items
        return refusal(events, name)

    def log(self, pod: str, **options: Any) -> list[str]:
        """Return lines of a pod's log; none if the pod has not started or is gone.

        Args:
            pod: Name of the pod.
            options: Passed on to the API, such as `tail_lines` or `since_seconds`.
        """
        with self._errors_named(f"reading the log of pod {pod}"):
            try:
                text: str | None = self._core.read_namespaced_pod_log(
                    pod, self.namespace, container=CONTAINER, **options
                )
            except client.ApiException as error:
                # 400: the container is being created.
                if error.status in (400, 404):
                    return []
                raise
        return (text or "").splitlines()

    def run_of(self, pod: str) -> tuple[dict[str, Any] | None, str]:
        """Return the workflow that owns a step's pod, as an owner reference, and the run ID.

        The reference is None if no workflow owns the pod. The run ID is empty if the pod has none.
        """
        with self._errors_named(f"reading pod {pod}"):
            body = self._core.read_namespaced_pod(pod, self.namespace)
        run_id = (body.metadata.labels or {}).get(RUN_LABEL, "")
        for owner in body.metadata.owner_references or []:
            if owner.kind == "Workflow":
                return {
                    "apiVersion": owner.api_version,
                    "kind": owner.kind,
                    "name": owner.name,
                    "uid": owner.uid,
                }, run_id
        return None, run_id

    @contextlib.contextmanager
    def _errors_named(self, action: str) -> Iterator[None]:
        """Convert errors of the Kubernetes client to TunelineErrors that name the action."""
        try:
            yield
        except client.ApiException as error:
            message = re.sub(r"\s+", " ", _message(error))[:300]
            if error.status in AWAY:
                raise ApiUnavailable(
                    f"Kubernetes answered with status {error.status} when {action}"
                ) from None
            if error.status in (401, 403):
                raise CredentialsError(
                    f"Kubernetes refused access when {action} in namespace {self.namespace} "
                    f"({error.status}: {message}): run with the service account tuneline-runner of "
                    "manifests/components/trainer"
                ) from None
            raise ClusterError(
                f"Kubernetes answered with status {error.status} when {action}: {message}"
            ) from None
        except urllib3.exceptions.HTTPError as error:
            raise ApiUnavailable(
                f"Kubernetes was unreachable when {action} ({type(error).__name__})"
            ) from None


def _message(error: client.ApiException) -> str:
    match = re.search(r'"message":\s*"((?:[^"\\]|\\.)*)"', str(error.body or ""))
    return match[1] if match else str(error.reason)
