"""Text that Kubernetes and Argo would expand or evaluate arrives at the steps as it was written."""

import json

import pytest
from cluster_runs import Submit

HOSTILE = "cost $$5$$ $(HOME) {{item}} {{workflow.name}} {{=1+1}} <b>"


@pytest.mark.parametrize(
    ("assignment", "step", "message"),
    [
        (
            f"dataset={json.dumps(f'/rows/{HOSTILE}.jsonl')}",
            "look-up-data",
            f"there is no file or directory /rows/{HOSTILE}.jsonl",
        ),
        (
            f"prepare.columns={json.dumps({'prompt': HOSTILE})}",
            "prepare",
            f"prepare.columns maps prompt to '{HOSTILE}', but",
        ),
    ],
    ids=["a parameter", "a step's config"],
)
def test_text_arrives_unchanged(submit: Submit, assignment: str, step: str, message: str) -> None:
    """The steps quote the text in the message of the error that it causes."""
    run = submit(assignment)
    assert run.wait() == "FAILED"
    assert message in run.logs(step)
    assert run.diagnosis().result == f"failed at {step}"
    assert message in run.doctor()
