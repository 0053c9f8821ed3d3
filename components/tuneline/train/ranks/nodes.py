"""How the nodes of one training communicate: by files in a directory that they share.

The nodes are the pods of a Kubeflow TrainJob. Trainer's torch runtime tells each pod which node it
is (PET_NNODES, PET_NODE_RANK, PET_NPROC_PER_NODE, PET_MASTER_ADDR, PET_MASTER_PORT). The protocol:

1. The launcher (`trainjob.run`) writes the inputs to the directory and creates the TrainJob.
2. Node 0 runs the train step. Each time the step starts its ranks, node 0 announces an attempt.
   One step makes several attempts if memory runs out, or if it returns to a checkpoint.
3. The other nodes poll for announcements. Each of these nodes begins the attempt (and writes a file
   that says so), runs its ranks, and leaves the attempt (and writes another file).
4. When its own ranks have ended, node 0 marks the attempt as over. A node whose ranks are still
   running then kills them. Node 0 waits until every node that has begun has also left, because
   the attempt's directory is deleted afterwards.
5. When the step ends, node 0 writes the outcome. The other nodes then exit. If the outcome is an
   error, the launcher raises this error.

    <directory>/config.json             train config, written by the launcher
                base_model/, dataset/   inputs, copied by the launcher
                attempts/0001.json      announcement: {"directory", "num_ranks", "device"}
                attempts/0001.node-1    node 1 has begun the attempt
                attempts/0001.left-1    node 1 has left the attempt and writes no more files
                attempts/0001.over      the attempt has ended, with or without an error
                outcome.json            {"kind", "message"} of the step; kind is empty on success
                launcher                time of the launcher's last beat (trainjob.lease)
"""

import contextlib
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from tuneline.errors import RecipeError

DIRECTORY_VARIABLE = "TUNELINE_NODES_DIR"
CONFIG_FILE = "config.json"
BASE_MODEL_DIR = "base_model"
DATASET_DIR = "dataset"
ADAPTER_DIR = "adapter"
CURVES_FILE = "curves.html"

