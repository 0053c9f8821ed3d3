"""Atomic checkpoints: a checkpoint exists completely or not at all, and belongs to one run.

    <root>/<key>/identity.json      everything that decides the result of the run; <key> is a hash
                                    of these values
                 lock               locked while a run uses the directory
                 checkpoint-120/    the two newest checkpoints, each with hashes of its files
                 checkpoint-160/
                 .partial/          checkpoint that is being written

The trainer writes a checkpoint below `.partial`. `seal` hashes its files, flushes them to the disk
and renames the directory; the rename makes it a checkpoint. A run that is killed while it writes
therefore leaves the earlier checkpoints intact. If a file is damaged later, it no longer matches
its hash, and the run resumes from the previous checkpoint.

The root is the value of the environment variable TUNELINE_CHECKPOINT_DIR, or `.checkpoints` next to
the adapter's directory if the variable is not set. On a cluster the root should be on a volume that
outlives the pod: otherwise a retry on another node has nothing to resume from. Runs of different
recipes can share one root. A run that succeeds deletes its own directory.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Self

from tuneline.errors import StorageError

logger = logging.getLogger(__name__)

ROOT_VARIABLE = "TUNELINE_CHECKPOINT_DIR"
NUM_KEPT = 2
LOCK_SECONDS = 120.0
"""Longest wait for another process to release a run's directory. A pod that replaces one of a lost
node finds the directory locked until the file server drops the locks of that node: after 90 s with
NFS 4."""

_CHECKSUMS = "checksums.json"
_IDENTITY = "identity.json"
_PREFIX = "checkpoint-"


class CheckpointStore:
    """The checkpoints of one run. Create it with `opened`, which also locks the run's directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.partial = directory / ".partial"
        """Directory below which a checkpoint is written before `seal`."""

    @classmethod
    @contextlib.contextmanager
    def opened(cls, root: str | Path, identity: Mapping[str, Any]) -> Iterator[Self]:
        """Open the directory of the run with this identity, and lock it until the context ends.

        If this run has no checkpoint but another run under the same root has one, the values in
        which the two identities differ are logged.

        Args:
            root: Directory of all runs; see the module's docstring.
            identity: Everything that decides the result of the run, as JSON values.

        Raises:
            StorageError: the directory cannot be created, or another process keeps its lock for
                `LOCK_SECONDS`.
        """
        root = Path(root)
        text = json.dumps(identity, sort_keys=True, indent=2)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        store = cls(root / key)
        with _lock(store.directory):
            shutil.rmtree(store.partial, ignore_errors=True)
            if not store.steps():
                _log_differences(root, store.directory, identity)
            (store.directory / _IDENTITY).write_text(text + "\n", encoding="utf-8")
            try:
                yield store
            finally:
                if not store.steps():
                    store.remove()

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, intact or damaged, oldest first."""
        names = (path.name for path in self.directory.glob(f"{_PREFIX}*"))
        return sorted(int(name.removeprefix(_PREFIX)) for name in names)

    def path(self, step: int) -> Path:
        """Return the directory of a step's checkpoint."""
        return self.directory / f"{_PREFIX}{step}"

    def latest(self) -> Path | None:
        """Return the newest intact checkpoint, or None if there is none.

        Damaged checkpoints that are newer than the returned one are deleted.
        """
        for step in reversed(self.steps()):
            path = self.path(step)
            problem = _problem(path)
            if problem is None:
                return path
            logger.warning("deleting damaged checkpoint %s: %s", path, problem)
            # Otherwise `seal` would retain the damaged checkpoint, and delete an intact one.
            shutil.rmtree(path, ignore_errors=True)
        return None

    def seal(self, written: Path, step: int) -> None:
        """Turn a directory below `partial` into a checkpoint, and delete older checkpoints.

        The `NUM_KEPT` newest checkpoints remain.

        Args:
            written: Directory below `partial`, with all files of the checkpoint.
            step: Optimizer step after which the directory was written.
        """
        sums = {path.name: _sha256(path) for path in sorted(written.iterdir())}
        (written / _CHECKSUMS).write_text(json.dumps(sums, indent=2), encoding="utf-8")
        for path in written.iterdir():
            _flush(path)
        _flush(written)
        target = self.path(step)
        shutil.rmtree(target, ignore_errors=True)
        written.rename(target)
        _flush(self.directory)
        shutil.rmtree(self.partial, ignore_errors=True)
        for old in self.steps()[:-NUM_KEPT]:
            shutil.rmtree(self.path(old), ignore_errors=True)

    def discard_after(self, step: int) -> None:
        """Delete the checkpoints of all steps after the given one."""
        for later in self.steps():
            if later > step:
                shutil.rmtree(self.path(later), ignore_errors=True)

    def remove(self) -> None:
        """Delete the run's directory, and then the root if no other run has a directory there."""
        shutil.rmtree(self.directory, ignore_errors=True)
        with contextlib.suppress(OSError):  # rmdir fails if the root has other directories.
            self.directory.parent.rmdir()


