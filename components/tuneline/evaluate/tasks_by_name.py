"""Find and load the tasks that a recipe names."""

import difflib
import logging
from pathlib import Path
from typing import Any

import datasets
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from tuneline.errors import HubError, TaskError
from tuneline.evaluate import heldout

logger = logging.getLogger(__name__)


class TaskFinder:
    """Knows every task by name: ours, those of a directory, those of lm-eval's registry.

    Args:
        names: the tasks that will be loaded; each is checked here.
        task_dir: a directory with task files; its names go before the registry's.

    Attributes:
        manager: lm-eval's own finder, for calls that would make another one: reading the whole
            registry takes 19 s on two cores.

    Raises:
        TaskError: a name is unknown, or the directory is not there.
    """

    def __init__(self, names: tuple[str, ...], task_dir: str | None = None) -> None:
        paths = [heldout.TASKS_DIR]
        if task_dir is not None:
            path = Path(task_dir).expanduser().resolve()
            if not path.is_dir():
                raise TaskError(f"evaluate.task_dir: there is no directory {task_dir}")
            paths.append(path)
            logger.info("tasks of %s go before lm-eval's of the same name", path)
        # The registry has 15,000 files: it is read only when a name asks for it.
        self.manager = TaskManager(include_path=paths, include_defaults=False)
        if set(names) - set(self.manager.all_tasks):
            self.manager = TaskManager(include_path=paths)
        for name in names:
            self._check(name, task_dir)

    def load(self, name: str, heldout_file: Path, cache_dir: Path) -> dict[str, Any]:
        """Load one task, or the tasks of a group or tag, with its data.

        Args:
            name: as the recipe has it.
            heldout_file: documents for our own tasks.
            cache_dir: where converted local files are kept meanwhile.

        Returns:
            Task name -> lm-eval task.

        Raises:
            TaskError: the task file or its data are broken.
            HubError: the data are on the Hub, and it was not reached.
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
            return self.manager.load([spec])["tasks"]
        except (ConnectionError, datasets.exceptions.DatasetNotFoundError, OSError) as error:
            raise HubError(
                f"the data of task '{name}' are not on this machine and could not be fetched "
                f"({_first_line(error)}): run once with network, so that they are in "
                "HF_HOME, or name a task over local files (evaluate.task_dir)"
            ) from None
        except Exception as error:
            # A task file is code that others wrote: whatever it raises is about that file.
            raise TaskError(
                f"task '{name}' cannot be loaded ({entry.yaml_path}): "
                f"{type(error).__name__}: {_first_line(error)}"
            ) from error

    def _check(self, name: str, task_dir: str | None) -> None:
        known = self.manager.all_tasks
        if name in known:
            return
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        where = f"task_dir {task_dir}, " if task_dir else ""
        hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
        raise TaskError(
            f"evaluate.tasks: '{name}' is unknown; looked in ours ({', '.join(heldout.TASKS)}), "
            f"{where}lm-eval's registry; {hint}"
        )


def _full_config(entry: Any) -> dict[str, Any]:
    """Read a task file with its functions, which lm-eval's index leaves out.

    lm-eval 0.4.13 takes overrides for a task by name only inside a group, and offers this reader
    under a private name; the version is pinned.
    """
    return load_yaml(entry.yaml_path)


def _resolve(files: Any, base: Path, task: str) -> Any:
    """Make local paths absolute: lm-eval takes them from the working directory."""
    if isinstance(files, dict):
        return {split: _resolve(file, base, task) for split, file in files.items()}
    if isinstance(files, list):
        return [_resolve(file, base, task) for file in files]
    if "://" in files:
        return files
    path = base / files
    if not any(character in files for character in "*?[") and not path.is_file():
        raise TaskError(f"task '{task}': its data file {path} is not there")
    return str(path)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__
