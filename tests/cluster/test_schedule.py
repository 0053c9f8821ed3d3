"""A schedule that fires twice: it trains once, because nothing has changed in between."""

import pytest
from cluster_runs import RUNS, SMALL
from real_cluster import Cluster, Run, until


def test_a_schedule_fires_twice_and_trains_once(
    cluster: Cluster, request: pytest.FixtureRequest
) -> None:
    name = f"e2e-{cluster.session}-schedule-{cluster.seed}"

    def fired() -> list[Run] | None:
        runs = cluster.runs_of(name)
        return runs if len(runs) >= 2 else None

    cluster.tuneline(
        *("schedule", str(SMALL), "--every", "1m", "--name", name, "--experiment", name),
        *("--service-account", cluster.account, *cluster.options()),
        *cluster.placed(f"name=e2e-{cluster.session}", "train.max_steps=1"),
    )
    try:
        assert name in cluster.tuneline("schedules", *cluster.options())
        runs = until(fired, "the schedule to fire twice")
        request.node.stash[RUNS] = runs
        cluster.tuneline("schedules", "--disable", name, *cluster.options())
        # Kubernetes would delete the pods of the second run together with the schedule.
        said = cluster.tuneline("schedules", "--delete", name, *cluster.options(), fails=True)
        assert "has not ended" in said
        first, second = runs
        assert first.wait() == "SUCCEEDED"
        assert second.wait() == "SUCCEEDED"
        assert first.steps()["train"] == "succeeded"
        assert second.steps()["train"] == "from cache"
        assert cluster.runs_of(name) == [first, second]
    finally:
        for run in request.node.stash.get(RUNS, []):
            run.cancel_if_running()
        cluster.tuneline("schedules", "--delete", name, *cluster.options())
    cluster.delete_experiment(name)
