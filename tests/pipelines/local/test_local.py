"""What the docker runner's report of success is held against, and what its containers see."""

import json
from pathlib import Path

import pytest

from tuneline.pipelines.catalog import find_recipe
from tuneline.pipelines.local.run import check_that_all_steps_ended, inputs_of

START = {"step": "train", "event": "started", "time": 1.0}
END = {"step": "train", "event": "finished", "time": 2.0, "seconds": 1.0}
FAILURE = {**END, "event": "failed", "kind": "DataError", "message": "no rows"}


@pytest.mark.parametrize(
    ("events", "says"),
    [
        ([START, END], None),
        ([START, FAILURE], "step train failed: no rows"),
        # A container that was killed says nothing, and KFP may take it for a success.
        ([START], "step train failed: it was killed"),
        ([START, END, START], "step train failed: it was killed"),
    ],
)
def test_a_step_that_did_not_end_is_a_failure(
    tmp_path: Path, events: list[dict[str, object]], says: str | None
) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    if says is None:
        check_that_all_steps_ended(path)
    else:
        with pytest.raises(RuntimeError, match=says):
            check_that_all_steps_ended(path)


@pytest.mark.parametrize("pattern", ["part-1/*.jsonl", "part-*/rows.jsonl", "**/rows.jsonl"])
def test_containers_see_the_directory_in_front_of_a_wildcard(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "part-1").mkdir()
    (tmp_path / "part-1" / "rows.jsonl").write_text('{"prompt": "Q", "completion": "A"}\n')
    recipe = find_recipe("demo", [f"dataset={tmp_path}/{pattern}"], is_local=True)
    directory = tmp_path / "part-1" if pattern.startswith("part-1/") else tmp_path
    assert inputs_of(recipe) == [str(directory)]
