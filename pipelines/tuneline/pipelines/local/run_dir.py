"""The directory of a run on this machine: its files, its state, and the logs of its steps."""

import fcntl
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from tuneline.artifacts import RunSummary
from tuneline.bounded_yaml import load_yaml
from tuneline.errors import UserError
from tuneline.kinds import EXPORT_KINDS
from tuneline.pipelines.local.watch import ARTIFACTS_DIR, EVENTS_FILE, read_events
from tuneline.report.line import LINE, stage_of
from tuneline.runtime.events import StepRun, step_runs
from tuneline.runtime.scratch import PREFIX, remove_leftovers
from tuneline.steps import STEPS

RUNS_DIR = Path("runs")
"""Default directory of the runs."""
RECIPE_FILE = "recipe.yaml"
LOG_FILE = "run.log"
REPORT_FILE = "report.html"
NEVER_CACHED = (
    *("plan", "look-up-model", "look-up-data", "look-up-published", "report", "publish"),
    "diagnose",
)
"""Steps whose results are not kept, because every attempt runs them again."""
CACHE_DIR = ".cache"
CHECKPOINT_DIR = ".checkpoints"
"""Directories for KFP's cache and for checkpoints, next to those of the runs, which share them."""
START_FILE = "run.json"

RunState = Literal["running", "succeeded", "failed", "stopped"]

_STYLE = re.compile(r"\x1b\[[0-9;]*m")
_BEGIN = re.compile(r"^[\d:.]+ - INFO - Executing task '([^']+)'")
_END = re.compile(r"^[\d:.]+ - \w+ - Task '([^']+)' finished with status (\w+)")
_PIPELINE = re.compile(r"^[\d:.]+ - INFO - Running pipeline: '")
_PARAMETERS = re.compile(r'^\s*"parameterValues": ')
_PART = {
    "evaluate": re.compile(r'^\s*"label": "([\w.-]+)"'),
    **{f"quantize-{kind}": re.compile(r'^\s*"format": "([\w.-]+)"') for kind in EXPORT_KINDS},
}
"""Parameter that tells the executions of a step apart, by step."""
_URI = re.compile(r'"uri": "(/[^"]+)"')
_NUMBERED = re.compile(r"^(.+)-\d+$")
_STOPPED_CODES = (130, 143)
"""Exit codes after Ctrl-C and SIGTERM."""


