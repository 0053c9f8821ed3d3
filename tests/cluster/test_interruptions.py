"""A pod of train that vanishes, and a run that is cancelled and resumed: training goes on."""

import re
import time

from cluster_runs import Submit
from real_cluster import Cluster, losses, until

STEPS = 30
UNDER_WAY = rf"step ([2-9]|1\d|2[0-5]) of {STEPS}\b"
"""A line of train's log with at least one checkpoint behind it and some steps ahead."""
TRAIN = (
    f"train.max_steps={STEPS}",
    "train.logging_steps=1",
    "train.checkpoint_minutes=0",  # after every step
)


def test_a_deleted_pod_goes_on_from_its_checkpoint(submit: Submit, cluster: Cluster) -> None:
    # Without the claim, the first run shares neither checkpoints nor KFP's cache with the second.
    undisturbed = submit(*TRAIN)
    disturbed = submit(*TRAIN, f"placement.cache_claim={cluster.claim}")
    pod = disturbed.wait_for_log("train", UNDER_WAY)
    cluster.core.delete_namespaced_pod(pod, cluster.pod_namespace)

    assert disturbed.wait() == "SUCCEEDED"
    log = disturbed.logs("train")
    assert re.search(r"continuing from \S+checkpoint-\d+", log), log
    assert disturbed.steps()["train"] == "succeeded"
    assert disturbed.diagnosis().result in ("succeeded", "held")
    assert re.search("nothing wrong|gate held", disturbed.doctor())
    undisturbed.wait_for_end("train")
    assert losses(disturbed) == losses(undisturbed)


def test_a_cancelled_run_ends_at_once_and_can_be_resumed(submit: Submit, cluster: Cluster) -> None:
    run = submit(*TRAIN, f"placement.cache_claim={cluster.claim}", "train.learning_rate=1.1e-4")
    run.wait_for_log("train", UNDER_WAY)
    cancelled = time.monotonic()
    cluster.tuneline("cancel", run.run_id, *cluster.options())

    def gone() -> bool | None:
        running = [pod for pod in run.pods("train") if pod.status.phase in ("Pending", "Running")]
        return None if running else True

    until(gone, "the pods of train to end", seconds=60, every=1)
    print(f"the last pod of train ended {time.monotonic() - cancelled:.0f} s after the cancel")
    run.wait(seconds=900)
    assert run.steps()["train"] == "cancelled"
    assert run.diagnosis().result == "cancelled"
    assert "cancelled" in run.doctor()

    cluster.tuneline("resume", run.run_id, *cluster.options())
    until(lambda: run.state() == "RUNNING" or None, "the run to go on", seconds=120)
    assert run.wait() == "SUCCEEDED"
    assert re.search(r"continuing from \S+checkpoint-\d+", run.logs("train"))
    assert run.steps()["train"] == "succeeded"
    assert run.diagnosis().result in ("succeeded", "held")
    assert re.search("nothing wrong|gate held", run.doctor())
