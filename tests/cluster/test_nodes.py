"""Training on two nodes with Kubeflow Trainer, one rank on each."""

import pytest
from cluster_runs import Submit
from kubernetes import client
from real_cluster import Cluster, losses, until

from tuneline.pods import RUN_LABEL

pytestmark = pytest.mark.trainer

TRAINJOBS = ("trainer.kubeflow.org", "v1alpha1")
TWO_NODES = (
    "placement.num_nodes=2",
    "placement.steps.train.cpu_request=100m",
    "placement.steps.train.memory_request=512Mi",
)


@pytest.fixture
def shared(cluster: Cluster) -> str:
    """The assignment of the shared claim; the test is skipped if there is no Trainer."""
    try:
        trainjobs(cluster, "none")
    except client.ApiException as error:
        if error.status == 404:
            pytest.skip("Kubeflow Trainer is not installed: there is no trainer.kubeflow.org API")
        raise
    return f"placement.shared_claim={cluster.shared_claim}"


def trainjobs(cluster: Cluster, run_id: str) -> list[dict]:
    return client.CustomObjectsApi(cluster.api).list_namespaced_custom_object(
        *TRAINJOBS, cluster.pod_namespace, "trainjobs", label_selector=f"{RUN_LABEL}={run_id}"
    )["items"]


def test_two_nodes_train_the_same_adapter_as_one(
    submit: Submit, cluster: Cluster, shared: str
) -> None:
    two = submit(*TWO_NODES, shared)
    one = submit()
    assert two.wait() == "SUCCEEDED"
    assert two.steps()["train"] == "succeeded"
    assert "collected the adapter of 2 ranks" in two.logs("train")
    one.wait_for_end("train")
    assert losses(two) == pytest.approx(losses(one), rel=1e-2)


def test_a_cancelled_run_leaves_no_trainjob(submit: Submit, cluster: Cluster, shared: str) -> None:
    run = submit(*TWO_NODES, shared, "train.max_steps=5000")
    until(lambda: trainjobs(cluster, run.run_id) or None, "the TrainJob to be created", seconds=600)
    until(
        lambda: any(pod.status.phase == "Running" for pod in run.pods("train-node")) or None,
        "a pod of the TrainJob to run",
        seconds=300,
    )
    cluster.tuneline("cancel", run.run_id, *cluster.options())
    until(
        lambda: None if trainjobs(cluster, run.run_id) or run.pods("train-node") else True,
        "the TrainJob and its pods to be deleted",
        seconds=120,
        every=1,
    )
    run.wait(seconds=900)
    assert run.diagnosis().result == "cancelled"
