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
    name = event["step"]
    match event["event"]:
        case "progress":
            return (
                f"{when} {name} {event['done']}/{event['total']} {event.get('note', '')}".rstrip()
            )
        case "finished":
            return f"{when} {name} finished in {event['seconds']:.1f} s"
        case "failed":
            return f"{when} {name} FAILED: {event['message']}"
        case kind:
            return f"{when} {name} {kind}"


def _table(events: list[dict[str, Any]]) -> Group:
    table = Table.grid(padding=(0, 2))
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    count: dict[str, int] = {}
    open_runs: dict[str, list[int]] = {}
    # A step may run once per format, and two of these runs may overlap: match each end event with
    # a start event.
    for event in events:
        name = event["step"]
        if event["event"] == "started":
            count[name] = count.get(name, 0) + 1
            open_runs.setdefault(name, []).append(count[name])
            rows[name, count[name]] = {"started": event["time"]}
            continue
        running = open_runs.get(name) or [count.get(name, 1)]
        row = rows.setdefault((name, running[0]), {"started": event["time"]})
        row.update(event)
        if event["event"] in ("finished", "failed"):
            open_runs.get(name, [running[0]]).pop(0)
    for (name, _), row in rows.items():
        table.add_row(*_row(name, row))
    return Group(table)


def _row(name: str, row: dict[str, Any]) -> list[Any]:
    match row.get("event"):
        case "finished":
            return [Text("done", "green"), name, f"{row['seconds']:.1f} s", ""]
        case "failed":
            return [Text("failed", "bold red"), name, f"{row['seconds']:.1f} s", row["message"]]
        case "progress":
            elapsed = time.time() - row["started"]
            fraction = row["done"] / max(1, row["total"])
            left = elapsed * (1 - fraction) / fraction if fraction else 0.0
            bar = ProgressBar(total=row["total"], completed=row["done"], width=30)
            note = f"{row['done']}/{row['total']}  {left:.0f} s left  {row.get('note', '')}"
            return [Text("running", "cyan"), name, bar, note]
        case _:
            return [
                Text("running", "cyan"),
                name,
                f"{time.time() - row['started']:.0f} s",
                "",
            ]
