"""Checkpoints that are whole or not there, each under the key of the run that may use it.

    <root>/<key>/identity.json              what the key is the hash of
                 lock                       held while a run uses the directory
                 checkpoint-120/            the two newest, each with the SHA-256 of its files
                 checkpoint-160/
                 .partial/                  one that is being written

A checkpoint is written under another name, its files are hashed and flushed, and one rename makes
it a checkpoint. So a run that is killed while writing leaves the ones before it as they were, and
a file that a disk damaged later is found by its hash.

The root is, in this order: the environment variable TUNELINE_CHECKPOINT_DIR, e.g. a volume that
outlives the pod (without one, a retry on another node has nothing to resume from) or a directory
beside local runs; else `.checkpoints` beside the step's output. Runs of any recipes may share one
root. A run that ends well removes its own directory.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from tuneline.errors import StorageError

logger = logging.getLogger(__name__)

ROOT_VARIABLE = "TUNELINE_CHECKPOINT_DIR"
NUM_KEPT = 2

_CHECKSUMS = "checksums.json"
_IDENTITY = "identity.json"
_PREFIX = "checkpoint-"


class CheckpointStore:
    """The checkpoints of one run. Use `opened`, which holds the lock."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.partial = directory / ".partial"
        """Where a checkpoint is written before `seal`."""

    @classmethod
    @contextlib.contextmanager
    def opened(cls, root: str | Path, identity: Mapping[str, Any]) -> Iterator[Self]:
        """Open the directory of the run with this identity, alone, and say what is not resumed.

        Args:
            root: see the module's docstring.
            identity: everything that decides the result, as plain values; its hash is the key.

        Raises:
            StorageError: the directory cannot be made, or another process is using it.
        """
        root = Path(root)
        text = json.dumps(identity, sort_keys=True, indent=2)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        store = cls(root / key)
        try:
            store.directory.mkdir(parents=True, exist_ok=True)
            lock = open(store.directory / "lock", "w")
        except OSError as error:
            raise StorageError(
                f"no checkpoints can be written to {store.directory} ({error.strerror}): name a "
                f"directory that can be, in the environment variable {ROOT_VARIABLE}"
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StorageError(
                    f"another process is training the same thing with the checkpoints in "
                    f"{store.directory}: wait for it, or set {ROOT_VARIABLE} to another directory"
                ) from None
            shutil.rmtree(store.partial, ignore_errors=True)
            if not store.steps():
                _say_what_differs(root, store.directory, identity)
            (store.directory / _IDENTITY).write_text(text + "\n", encoding="utf-8")
            try:
                yield store
            finally:
                if not store.steps():
                    store.remove()

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, whole or damaged, oldest first."""
        names = (path.name for path in self.directory.glob(f"{_PREFIX}*"))
        return sorted(int(name.removeprefix(_PREFIX)) for name in names)

    def path(self, step: int) -> Path:
        """Return where the checkpoint of a step is."""
        return self.directory / f"{_PREFIX}{step}"

    def latest(self) -> Path | None:
        """Return the newest checkpoint whose every file is as it was written; remove others."""
        for step in reversed(self.steps()):
            path = self.path(step)
            fault = _fault(path)
            if fault is None:
                return path
            logger.warning("checkpoint %s is not used, and removed: %s", path, fault)
            # Left there, it would count as one of the newest, and newer ones would be dropped.
            shutil.rmtree(path, ignore_errors=True)
        return None

    def seal(self, written: Path, step: int) -> None:
        """Make what was written below `partial` the checkpoint of a step; drop the oldest."""
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
        """Delete the checkpoints of later steps."""
        for later in self.steps():
            if later > step:
                shutil.rmtree(self.path(later), ignore_errors=True)

    def remove(self) -> None:
        """Delete the run's directory, and the root if nothing else is in it."""
        shutil.rmtree(self.directory, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: other runs keep theirs here
            self.directory.parent.rmdir()


def _say_what_differs(root: Path, own: Path, identity: Mapping[str, Any]) -> None:
    """Name what sets this run apart from the last one that left a checkpoint here."""
    others = [
        path
        for path in root.glob(f"*/{_IDENTITY}")
        if path.parent != own and CheckpointStore(path.parent).steps()
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
        "not resumed: the checkpoints in %s are of a run that differs in %s; starting from step 0",
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


def _fault(path: Path) -> str | None:
    """Say what is wrong with a checkpoint, or None."""
    try:
        sums = json.loads((path / _CHECKSUMS).read_text(encoding="utf-8"))
        for name, expected in sums.items():
            if _sha256(path / name) != expected:
                return f"{name} is not what was written"
    except OSError as error:
        return f"{Path(error.filename).name} cannot be read ({error.strerror})"
    except ValueError:
        return f"{_CHECKSUMS} is not JSON"
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
