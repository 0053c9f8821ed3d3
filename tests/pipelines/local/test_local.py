"""What the docker runner's report of success is held against, and what its containers see."""

import json
import signal
import subprocess
import sys
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


def test_a_run_ends_with_the_process_that_started_it() -> None:
    """A killed `tuneline run` cannot stop its run, but its end of the pipe is closed."""
    program = (
        "import subprocess; from tuneline.pipelines.local.run import stop_with_starter; "
        "stop_with_starter(); print('at work', flush=True); subprocess.run(['sleep', '600'])"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert run.stdin is not None and run.stdout is not None
    assert run.stdout.readline() == b"at work\n"
    assert run.poll() is None
    run.stdin.close()
    assert run.wait(60) == -signal.SIGTERM
    # The step of the run had this pipe open too, and has ended.
    assert run.stdout.read() == b""
    run.stdout.close()
