"""Show a running pipeline on the terminal: one line per step, with progress and time left."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tuneline.html.units import duration
from tuneline.runtime.events import StepRun, step_runs

ARTIFACTS_DIR = "artifacts"
EVENTS_FILE = "events.jsonl"
"""Name of the events file, in the directory of the run's artifacts."""

REFRESH_SECONDS = 0.5
"""Pause between two readings of the events."""


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events in the file, except a last line that is still being written."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def watch(process: subprocess.Popen[Any], events_path: Path, console: Console) -> int:
    """Show the steps until `process` ends, and return the exit code of the process."""
    if not console.is_terminal:
        return _log(process, events_path, console)
    with Live(console=console, refresh_per_second=4) as live:
        while (code := process.poll()) is None:
            live.update(_table(read_events(events_path)))
            time.sleep(REFRESH_SECONDS)
        live.update(_table(read_events(events_path)))
    return code


def _log(process: subprocess.Popen[Any], events_path: Path, console: Console) -> int:
    """Print one plain line per event, for log files and CI."""
    shown = 0
    last_progress = 0.0
    while True:
        code = process.poll()
        events = read_events(events_path)
        for event in events[shown:]:
            if event["event"] == "progress":
                if event["time"] - last_progress < 15:
                    continue
                last_progress = event["time"]
            console.print(_line(event), highlight=False, markup=False, soft_wrap=True)
        shown = len(events)
        if code is not None:
            return code
        time.sleep(REFRESH_SECONDS)


def _line(event: dict[str, Any]) -> str:
    when = time.strftime("%H:%M:%S", time.localtime(event["time"]))
    name = f"{event['step']} {event.get('part', '')}".strip()
    match event["event"]:
        case "progress":
            return (
                f"{when} {name} {event['done']}/{event['total']} {event.get('note', '')}".rstrip()
            )
        case "finished":
            return f"{when} {name} finished in {duration(event['seconds'])}"
        case "failed":
            return f"{when} {name} FAILED: {event['message']}"
        case kind:
            return f"{when} {name} {kind}"


def _table(events: list[dict[str, Any]]) -> Group:
    table = Table.grid(padding=(0, 2))
    for run in step_runs(events):
        table.add_row(*_row(run, time.time()))
    return Group(table)


def _row(run: StepRun, now: float) -> list[Any]:
    name = Text(run.name)
    if run.status == "finished":
        return [Text("done", "green"), name, duration(run.seconds), ""]
    if run.status == "failed":
        return [Text("failed", "bold red"), name, duration(run.seconds), Text(run.message)]
    running = [Text("running", "cyan"), name]
    if not run.total:
        return [*running, duration(now - run.started), ""]
    left = run.seconds_left(now)
    words = [
        f"{run.done}/{run.total}",
        *([f"about {duration(left)} left"] if left is not None else []),
        *([run.note] if run.note else []),
    ]
    return [*running, ProgressBar(run.total, run.done or 0, width=30), Text("  ".join(words))]
