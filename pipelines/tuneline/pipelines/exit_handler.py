"""Let the exit handler of a resumed run run again.

KFP 2.17 keeps what succeeded when it retries a run, and the exit handler did. Here it is forgotten
like a failed step: its nodes are removed from the workflow, after its pods, because Argo would wait
for a pod that has the name of the new one. This needs the right to patch workflows and to delete
pods. It was tried on Argo 4.0.5.
"""

from typing import Any

from tuneline.pipelines.kube import Kube
from tuneline.pipelines.kube_api import Right, or_none
from tuneline.pods import RUN_LABEL
from tuneline.runtime.kfp_run import NODE_ID

WORKFLOWS = ("argoproj.io", "v1alpha1")
RIGHTS = (Right("patch", "workflows", WORKFLOWS[0]), Right("delete", "pods"))


def forget_exit_handler(kube: Kube, run_id: str) -> bool:
    """Remove the exit handler from a run that was just resumed; return whether it runs again.

    Args:
        kube: where the run's workflow is.
        run_id: ID of the run.

    Raises:
        ClusterError: Kubernetes failed.
        CredentialsError: the credentials may not read the run.
    """
    if not all(kube.may(right) for right in RIGHTS):
        return False
    selector = f"{RUN_LABEL}={run_id}"
    for workflow in kube.workflows(selector):
        # Nodes that Argo has compressed cannot be patched one by one.
        nodes: dict[str, Any] = workflow.get("status", {}).get("nodes", {})
        gone = {key for key, node in nodes.items() if ".onExit" in node["name"]}
        if not gone:
            return False
        for pod in kube.pods(selector):
            if pod["metadata"].get("annotations", {}).get(NODE_ID) in gone:
                _delete_pod(kube, pod["metadata"]["name"])
        name, patch = workflow["metadata"]["name"], {"status": {"nodes": dict.fromkeys(gone)}}
        with kube.explained(f"a change of workflow {name}"):
            kube.custom.patch_namespaced_custom_object(
                *(*WORKFLOWS, kube.namespace, "workflows", name, patch)
            )
        return True
    return False


def _delete_pod(kube: Kube, name: str) -> None:
    with kube.explained(f"the deletion of pod {name}"):
        or_none(kube.core.delete_namespaced_pod, *(name, kube.namespace), _preload_content=False)