_OUTCOME_FILE = "outcome.json"
_ATTEMPTS_DIR = "attempts"
_LAUNCHER_FILE = "launcher"
_POLL_SECONDS = 0.05
_SET_BY_TRAINER = ("NNODES", "NODE_RANK", "NPROC_PER_NODE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Outcome:
    """How the train step ended."""

    kind: str
    """Class name of the error; empty on success."""
    message: str = ""
    """Message of the error."""


@dataclass(frozen=True)
class Attempt:
    """One start of all ranks together."""

    path: Path
    """Path of the announcement without its suffix."""
    directory: Path
    """Directory for the files that the ranks exchange; see `launch`."""
    num_ranks: int
    """Number of ranks over all nodes."""
    device: str
    """Kind of device: "cuda" or "cpu"."""

    @property
    def is_over(self) -> bool:
        """Whether the attempt has ended, so that ranks that are still running must be killed."""
        return self.path.with_suffix(".over").exists()

    def end(self) -> None:
        """Mark the attempt as over for the other nodes."""
        self.path.with_suffix(".over").touch()

    def begin(self, node: int) -> bool:
        """Write the file which says that a node has begun the attempt.

        Returns:
            False if the node has begun the attempt before, which means that its pod restarted.
        """
        try:
            self.path.with_suffix(f".node-{node}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def leave(self, node: int) -> None:
        """Write the file which says that a node has left the attempt and writes no more files."""
        self.path.with_suffix(f".left-{node}").touch()

    def wait_for_others(self, seconds: float) -> None:
        """Wait until every node that has begun the attempt has left it, or the time is up."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._nodes_with("node") <= self._nodes_with("left"):
                return
            time.sleep(_POLL_SECONDS)

    def _nodes_with(self, note: str) -> set[str]:
        """Return the numbers of the nodes that have begun ("node") or left ("left") the attempt."""
        notes = self.path.parent.glob(f"{self.path.name}.{note}-*")
        return {path.suffix.partition("-")[2] for path in notes}


class SharedDirectory:
    """The files through which the nodes and the launcher communicate."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._attempts_dir = path / _ATTEMPTS_DIR

    def clear(self) -> None:
        """Delete all attempts and the outcome, before a new TrainJob starts."""
        shutil.rmtree(self._attempts_dir, ignore_errors=True)
        (self.path / _OUTCOME_FILE).unlink(missing_ok=True)

    def beat(self) -> None:
        """Write that the launcher is alive."""
        with contextlib.suppress(OSError):
            _write_atomically(self.path / _LAUNCHER_FILE, str(time.time()))

    def last_beat(self) -> str | None:
        """Return what the launcher wrote last; None if it wrote nothing or cannot be read."""
        try:
            return (self.path / _LAUNCHER_FILE).read_text(encoding="utf-8")
        except OSError:
            return None

    def announce(self, directory: Path, *, num_ranks: int, device: str) -> Attempt:
        """Tell the other nodes to start their ranks.

        Args:
            directory: Directory for the files that the ranks exchange; see `launch`.
            num_ranks: Number of ranks over all nodes.
            device: Kind of device: "cuda" or "cpu".
        """
        self._attempts_dir.mkdir(exist_ok=True)
        number = len(list(self._attempts_dir.glob("*.json"))) + 1
        attempt = Attempt(self._attempts_dir / f"{number:04}", directory, num_ranks, device)
        values = {"directory": str(directory), "num_ranks": num_ranks, "device": device}
        _write_atomically(attempt.path.with_suffix(".json"), json.dumps(values))
        return attempt

    def attempts(self) -> list[Attempt]:
        """Return the announced attempts, oldest first."""
        attempts = []
        for path in sorted(self._attempts_dir.glob("*.json")):
            values = json.loads(path.read_text(encoding="utf-8"))
            directory = Path(values.pop("directory"))
            attempts.append(Attempt(path.with_suffix(""), directory, **values))
        return attempts

    def write_outcome(self, outcome: Outcome) -> None:
        """Record how the step ended; the other nodes exit when they read the outcome."""
        _write_atomically(self.path / _OUTCOME_FILE, json.dumps(asdict(outcome)))

    def read_outcome(self) -> Outcome | None:
        """Return how the step ended, or None while the step runs."""
        try:
            text = (self.path / _OUTCOME_FILE).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        return Outcome(**json.loads(text))


@dataclass(frozen=True)
class Node:
    """The place of this machine among the nodes of the training."""

    number: int
    """Number of this node, from 0."""
    num_nodes: int
    """Number of nodes."""
    ranks_per_node: int
    """Number of ranks on each node."""
    master_address: str
    """Host name or IP address of node 0."""
    master_port: int
    """Port on which the ranks meet on node 0."""
    shared: SharedDirectory
    """Files through which the nodes communicate."""

    @classmethod
    def from_environment(cls) -> Self | None:
        """Read the place of this node from the environment; None on a machine that trains alone.

        Raises:
            RecipeError: Trainer's torch runtime has not set its variables.
        """
        directory = os.environ.get(DIRECTORY_VARIABLE)
        if not directory:
            return None
        values = {name: os.environ.get(f"PET_{name}", "") for name in _SET_BY_TRAINER}
        missing = [f"PET_{name}" for name, value in values.items() if not value]
        if missing or not values["NPROC_PER_NODE"].isdigit():
            raise RecipeError(
                f"{DIRECTORY_VARIABLE} is set, but the environment has no valid "
                f"{', '.join(missing) or 'PET_NPROC_PER_NODE'}, so this pod does not know which "
                "node it is: use a TrainJob runtime with mlPolicy.torch (placement.trainer_runtime)"
            )
        return cls(
            number=int(values["NODE_RANK"]),
            num_nodes=int(values["NNODES"]),
            ranks_per_node=int(values["NPROC_PER_NODE"]),
            master_address=values["MASTER_ADDR"],
            master_port=int(values["MASTER_PORT"]),
            shared=SharedDirectory(Path(directory)),
        )

    @property
    def num_ranks(self) -> int:
        """Number of ranks over all nodes."""
        return self.num_nodes * self.ranks_per_node

    @property
    def local_ranks(self) -> range:
        """Global numbers of the ranks on this node."""
        first = self.number * self.ranks_per_node
        return range(first, first + self.ranks_per_node)


def _write_atomically(path: Path, text: str) -> None:
    """Write a file that a reader sees either complete or not at all."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
