"""The exit handler's text, after success, failure, and with nothing to go by."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from tuneline.diagnose.run import run
from tuneline.errors import DataError
from tuneline.runtime.step import EVENTS_VARIABLE, emit, step
from tuneline.seals import broken_page_seal


def write_events(path: Path, *events: tuple) -> str:
    rows = [
        {"step": name, "event": what, "time": float(index), **values}
        for index, (name, what, values) in enumerate(events)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(autouse=True)
def no_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(EVENTS_VARIABLE, raising=False)


def test_success_lists_the_steps_with_their_times(tmp_path: Path) -> None:
    events = write_events(
        tmp_path / "events.jsonl",
        ("fetch", "started", {}),
        ("fetch", "finished", {"seconds": 11.4}),
        ("train", "started", {}),
        ("train", "finished", {"seconds": 181.7}),
        ("diagnose", "started", {}),
    )
    found = run(state="SUCCEEDED", task="exit-handler-1", events_path=events)
    assert found.succeeded and found.step is None
    assert found.markdown == (
        "# The run succeeded\n\n"
        "2 tasks finished and took 3 min 13 s in total.\n\n"
        "| step | status | time |\n| --- | --- | ---: |\n"
        "| fetch | finished | 11 s |\n| train | finished | 3 min 02 s |\n"
    )


def test_failure_names_step_cause_and_advice(tmp_path: Path) -> None:
    sentence = "row 7 of a_b.jsonl has no answer: add one"
    events = write_events(
        tmp_path / "events.jsonl",
        ("fetch", "started", {}),
        ("fetch", "finished", {"seconds": 1.0}),
        ("prepare", "started", {}),
        ("prepare", "failed", {"seconds": 0.5, "kind": "DataError", "message": sentence}),
    )
    target = tmp_path / "new" / "summary.md"
    found = run(
        state="FAILED",
        task="exit-handler-1",
        message="Task exit-handler-1 failed.",
        events_path=events,
        summary_path=str(target),
    )
    assert (found.succeeded, found.step, found.cause) == (False, "prepare", sentence)
    text = target.read_text()
    assert text.startswith(found.markdown) and not broken_page_seal(target.read_bytes())
    assert "# The run failed at prepare" in text
    assert "**Why:** row 7 of a_b.jsonl has no answer: add one" in text
    assert "| prepare | failed | 0.5 s |" in text
    assert "exit-handler" not in text


def test_the_first_failure_counts(tmp_path: Path) -> None:
    events = write_events(
        tmp_path / "events.jsonl",
        ("quantize-gguf", "started", {}),
        ("quantize-gptq", "started", {}),
        ("quantize-gguf", "failed", {"seconds": 1, "kind": "ToolError", "message": "first"}),
        ("quantize-gptq", "failed", {"seconds": 1, "kind": "ToolError", "message": "second"}),
    )
    assert run(state="FAILED", events_path=events).cause == "first"


def test_events_of_real_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events.jsonl"
    monkeypatch.setenv(EVENTS_VARIABLE, str(path))
    with step("fetch"):
        emit("fetch", "progress", done=1, total=2, note="")
    with pytest.raises(SystemExit), step("prepare"):
        raise DataError("no rows in x.jsonl: give a file with rows")
    found = run(state="FAILED")
    assert (found.step, found.cause) == ("prepare", "no rows in x.jsonl: give a file with rows")


def test_a_clusters_message_alone() -> None:
    found = run(state="FAILED", task="train", message="main: OOMKilled (exit code 137)")
    assert found.step == "train" and "memory limit" in found.cause
    assert "TUNELINE_EVENTS was not set" in found.markdown


def test_cancelled() -> None:
    found = run(state="CANCELLED", task="exit-handler-1")
    assert not found.succeeded and found.cause == "The run was cancelled."
    assert "# The run was cancelled" in found.markdown


@pytest.mark.parametrize("state", ["SUCCEEDED", "FAILED", "CANCELLED", ""])
def test_it_never_fails_on_what_it_is_given(tmp_path: Path, state: str) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_bytes(
        b'\xff\xfe\n{"step": 3}\n[1]\n{"step": "a", "event": "finished", "time": 1}\n{"st'
    )
    found = run(state=state, message=None, events_path=str(broken))
    assert "4 of 5 lines of" in found.markdown and "| a | finished | - |" in found.markdown
    for path in (tmp_path, tmp_path / "absent"):
        assert "cannot be read" in run(state=state, events_path=str(path)).markdown


def test_a_summary_that_cannot_be_written_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    found = run(state="SUCCEEDED", summary_path=str(tmp_path / "file" / "below"))
    assert found.succeeded and "cannot write the diagnosis" in caplog.text


def test_from_the_command_line(tmp_path: Path) -> None:
    events = write_events(
        tmp_path / "events.jsonl",
        ("train", "started", {}),
        ("train", "failed", {"seconds": 1, "kind": "MemoryError", "message": ""}),
    )
    done = subprocess.run(
        [sys.executable, "-m", "tuneline.diagnose", "--events", events],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "# The run failed at train" in done.stdout


PIPELINE = """
import sys, warnings
warnings.simplefilter("ignore")
from kfp import dsl, local
from tuneline.diagnose.component import diagnose

@dsl.component(install_kfp_package=False)
def prepare(fails: bool):
    from tuneline.errors import DataError
    from tuneline.runtime.step import step
    with step("prepare"):
        if fails:
            raise DataError("row 7 has no answer: add one")

@dsl.pipeline(name="line")
def line(fails: bool):
    with dsl.ExitHandler(diagnose()):
        prepare(fails=fails)

local.init(
    local.SubprocessRunner(use_venv=False), pipeline_root=sys.argv[1], raise_on_error=False
)
line(fails=sys.argv[2] == "yes")
"""


@pytest.mark.parametrize(
    ("fails", "heading"),
    [("yes", "# The run failed at prepare"), ("no", "# The run succeeded")],
)
def test_as_an_exit_handler(tmp_path: Path, fails: str, heading: str) -> None:
    program = tmp_path / "line.py"
    program.write_text(PIPELINE)
    environment = {**os.environ, EVENTS_VARIABLE: str(tmp_path / "events.jsonl")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subprocess.run(
            [sys.executable, str(program), str(tmp_path / "root"), fails],
            env=environment,
            check=True,
            capture_output=True,
        )
    (summary,) = (tmp_path / "root").glob("*/diagnose/summary")
    text = summary.read_text()
    assert text.startswith(heading + "\n")
    assert ("row 7 has no answer: add one" in text) == (fails == "yes")
