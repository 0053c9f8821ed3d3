"""Read what Kubernetes knows about this pod's run, and delete TrainJobs that the run left behind.

The exit handler must not fail, so every problem becomes a sentence in `ClusterRun.remarks`.
"""

import logging
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import urllib3
from kubernetes import client

from tuneline.errors import TunelineError
from tuneline.pods import POD_NAME_VARIABLE, RUN_LABEL, STEP_LABEL, TRAINJOBS
from tuneline.runtime.kfp_run import WORKFLOW_LABEL
from tuneline.runtime.kubernetes_client import connect, own_namespace, true_conditions

logger = logging.getLogger(__name__)

_NUM_RETRIES = 5
_SECONDS_PER_REQUEST = (5, 30)
"""Limits for connecting and for reading."""


@dataclass
class ClusterRun:
    """The Kubernetes objects of a run, as far as they could be read."""

    pods: list[dict[str, Any]] = field(default_factory=list)
    workflow: dict[str, Any] | None = None
    deleted_jobs: list[str] = field(default_factory=list)
    """Names of the TrainJobs that were deleted."""
    remarks: list[str] = field(default_factory=list)
    """What could not be read or deleted, and why; full sentences."""


def read_own_run() -> ClusterRun | None:
    """Read the run of this pod, and delete its TrainJobs; return None outside a pod of KFP."""
    pod, namespace = os.environ.get(POD_NAME_VARIABLE), own_namespace()
    if not pod or not namespace:
        return None
    found = ClusterRun()
    try:
        api = connect(num_retries=_NUM_RETRIES, backoff_seconds=0.5)
    except TunelineError as error:
        found.remarks.append(f"Kubernetes could not be read: {error}.")
    else:
        _Reader(api, namespace, found).read(pod)
    for remark in found.remarks:
        logger.warning("%s", remark)
    return found


class _Reader:
    """Fills a `ClusterRun`; the requests are those that manifests/ permits."""

    def __init__(self, api: client.ApiClient, namespace: str, found: ClusterRun) -> None:
        # Any: the types of the generated client are unions with what its other modes return.
        self._api: Any = api
        self._pods = f"/api/v1/namespaces/{namespace}/pods"
        self._workflows = f"/apis/argoproj.io/v1alpha1/namespaces/{namespace}/workflows"
        group, version, plural = TRAINJOBS
        self._jobs = f"/apis/{group}/{version}/namespaces/{namespace}/{plural}"
        self._found = found

    def read(self, own_pod: str) -> None:
        """Read the objects, starting from the labels of the pod that this process runs in."""
        own = self._request(f"{self._pods}/{own_pod}", "the pod of this step")
        if own is None:
            return
        labels = own["metadata"].get("labels", {})
        run_id, workflow = labels.get(RUN_LABEL), labels.get(WORKFLOW_LABEL)
        if not run_id or not workflow:
            self._found.remarks.append(f"Pod {own_pod} does not name its run in its labels.")
            return
        selector = f"{RUN_LABEL}={run_id}"
        listed = self._request(self._pods, "the pods of this run", selector=selector)
        self._found.pods = listed["items"] if listed else [own]
        self._found.workflow = self._request(
            f"{self._workflows}/{workflow}", "the workflow of this run"
        )
        self._delete_jobs(selector)

    def _delete_jobs(self, selector: str) -> None:
        """Delete the run's TrainJobs that have not ended, because nobody follows them any more."""
        steps = {pod["metadata"].get("labels", {}).get(STEP_LABEL) for pod in self._found.pods}
        # Without that step, Trainer need not be installed, nor its permissions granted.
        ignored = () if "train-on-nodes" in steps else (403, 404)
        listed = self._request(
            self._jobs, "the TrainJobs of this run", selector=selector, ignored=ignored
        )
        for job in (listed or {}).get("items", []):
            name = job["metadata"]["name"]
            if not true_conditions(job).keys() & {"Complete", "Failed"}:
                what = f"TrainJob {name}, which may still use GPUs,"
                if self._request(f"{self._jobs}/{name}", what, method="DELETE", ignored=(404,)):
                    self._found.deleted_jobs.append(name)

    def _request(
        self,
        path: str,
        what: str,
        *,
        method: str = "GET",
        selector: str = "",
        ignored: Collection[int] = (),
    ) -> dict[str, Any] | None:
        """Return the answer, or None; then a remark says why, unless the status is ignored."""
        query = {"labelSelector": selector} if selector else {}
        if method == "DELETE":
            # With Foreground, Trainer 2.3 creates the JobSet of a deleted job again.
            query["propagationPolicy"] = "Background"
        verb = "deleted" if method == "DELETE" else "read"
        try:
            answer: dict[str, Any] = self._api.call_api(
                path,
                method,
                query_params=list(query.items()),
                header_params={"Accept": "application/json"},
                auth_settings=["BearerToken"],
                response_type="object",
                _return_http_data_only=True,
                _request_timeout=_SECONDS_PER_REQUEST,
            )
            return answer
        except client.ApiException as error:
            if error.status not in ignored:
                self._found.remarks.append(
                    f"Kubernetes answered with status {error.status} ({error.reason}), so {what} "
                    f"could not be {verb}."
                )
        except urllib3.exceptions.HTTPError as error:
            self._found.remarks.append(
                f"Kubernetes is unreachable ({type(error).__name__}), so {what} could not be "
                f"{verb}."
            )
        return None
