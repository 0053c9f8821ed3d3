"""Let the exit handler of a resumed run run again.

KFP 2.17 keeps what succeeded when it retries a run, and the exit handler did. It is forgotten like
a failed step: its nodes are removed from the workflow, and its pods, whose names the new ones would
have, are deleted. This needs the right to patch workflows and to delete pods.
"""

from typing import Any

from tuneline.pipelines.kube import Kube, Right
from tuneline.pods import RUN_LABEL

RIGHTS = (Right("patch", "workflows", "argoproj.io"), Right("delete", "pods"))


def forget_exit_handler(kube: Kube, run_id: str) -> bool:
    """Remove the exit handler from a run that was just resumed; return whether it runs again.

    Args:
        kube: where the run's workflow is.
        run_id: ID of the run.

    Raises:
        ClusterError: Kubernetes failed.
        CredentialsError: the credentials lack a right.
    """
    if not all(kube.may(right) for right in RIGHTS):
        return False
    for workflow in kube.workflows(f"{RUN_LABEL}={run_id}"):
        # Nodes that Argo has compressed cannot be patched one by one.
        nodes: dict[str, Any] = workflow.get("status", {}).get("nodes", {})
        gone = {key for key, node in nodes.items() if ".onExit" in node["name"]}
        if not gone:
            return False
        kube.delete_pods(f"{RUN_LABEL}={run_id}", nodes=gone)
        patch = {"status": {"nodes": dict.fromkeys(gone)}}
        kube.patch_workflow(workflow["metadata"]["name"], patch)
        return True
    return False
