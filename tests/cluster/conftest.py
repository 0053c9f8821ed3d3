"""Fixtures of the end-to-end tests: the cluster, and runs that are deleted after the test.

If a test fails, its runs are kept, and the report of the test has their IDs, status and diagnosis.
"""

import random
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_runs import FAILED, RUNS, Submit, submitting
from real_cluster import Cluster


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker("cluster")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.failed:
        for node in (item, item.parent):
            node.stash[FAILED] = True
            for run in node.stash.get(RUNS, []):
                report.sections.append((f"run {run.name}, {run.run_id}", run.report()))
    return report


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Cluster:
    option = request.config.getoption
    host = option("--kfp-host")
    if not host:
        pytest.fail("the tests of tests/cluster need --kfp-host URL, the address of KFP's API")
    # With pytest-xdist all processes share the ID, so that their runs share KFP's cache.
    shared = getattr(request.config, "workerinput", {}).get("testrunuid")
    session = option("--kfp-session") or (shared or uuid.uuid4().hex)[:6]
    return Cluster(
        host=host,
        kubeconfig=option("--kubeconfig"),
        namespace=option("--kfp-namespace"),
        account=option("--kfp-account"),
        registry=option("--kfp-registry"),
        claim=option("--kfp-claim"),
        shared_claim=option("--kfp-shared-claim"),
        assignments=tuple(option("--kfp-set")),
        session=session,
        seed=random.randrange(2**31),
    )


@pytest.fixture
def submit(request: pytest.FixtureRequest, cluster: Cluster) -> Iterator[Submit]:
    with submitting(request.node, cluster) as function:
        yield function
