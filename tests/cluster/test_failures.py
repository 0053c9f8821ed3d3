"""Runs that fail, or whose model is not published: diagnose, status and doctor name the cause."""

import json
import uuid
from collections.abc import Iterator

import pytest
from cluster_runs import Submit
from real_cluster import Cluster, Run

ROWS = [{"prompt": f"Write {n}m CPU in cores.", "completion": f"{n / 1000}"} for n in range(59)]
BAD_ROWS = [{"prompt": f"Write {n}m CPU in cores."} for n in range(31)]


def is_failed(run: Run, step: str, *causes: str) -> None:
    """Check that diagnose, status and doctor name the step that failed, and its causes."""
    diagnosis = run.diagnosis()
    assert diagnosis.result == f"failed at {step}"
    assert run.steps()[step] == "failed"
    for name, text in (("diagnose", diagnosis.text), ("doctor", run.doctor())):
        for cause in causes:
            assert cause.lower() in text.lower(), f"{name} does not say '{cause}': {text}"


def test_a_model_that_is_not_better_is_held(submit: Submit) -> None:
    run = submit("train.learning_rate=1.0e-9", "train.max_steps=1")
    assert run.wait() == "SUCCEEDED"
    steps = run.steps()
    assert steps["gate"] == "succeeded"
    assert steps["publish"] == "skipped"
    assert "hold: heldout_choice" in run.logs("gate")
    assert run.diagnosis().result == "held"
    assert "heldout_choice" in run.diagnosis().text
    assert "gate held" in run.doctor()


def test_rows_that_cannot_be_used_are_named(
    submit: Submit, cluster: Cluster, rows_file: str
) -> None:
    run = submit(f"dataset={rows_file}", f"placement.cache_claim={cluster.claim}")
    assert run.wait() == "FAILED"
    assert "DataError: " in run.logs("prepare")
    is_failed(run, "prepare", "31 of 90 rows")


def test_a_step_that_needs_more_memory_than_its_limit(submit: Submit) -> None:
    run = submit("train.learning_rate=1.2e-4", "placement.steps.train.memory_limit=300Mi")
    assert run.wait() == "FAILED"
    is_failed(run, "train", "memory limit")
    assert "OOMKilled" in run.doctor()
    assert "300Mi" in run.doctor()


def test_a_step_that_exceeds_its_time_limit(submit: Submit) -> None:
    run = submit("train.max_steps=5000", "placement.steps.train.timeout_hours=0.02")
    assert run.wait() == "FAILED"
    is_failed(run, "train", "time limit")


@pytest.fixture
def rows_file(cluster: Cluster) -> Iterator[str]:
    """A file of 90 rows on the cache claim, 31 of which cannot be used; its path in the pods."""
    path = f"/cache/e2e-{uuid.uuid4().hex[:8]}.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in ROWS + BAD_ROWS)
    cluster.run_on_claim(f"cat > {path} <<'END'\n{text}END")
    yield path
    cluster.run_on_claim(f"rm {path}")
