"""How runs ended that a real cluster recorded, as the exit handler concludes it."""

import copy

import pytest
from tests.support.kfp_runs import recorded

from tuneline.diagnose.outcome import Outcome, conclude
from tuneline.diagnose.text import attempts_table
from tuneline.pods import STEP_LABEL
from tuneline.runtime.kfp_run import read_attempts

# The state that KFP passes to the exit handler of such a run.
STATES = {
    "good": "COMPLETE", "good-from-cache": "RUNNING", "hold": "COMPLETE",
    "hold-from-cache": "RUNNING", "pod-deleted": "COMPLETE", "cancelled": "RUNNING",
    "cancelled-in-quota": "RUNNING",
}  # fmt: skip


def outcome(name: str, *, with_workflow: bool = True) -> Outcome:
    pods, workflow = recorded(f"probe-{name}")
    # As the exit handler sees it: it runs, so the run has not ended.
    workflow["status"]["phase"] = "Running"
    known = workflow if with_workflow else None
    return conclude(read_attempts(pods, known), known, STATES.get(name, "FAILED"))


def without(pods: list[dict], *steps: str) -> list[dict]:
    """Return the pods but those of some steps; the pods of their drivers stay."""
    return [pod for pod in pods if pod["metadata"]["labels"].get(STEP_LABEL) not in steps]


@pytest.mark.parametrize(
    ("name", "kind", "step", "cause", "advice"),
    [
        ("good", "succeeded", None, "All steps finished.", ""),
        ("good-from-cache", "succeeded", None, "All steps finished.", ""),
        ("pod-deleted", "succeeded", None, "All steps finished.", ""),
        ("hold", "held", "gate", "the interval includes 0.", "Read the report."),
        ("hold-from-cache", "held", "gate", "did not promote", "Read the report."),
        ("data-error", "failed", "work", "31 of 90 rows were rejected", "Fix the cause"),
        ("crash", "failed", "work", "KeyError: 'answer'", "traceback"),
        ("killed", "failed", "work", "killed by a signal", "memory_request"),
        ("memory", "failed", "work", "memory limit (256Mi)", "memory_limit"),
        ("time-limit", "failed", "work", "reached its time limit", "timeout_hours"),
        ("disk", "failed", "work", "wrote too much to its disk", "scratch_size"),
        ("image", "failed", "work", "image h1/absent:0", "Push the images"),
        ("cancelled", "cancelled", None, "That stopped work.", "tuneline resume"),
        ("cancelled-in-quota", "cancelled", None, "work had not started", "tuneline resume"),
    ],
)
def test_outcome_step_cause_and_advice(
    name: str, kind: str, step: str | None, cause: str, advice: str
) -> None:
    found = outcome(name)
    assert (found.kind, found.step) == (kind, step)
    assert cause in found.cause and advice in found.advice


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("good", "succeeded"), ("pod-deleted", "succeeded"), ("hold", "held"),
        ("data-error", "failed"), ("memory", "failed"), ("time-limit", "failed"),
        ("disk", "failed"), ("image", "failed"), ("cancelled", "cancelled"),
        # KFP says the same of both, so only the workflow can tell.
        ("good-from-cache", "unknown"), ("cancelled-in-quota", "unknown"),
    ],
)  # fmt: skip
def test_without_the_workflow(name: str, kind: str) -> None:
    assert outcome(name, with_workflow=False).kind == kind


def test_the_demo_is_good_without_its_workflow_whatever_kfp_says() -> None:
    pods, _ = recorded("demo-nodes")
    for state in ("COMPLETE", "RUNNING", "FAILED"):
        assert conclude(read_attempts(pods), None, state).kind == "succeeded"


def test_a_run_from_the_cache_is_held_for_the_reason_that_the_report_leaves() -> None:
    pods, _ = recorded("demo-nodes")
    # The gate came from the cache, so that it has no pod; the report is never cached.
    left = '{"step": "report", "result": "hold", "text": "heldout_exact -0.1"}'
    for pod in pods:
        if pod["metadata"]["labels"].get(STEP_LABEL) == "report":
            pod["status"]["containerStatuses"][0]["state"]["terminated"]["message"] = left
    kept = without(pods, "gate", "publish")
    found = conclude(read_attempts(kept), None, "RUNNING")
    assert (found.kind, found.step) == ("held", "gate") and "heldout_exact -0.1" in found.cause


def test_a_run_that_was_cancelled_before_it_published_is_not_called_good() -> None:
    pods, _ = recorded("demo-nodes")
    found = conclude(read_attempts(without(pods, "publish")), None, "RUNNING")
    assert found.kind == "unknown"


def test_what_was_published_is_told() -> None:
    pods, workflow = recorded("demo-nodes")
    left = '{"step": "publish", "result": "published", "text": "https://hub/org/model v3"}'
    for pod in pods:
        if pod["metadata"]["labels"].get(STEP_LABEL) == "publish":
            pod["status"]["containerStatuses"][0]["state"]["terminated"]["message"] = left
    found = conclude(read_attempts(pods, workflow), workflow, "COMPLETE")
    assert found == Outcome("succeeded", "Published: https://hub/org/model v3.")


def test_a_failure_before_the_cancel_is_told_too() -> None:
    pods, workflow = recorded("probe-data-error")
    workflow["spec"]["activeDeadlineSeconds"] = 0
    found = conclude(read_attempts(pods, workflow), workflow, "RUNNING")
    assert found.kind == "cancelled" and found.step == "work"
    assert "31 of 90 rows were rejected" in found.cause


def test_a_cancel_after_all_steps_had_ended_changes_nothing() -> None:
    pods, workflow = recorded("probe-good")
    workflow["spec"]["activeDeadlineSeconds"] = 0
    assert conclude(read_attempts(pods, workflow), workflow, "RUNNING").kind == "succeeded"


def test_a_step_that_failed_by_itself_comes_before_one_that_was_stopped() -> None:
    _, workflow = recorded("probe-data-error")
    _, other = recorded("probe-cancelled")
    stopped = copy.deepcopy(read_attempts([], other)[0])
    failed = read_attempts([], workflow)[0]
    assert stopped.exit_code == 143
    twin = [stopped, type(failed)(**{**vars(failed), "path": "other"})]
    assert "31 of 90" in conclude(twin, workflow, "FAILED").cause


def test_pods_that_are_gone_are_not_guessed() -> None:
    found = conclude([], None, "FAILED")
    assert found.kind == "failed" and "its pod is gone" in found.cause
    assert conclude([], None, "COMPLETE").kind == "succeeded"
    assert conclude([], None, "RUNNING").kind == "unknown"


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("demo-cancelled-early", "| diagnose | not started | - |"),
        ("probe-cancelled-in-quota", "| work | not started | - |"),
        ("probe-cancelled", "| work | failed | 2 min 02 s |"),
    ],
)
def test_a_step_that_a_cancel_kept_from_starting_took_no_time(name: str, row: str) -> None:
    assert row in attempts_table(read_attempts(*recorded(name)))
