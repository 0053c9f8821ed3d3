"""The runs of a test: started in an experiment of their own, and deleted afterwards."""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from real_cluster import Cluster, Run

SMALL = Path(__file__).parents[1] / "cluster" / "small.yaml"

RUNS = pytest.StashKey[list[Run]]()
"""Runs that a test or a file of tests has started."""
FAILED = pytest.StashKey[bool]()
"""Whether a test failed, so that its runs are kept."""

Submit = Callable[..., Run]
"""submit(*assignments, recipe=...): start a run in the experiment of the test."""


@contextlib.contextmanager
def submitting(node: pytest.Item | pytest.Collector, cluster: Cluster) -> Iterator[Submit]:
    """Give a test or a file of tests a function that starts runs, and clean up afterwards.

    Args:
        node: the test or the file.
        cluster: where the runs start.
    """
    experiment = f"e2e-{cluster.session}-{re.sub('[^a-z0-9]+', '-', node.name.lower())}".strip("-")
    runs = node.stash.setdefault(RUNS, [])

    def submit(*assignments: str, recipe: str | Path = SMALL) -> Run:
        name = f"name=e2e-{cluster.session}"
        run = cluster.submit(str(recipe), name, *assignments, experiment=experiment)
        runs.append(run)
        return run

    yield submit
    for run in runs:
        run.cancel_if_running()
    if runs and not node.stash.get(FAILED, False):
        cluster.delete_experiment(experiment)