@dataclass(frozen=True)
class Start:
    """How a run was started, and how it ended."""

    recipe: str
    """File or name of the recipe, as it was given."""
    settings: list[str]
    """The options --set."""
    runner: str
    has_secrets: bool = False
    """Whether the recipe has credentials, which are not stored with the run."""
    exit_code: int | None = None
    """Exit code of the last attempt; None: it has not ended, or was killed."""
    uncached: list[str] = field(default_factory=list)
    """The options --no-cache; they hold when the run is resumed too."""

    def write(self, run_dir: Path) -> None:
        """Write the record into a run's directory."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (run_dir / START_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, run_dir: Path) -> Self | None:
        """Read the record; None if there is none, as in runs of earlier versions."""
        try:
            return cls(**json.loads((run_dir / START_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


@dataclass
class LogSection:
    """What one task wrote to the log of its run."""

    task: str
    """Name of the task in the pipeline, e.g. evaluate-2."""
    lines: list[str] = field(default_factory=list)
    status: str = ""
    """SUCCESS or FAILURE; "" if the task has not ended."""

    @property
    def name(self) -> str:
        """Name of the step with what it is about, e.g. evaluate tuned."""
        numbered = _NUMBERED.match(self.task)
        step = numbered[1] if numbered and self.task not in STEPS else self.task
        if step not in _PART:
            return step
        # Before the parameters are the artifacts, whose metadata has a format of its own.
        given = itertools.dropwhile(lambda line: not _PARAMETERS.match(line), self.lines)
        part = next((found[1] for line in given if (found := _PART[step].match(line))), "")
        return f"{step} {part}".strip()

    @property
    def artifacts(self) -> list[Path]:
        """Paths of the artifacts that the task took and made."""
        return [Path(uri) for uri in _URI.findall("\n".join(self.lines))]


@dataclass(frozen=True)
class LocalRun:
    """A run on this machine."""

    directory: Path

    @property
    def name(self) -> str:
        """Name of the run: that of its directory."""
        return self.directory.name

    @property
    def argument(self) -> str:
        """The run in a command: its path, relative to the working directory if it is below that."""
        path = self.directory
        if path.is_relative_to(Path.cwd()):
            path = path.relative_to(Path.cwd())
        return shlex.quote(str(path))

    @property
    def start(self) -> Start | None:
        """How the run was started; None for runs of earlier versions."""
        return Start.read(self.directory)

    @property
    def events_path(self) -> Path:
        """File of the events of the last attempt."""
        return self.directory / ARTIFACTS_DIR / EVENTS_FILE

    @property
    def log_path(self) -> Path:
        """File with what all steps of all attempts wrote."""
        return self.directory / LOG_FILE

    def steps(self) -> list[StepRun]:
        """Return the executions of steps in the last attempt, without those from the cache."""
        return step_runs(read_events(self.events_path))

    def summary(self) -> RunSummary | None:
        """Return the record that the report step of the last attempt wrote; None before that."""
        path = self.summary_path()
        return RunSummary.read(path.parent) if path is not None else None

    def summary_path(self) -> Path | None:
        """Return the file of that record."""
        found = self.results(f"*/*/{RunSummary.filename}")
        return found[-1] if found else None

    def results(self, pattern: str) -> list[Path]:
        """Return what the last attempt made, by a pattern of STEP/OUTPUT/FILE or a part of it."""
        pipelines = sorted(self.directory.glob(f"{ARTIFACTS_DIR}/*/"))
        return sorted(pipelines[-1].glob(pattern)) if pipelines else []

    def recipe_values(self) -> dict[str, Any]:
        """Return the recipe as it is stored, which may be that of another version of tuneline."""
        text = (self.directory / RECIPE_FILE).read_text(encoding="utf-8")
        values: dict[str, Any] = load_yaml(text, where=str(self.directory / RECIPE_FILE))
        return values

    def artifact_dirs(self) -> list[Path]:
        """Return the directories of artifacts in the last attempt.

        Its own come first, then those that its steps took from the cache, which are in directories
        of earlier attempts or of other runs. The logs of the steps that used them say where.
        """
        found = self.results("*/*/")
        for section in self.sections():
            for place in section.artifacts:
                # The copy of a record is beside the artifact that the record describes.
                found += [place] if place.is_dir() else sorted(place.parent.glob("*/"))
        return list(dict.fromkeys(found))

    def state(self) -> RunState:
        """Return whether the run is at work, or how it ended."""
        if self._is_locked():
            return "running"
        start = self.start
        if start is not None and start.exit_code is not None:
            ended_well = start.exit_code == 0
            if start.exit_code in _STOPPED_CODES:
                return "stopped"
        else:
            steps = self.steps()
            ended_well = self.summary_path() is not None
            if not ended_well and not any(step.status == "failed" for step in steps):
                return "stopped"
        return "succeeded" if ended_well else "failed"

    def sections(self, *, of_all_attempts: bool = False) -> list[LogSection]:
        """Return what the tasks of the last attempt wrote to the log, in the order of their start.

        KFP logs nothing of a task whose result came from the cache.

        Args:
            of_all_attempts: whether to return the tasks of earlier attempts too.
        """
        try:
            text = self.log_path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        attempts = list(_sections(_STYLE.sub("", text).splitlines()))
        chosen = attempts if of_all_attempts else attempts[-1:]
        return [section for attempt in chosen for section in attempt]

    def cached(self) -> list[str]:
        """Return the stages whose results came from the cache in the last attempt.

        KFP does not say which those are: they are the stages that did not run, but that a stage
        that ran waits for.
        """
        steps = self.steps()
        ran = {stage_of(step) for step in steps if step.step not in NEVER_CACHED}
        if any(step.step in ("report", "publish") for step in steps):
            ran.add("publish")
        waited = dict(LINE)
        needed: set[str] = set()
        queue = list(ran)
        while queue:
            before = [name for name in waited.get(queue.pop(), ()) if name not in needed]
            needed |= set(before)
            queue += before
        return [name for name, _ in LINE if name in needed - ran]

    def _is_locked(self) -> bool:
        try:
            with open(self.log_path, "rb") as log:
                fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False


def find_local_run(name: str, runs_dir: Path = RUNS_DIR) -> LocalRun | None:
    """Return the run in a directory, or of a name below runs/; None if there is none."""
    for directory in (Path(name), runs_dir / name):
        if (directory / RECIPE_FILE).is_file():
            return LocalRun(directory.resolve())
    return None


def require_local_run(name: str) -> LocalRun:
    """Return the run in a directory, or of a name below runs/.

    Raises:
        UserError: there is none.
    """
    found = find_local_run(name)
    if found is not None:
        return found
    runs = ", ".join(run.name for run in local_runs()[:5])
    hint = f"the newest below {RUNS_DIR}/ are {runs}" if runs else f"there is none in {RUNS_DIR}/"
    raise UserError(f"{name} is not a run: it has no {RECIPE_FILE}; {hint}")


def local_runs(runs_dir: Path = RUNS_DIR) -> list[LocalRun]:
    """Return the runs below a directory, the newest first."""
    found = [path.parent for path in runs_dir.glob(f"*/{RECIPE_FILE}")]
    found.sort(key=lambda path: (path / RECIPE_FILE).stat().st_mtime, reverse=True)
    return [LocalRun(path.resolve()) for path in found]


def set_events_aside(run: LocalRun) -> None:
    """Keep the events of an attempt under another name, so that the next one starts with none."""
    if run.events_path.exists():
        number = 1 + len(list(run.events_path.parent.glob("events-*.jsonl")))
        run.events_path.rename(run.events_path.with_name(f"events-{number}.jsonl"))


def remove_partial_artifacts(runs_dir: Path) -> list[Path]:
    """Remove what killed steps of all runs wrote of their artifacts; return what was removed.

    Each attempt of a run writes below a directory of its own, so no later step of the run finds it.
    """
    task_dirs = runs_dir.glob(f"*/{ARTIFACTS_DIR}/*/*/")
    return [
        removed
        for task_dir in task_dirs
        for prefix in (".", PREFIX)
        for removed in remove_leftovers(task_dir, prefix=prefix)
    ]


def _sections(lines: list[str]) -> Iterator[list[LogSection]]:
    """Yield the sections of each attempt."""
    found: list[LogSection] = []
    running: list[LogSection] = []
    for line in lines:
        if _PIPELINE.match(line):
            yield found
            found, running = [], []
        elif begun := _BEGIN.match(line):
            running.append(LogSection(begun[1]))
            found.append(running[-1])
        elif ended := _END.match(line):
            for section in [each for each in running if each.task == ended[1]]:
                section.status = ended[2]
                running.remove(section)
        elif running:
            # Lines do not name their task; of tasks that run at once, the last one gets them.
            running[-1].lines.append(line.removeprefix("    "))
    yield found
