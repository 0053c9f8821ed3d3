"""A pod of a TrainJob stops when the launcher is gone, and only then."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tuneline.runtime.stop_request import stop_on_sigterm
from tuneline.train.ranks.nodes import SharedDirectory
from tuneline.train.trainjob.lease import stop_without_launcher


def is_stopped(shared: SharedDirectory, *, beats: int) -> bool:
    """Return whether the process is asked to stop while the launcher beats some times."""
    with stop_on_sigterm() as stop:
        watch = stop_without_launcher(shared, seconds=0.6, poll_seconds=0.02)
        for _ in range(beats):
            shared.beat()
            time.sleep(0.1)
        deadline = time.monotonic() + (0.0 if beats else 20.0)
        while not stop.is_made and time.monotonic() < deadline:
            time.sleep(0.02)
        watch.set()
        return stop.is_made


def test_a_launcher_that_is_gone_stops_the_pod(tmp_path: Path) -> None:
    shared = SharedDirectory(tmp_path)
    shared.beat()
    assert is_stopped(shared, beats=0)


def test_a_launcher_that_beats_keeps_the_pod(tmp_path: Path) -> None:
    shared = SharedDirectory(tmp_path)
    shared.beat()
    assert not is_stopped(shared, beats=15)


def test_without_a_launchers_file_there_is_no_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = SharedDirectory(tmp_path)
    assert shared.last_beat() is None
    with stop_on_sigterm() as stop:
        watch = stop_without_launcher(shared, seconds=0.05, poll_seconds=0.01)
        time.sleep(0.5)
        watch.set()
        assert not stop.is_made


@pytest.mark.parametrize(("handler", "code"), [("SIG_DFL", -15), ("SIG_IGN", 143)])
def test_a_process_that_is_loading_or_does_not_answer_ends_too(
    tmp_path: Path, handler: str, code: int
) -> None:
    shared = SharedDirectory(tmp_path)
    shared.beat()
    program = (
        "import signal, sys, time\nfrom pathlib import Path\n"
        "from tuneline.train.ranks.nodes import SharedDirectory\n"
        "from tuneline.train.trainjob.lease import stop_without_launcher\n"
        # The first process of a container ignores signals by default.
        f"signal.signal(signal.SIGTERM, signal.{handler})\n"
        "shared = SharedDirectory(Path(sys.argv[1]))\n"
        "stop_without_launcher(shared, seconds=0.1, poll_seconds=0.02)\n"
        "time.sleep(60)\n"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert done.returncode == code and time.monotonic() - started < 50
