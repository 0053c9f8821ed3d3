"""Several machines that train one thing: how one of them sees the others.

Each is a pod of a Kubeflow TrainJob, and Trainer's torch runtime tells it which one it is
(PET_NNODES, PET_NODE_RANK, PET_NPROC_PER_NODE, PET_MASTER_ADDR, PET_MASTER_PORT). The first one
runs the train step; where the step starts ranks, it announces an attempt on the volume that all
share, and the others start theirs. A step may make several attempts: with fewer rows a forward
when memory ran out, or anew from a checkpoint.

    <directory>/config.json             what the launcher put there, beside base_model/ and dataset/
                attempts/0001.json      {"directory", "num_ranks", "device"}
                attempts/0001.node-1    node 1 has begun it
                attempts/0001.left-1    and is through with it
                attempts/0001.over      it has ended, well or not
                verdict.json            {"kind", "message"} of the step; no kind: it went well
"""

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

_VERDICT_FILE = "verdict.json"
_ATTEMPTS_DIR = "attempts"
_SECONDS_BETWEEN_LOOKS = 0.05
_SET_BY_TRAINER = ("NNODES", "NODE_RANK", "NPROC_PER_NODE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Verdict:
    """How the step ended on the nodes."""

    kind: str
    """Name of the error's type; empty if there was none."""
    message: str = ""


@dataclass(frozen=True)
class Attempt:
    """Ranks that are started together."""

    path: Path
    """Of the announcement, without its suffix."""
    directory: Path
    """See `launch`."""
    num_ranks: int
    device: str

    @property
    def is_over(self) -> bool:
        """Whether its ranks are to be ended, where they have not."""
        return self.path.with_suffix(".over").exists()

    def end(self) -> None:
        """Tell the other nodes."""
        self.path.with_suffix(".over").touch()

    def wait_for_others(self, seconds: float) -> None:
        """Return when all nodes that have begun are through, because its directory goes then."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            begun, left = (
                {path.suffix.partition("-")[2] for path in self._beside(f"{what}-*")}
                for what in ("node", "left")
            )
            if begun <= left:
                return
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _beside(self, pattern: str) -> list[Path]:
        return list(self.path.parent.glob(f"{self.path.name}.{pattern}"))

    def leave(self, node: int) -> None:
        """Note that a node writes nothing more of it."""
        self.path.with_suffix(f".left-{node}").touch()

    def begin(self, node: int) -> bool:
        """Note that a node begins it; False if it had already, and was started again since."""
        try:
            self.path.with_suffix(f".node-{node}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


class Board:
    """What the nodes and the launcher tell each other, on the volume that they share."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._attempts_dir = directory / _ATTEMPTS_DIR

    def clear(self) -> None:
        """Forget attempts and verdict: a new job begins."""
        shutil.rmtree(self._attempts_dir, ignore_errors=True)
        (self.directory / _VERDICT_FILE).unlink(missing_ok=True)

    def announce(self, directory: Path, *, num_ranks: int, device: str) -> Attempt:
        """Have the other nodes start their ranks of the job in `directory`."""
        self._attempts_dir.mkdir(exist_ok=True)
        number = len(list(self._attempts_dir.glob("*.json"))) + 1
        attempt = Attempt(self._attempts_dir / f"{number:04}", directory, num_ranks, device)
        values = {"directory": str(directory), "num_ranks": num_ranks, "device": device}
        _write_whole(attempt.path.with_suffix(".json"), json.dumps(values))
        return attempt

    def attempts(self) -> list[Attempt]:
        """Return what was announced, the oldest first."""
        found = []
        for path in sorted(self._attempts_dir.glob("*.json")):
            values = json.loads(path.read_text(encoding="utf-8"))
            directory = Path(values.pop("directory"))
            found.append(Attempt(path.with_suffix(""), directory, **values))
        return found

    def conclude(self, verdict: Verdict) -> None:
        """Say how the step ended; the nodes end with it."""
        _write_whole(self.directory / _VERDICT_FILE, json.dumps(asdict(verdict)))

    def verdict(self) -> Verdict | None:
        """Return how the step ended; None: it has not."""
        try:
            text = (self.directory / _VERDICT_FILE).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        return Verdict(**json.loads(text))


@dataclass(frozen=True)
class Nodes:
    """This machine among the others."""

    count: int
    number: int
    """Of this one, from 0."""
    ranks_each: int
    master: str
    """Address of the first one."""
    port: int
    board: Board

    @classmethod
    def from_environment(cls) -> Self | None:
        """Return None on a machine that trains alone.

        Raises:
            RecipeError: Trainer's torch runtime has not said which node this is.
        """
        directory = os.environ.get(DIRECTORY_VARIABLE)
        if not directory:
            return None
        values = {name: os.environ.get(f"PET_{name}", "") for name in _SET_BY_TRAINER}
        missing = [f"PET_{name}" for name, value in values.items() if not value]
        if missing or not values["NPROC_PER_NODE"].isdigit():
            raise RecipeError(
                f"{DIRECTORY_VARIABLE} is set, and {', '.join(missing) or 'PET_NPROC_PER_NODE'} "
                "does not say which node this is: the TrainJob's runtime must have "
                "mlPolicy.torch (placement.trainer_runtime)"
            )
        return cls(
            count=int(values["NNODES"]),
            number=int(values["NODE_RANK"]),
            ranks_each=int(values["NPROC_PER_NODE"]),
            master=values["MASTER_ADDR"],
            port=int(values["MASTER_PORT"]),
            board=Board(Path(directory)),
        )

    @property
    def num_ranks(self) -> int:
        """Of all nodes together."""
        return self.count * self.ranks_each

    @property
    def own_ranks(self) -> range:
        """Those of this machine."""
        return range(self.number * self.ranks_each, (self.number + 1) * self.ranks_each)


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
