"""Find and load the tasks that a recipe names."""

import difflib
import logging
from pathlib import Path
from typing import Any

import yaml
from datasets.exceptions import DatasetNotFoundError
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from tuneline.bounded_yaml import check_yaml
from tuneline.errors import DataError, HubError, TaskError
from tuneline.evaluate import heldout
from tuneline.runtime.retries import retrying
from tuneline.runtime.source_names import check_link

logger = logging.getLogger(__name__)


class TaskFinder:
    """Finds tasks by name: tuneline's own tasks, tasks in a directory and lm-eval's registry.

    Args:
        names: names of the tasks that will be loaded; the constructor checks each name.
        task_dir: a directory with task files; its tasks take precedence over the registry's tasks
            of the same name.

    Attributes:
        manager: lm-eval's task manager. Pass it to functions of lm-eval that would otherwise create
            another manager: reading the whole registry takes 19 s on two cores.

    Raises:
        TaskError: a name is unknown, or the directory does not exist.
    """

    def __init__(self, names: tuple[str, ...], task_dir: str | None = None) -> None:
        paths: list[str | Path] = [heldout.TASKS_DIR]
        if task_dir is not None:
            path = Path(task_dir).expanduser().resolve()
            if not path.is_dir():
                raise TaskError(f"evaluate.task_dir: there is no directory {task_dir}")
            _check_files(path)
            paths.append(path)
            logger.info("tasks of %s take precedence over lm-eval's tasks of the same name", path)
        # The registry has 15,000 files, so it is read only if a name is not found without it.
        self.manager = TaskManager(include_path=paths, include_defaults=False)
        if set(names) - set(self.manager.all_tasks):
            self.manager = TaskManager(include_path=paths)
        for name in names:
            self._check(name, task_dir)

    def load(self, name: str, heldout_file: Path, cache_dir: Path) -> dict[str, Any]:
        """Load one task, or the tasks of a group or tag, with their data.

        Args:
            name: name of the task in the recipe.
            heldout_file: file with the documents for tuneline's own tasks.
            cache_dir: directory in which `datasets` stores local files that it has converted.

        Returns:
            The lm-eval tasks by name.

        Raises:
            TaskError: the task file or the task's data are broken.
            HubError: the data are on the Hub, which is unreachable.
        """
        entry = self.manager.task_index[name]
        spec: Any = name
        if name in heldout.TASKS:
            kwargs = {"data_files": {"test": str(heldout_file)}, "cache_dir": str(cache_dir)}
            spec = {**_full_config(entry), "dataset_kwargs": kwargs}
        elif entry.yaml_path is not None and "data_files" in (entry.cfg or {}).get(
            "dataset_kwargs", {}
        ):
            config = _full_config(entry)
            given = config["dataset_kwargs"]
            files = _resolve(given["data_files"], entry.yaml_path.parent, name)
            kwargs = {**given, "data_files": files, "cache_dir": str(cache_dir)}
            spec = {**config, "dataset_kwargs": kwargs}
        try:
            loaded = retrying(f"load the data of task '{name}'", lambda: self.manager.load([spec]))
            tasks: dict[str, Any] = loaded["tasks"]
            return tasks
        except HubError:
            raise  # of `retrying`
        except (ConnectionError, DatasetNotFoundError, OSError) as error:
            raise HubError(
                f"the data of task '{name}' are not on this machine and could not be fetched "
                f"({_first_line(error)}): run once with network access, so that they "
                "are cached in HF_HOME, or name a task over local files (evaluate.task_dir)"
            ) from None
        except Exception as error:
            # A task file can name Python code to run, and that code can raise any exception.
            raise TaskError(
                f"task '{name}' cannot be loaded ({entry.yaml_path}): "
                f"{type(error).__name__}: {_first_line(error)}"
            ) from error

    def _check(self, name: str, task_dir: str | None) -> None:
        names = self.manager.all_tasks
        if name in names:
            return
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        where = f"task_dir {task_dir}, " if task_dir else ""
        hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
        raise TaskError(
            f"evaluate.tasks: '{name}' is unknown; searched tuneline's own tasks "
            f"({', '.join(heldout.TASKS)}), {where}lm-eval's registry; {hint}"
        )


def _check_files(directory: Path) -> None:
    """Check the YAML files of a directory of tasks before lm-eval, which has no bounds, reads them.

    Raises:
        TaskError: a file is not YAML or exceeds a bound, or a link leads out of the directory.
    """
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            check_link(path, directory, TaskError)
    # Some of lm-eval's own files end in _yaml; other files include them.
    for path in sorted(path for path in directory.rglob("*yaml") if path.is_file()):
        try:
            check_yaml(path.read_text(encoding="utf-8"), where=str(path))
        except (DataError, yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            raise TaskError(
                f"evaluate.task_dir: lm-eval cannot read the task file {path}: {error}"
            ) from None


def _full_config(entry: Any) -> dict[str, Any]:
    """Return all settings of a task file, including functions, which lm-eval's index leaves out.

    This calls a private function of lm-eval, whose version is therefore pinned: lm-eval 0.4.13 has
    no public one, and it accepts overrides for a task by name only within a group.
    """
    settings: dict[str, Any] = load_yaml(entry.yaml_path)
    return settings


def _resolve(files: Any, base: Path, task: str) -> Any:
    """Make local paths absolute, because lm-eval resolves them against the working directory."""
    if isinstance(files, dict):
        return {split: _resolve(file, base, task) for split, file in files.items()}
    if isinstance(files, list):
        return [_resolve(file, base, task) for file in files]
    if "://" in files:
        return files
    path = base / files
    if not any(character in files for character in "*?[") and not path.is_file():
        raise TaskError(f"task '{task}': its data file {path} does not exist")
    return str(path)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__
