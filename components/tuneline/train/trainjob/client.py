"""What the launcher asks of Kubernetes: TrainJobs, their pods, and its own pod."""

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

JOBSET_LABEL = "jobset.sigs.k8s.io/jobset-name"


class Away(ClusterError):
    """The API did not answer, or said that it cannot now."""


class TrainJobs:
    """The TrainJobs of a namespace."""

    def __init__(self, api: client.ApiClient, namespace: str) -> None:
        self.namespace = namespace
        self._api = api
        self._core = client.CoreV1Api(api)
        self._custom = client.CustomObjectsApi(api)
        self._where = (GROUP, VERSION, namespace, PLURAL)

    def supported(self) -> set[str]:
        """Return the fields of `spec` that the installed Trainer knows.

        From the API's own schema, which everyone who is logged in may read; the resource's
        definition is for administrators.

        Raises:
            ClusterError: Kubeflow Trainer v2 is not installed.
        """
        with self._plainly("the schema of TrainJob"):
            try:
                answer = self._api.call_api(
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
                    f"this cluster has no {GROUP}/{VERSION}: several nodes need Kubeflow Trainer "
                    "2.0 or later; set placement.num_nodes to 1, or have it installed"
                ) from None
        for schema in answer["components"]["schemas"].values():
            kinds = {each["kind"] for each in schema.get("x-kubernetes-group-version-kind", [])}
            if "TrainJob" in kinds:
                return set(schema["properties"]["spec"]["properties"])
        raise ClusterError(f"{GROUP}/{VERSION} has no TrainJob: is it Kubeflow Trainer 2?")

    def get(self, name: str) -> dict[str, Any] | None:
        """Return a job, or None."""
        with self._plainly(f"trainjob {name}"):
            try:
                return self._custom.get_namespaced_custom_object(*self._where, name)
            except client.ApiException as error:
                if error.status == 404:
                    return None
                raise

    def create(self, body: dict[str, Any]) -> None:
        """Create a job; one of that name that is there already stays as it is."""
        with self._plainly(f"a new trainjob {body['metadata']['name']}"):
            try:
                # Strict: a field that this Trainer does not know would be dropped in silence.
                self._custom.create_namespaced_custom_object(
                    *self._where, body, field_validation="Strict"
                )
            except client.ApiException as error:
                if error.status != 409:
                    raise

    def delete(self, name: str) -> None:
        """Delete a job with its pods; one that is gone is no error."""
        with self._plainly(f"deleting trainjob {name}"):
            try:
                self._custom.delete_namespaced_custom_object(
                    *self._where, name, propagation_policy="Foreground"
                )
            except client.ApiException as error:
                if error.status != 404:
                    raise

    def beat(self, name: str, moment: str) -> None:
        """Note on a job that it is looked after."""
        with self._plainly(f"a note on trainjob {name}"):
            self._custom.patch_namespaced_custom_object(
                *self._where, name, {"metadata": {"annotations": {HEARTBEAT: moment}}}
            )

    def pods(self, name: str) -> list[Any]:
        """Return a job's pods, by their names."""
        with self._plainly(f"pods of trainjob {name}"):
            found = self._core.list_namespaced_pod(
                self.namespace, label_selector=f"{JOBSET_LABEL}={name}"
            ).items
        return sorted(found, key=lambda pod: pod.metadata.name)

    def log(self, pod: str, **which: Any) -> list[str]:
        """Return lines of a pod's log; none of a pod that has not started or is gone."""
        with self._plainly(f"the log of pod {pod}"):
            try:
                text = self._core.read_namespaced_pod_log(
                    pod, self.namespace, container=CONTAINER, **which
                )
            except client.ApiException as error:
                # 400: the container is being created.
                if error.status in (400, 404):
                    return []
                raise
        return (text or "").splitlines()

    def run_of(self, pod: str) -> tuple[dict[str, Any] | None, str]:
        """Return the workflow that a step's pod belongs to, as an owner, and the run's id."""
        with self._plainly(f"pod {pod}"):
            found = self._core.read_namespaced_pod(pod, self.namespace)
        run_id = (found.metadata.labels or {}).get(RUN_LABEL, "")
        for owner in found.metadata.owner_references or []:
            if owner.kind == "Workflow":
                return {
                    "apiVersion": owner.api_version,
                    "kind": owner.kind,
                    "name": owner.name,
                    "uid": owner.uid,
                }, run_id
        return None, run_id

    @contextlib.contextmanager
    def _plainly(self, what: str) -> Iterator[None]:
        try:
            yield
        except client.ApiException as error:
            said = re.sub(r"\s+", " ", _message(error))[:300]
            if error.status in AWAY:
                raise Away(f"Kubernetes answered {error.status} when asked for {what}") from None
            if error.status in (401, 403):
                raise CredentialsError(
                    f"Kubernetes refuses {what} in namespace {self.namespace} ({error.status}: "
                    f"{said}): run with the service account of manifests/components/trainer, "
                    "tuneline-runner"
                ) from None
            raise ClusterError(
                f"Kubernetes answered {error.status} when asked for {what}: {said}"
            ) from None
        except urllib3.exceptions.HTTPError as error:
            raise Away(
                f"Kubernetes cannot be reached for {what} ({type(error).__name__})"
            ) from None


def _message(error: client.ApiException) -> str:
    found = re.search(r'"message":\s*"((?:[^"\\]|\\.)*)"', str(error.body or ""))
    return found[1] if found else str(error.reason)