def newest_checkpoint(root: Path, *, since: float) -> tuple[Path, int] | None:
    """Return the newest checkpoint of all runs, and its optimizer step.

    Args:
        root: Directory of all runs.
        since: Time, in seconds since the epoch.

    Returns:
        None if no checkpoint was written after `since`. The checkpoint may be damaged.
    """
    found = [
        (path.stat().st_mtime, int(step), path)
        for path in root.glob(f"*/{_PREFIX}*")
        if (step := path.name.removeprefix(_PREFIX)).isdigit()
    ]
    newest = max((each for each in found if each[0] >= since), default=None)
    return (newest[2], newest[1]) if newest is not None else None


def _lock(directory: Path) -> IO[str]:
    """Create and lock a directory, until the returned file is closed.

    Raises:
        StorageError: the directory cannot be created, or another process keeps its lock.
    """
    deadline = time.monotonic() + LOCK_SECONDS
    path = directory / "lock"
    for number in itertools.count():
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lock = open(path, "w")
        except OSError as error:
            raise StorageError(
                f"checkpoints cannot be written to {directory} ({error.strerror}): set the "
                f"environment variable {ROOT_VARIABLE} to a directory that is writable"
            ) from error
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The process that had the lock may have removed the directory.
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                return lock
        lock.close()
        if time.monotonic() >= deadline:
            break
        if number == 0:
            logger.warning("%s is locked: waiting for another process to end", directory)
        time.sleep(min(1.0, LOCK_SECONDS))
    raise StorageError(
        f"another process is training the same run with the checkpoints in {directory}: wait "
        f"until it ends, or set {ROOT_VARIABLE} to another directory"
    )


def _log_differences(root: Path, directory: Path, identity: Mapping[str, Any]) -> None:
    """Log the values in which this run differs from the newest other run with a checkpoint."""
    others = [
        path
        for path in root.glob(f"*/{_IDENTITY}")
        if path.parent != directory and CheckpointStore(path.parent).steps()
    ]
    if not others:
        return
    newest = max(others, key=lambda path: path.stat().st_mtime)
    before = _flat(json.loads(newest.read_text(encoding="utf-8")))
    now = _flat(json.loads(json.dumps(identity)))
    changes = [
        f"{name} (was {_short(before.get(name))}, is {_short(now.get(name))})"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    logger.info(
        "not resumed: the checkpoints in %s belong to a run that differs in %s; starting at step 0",
        newest.parent,
        ", ".join(changes),
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:16]}..."


def _problem(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None if it is intact."""
    try:
        sums = json.loads((path / _CHECKSUMS).read_text(encoding="utf-8"))
        for name, expected in sums.items():
            if _sha256(path / name) != expected:
                return f"{name} does not match its SHA-256 hash"
    except OSError as error:
        return f"{Path(error.filename).name} cannot be read ({error.strerror})"
    except ValueError:
        return f"{_CHECKSUMS} is not valid JSON"
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file, or the entries of a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
