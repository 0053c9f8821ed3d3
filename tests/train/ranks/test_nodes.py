"""Several nodes of one training, which here are processes with the environment that Trainer sets.

tests/train/trainjob/test_follow.py compares what two nodes learn with what one learns.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tuneline.errors import RecipeError
from tuneline.train.ranks.nodes import Node, Outcome, SharedDirectory

SETTINGS = {
    "dtype": "float32",
    "learning_rate": 5e-3,
    "optim": "adamw_torch",
    "warmup_steps": 0,
    "max_steps": 400,
    "global_batch_size": 4,
    "micro_batch_size": 2,
    "packing": False,
    "checkpoint_minutes": 0,
    "max_restarts": 1,
}


@pytest.fixture
def shared(tmp_path: Path, tiny_model_dir: Path, dataset_dir, answer_rows) -> Path:
    """Return a directory with what the launcher writes to the shared volume."""
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "base_model").symlink_to(tiny_model_dir)
    (shared / "dataset").symlink_to(dataset_dir(answer_rows))
    (shared / "config.json").write_text(json.dumps(SETTINGS))
    return shared


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start(shared: Path, number: int, port: int, **more: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TUNELINE_NODES_DIR": str(shared),
        "TUNELINE_CHECKPOINT_DIR": str(shared / "checkpoints"),
        "PET_NNODES": "2",
        "PET_NODE_RANK": str(number),
        "PET_NPROC_PER_NODE": "1",
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": str(port),
        **more,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "tuneline.train.trainjob.pod"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def newest(checkpoints: Path) -> int:
    """Return the step of the newest checkpoint, 0 where there is none."""
    return max((int(p.name.split("-")[1]) for p in checkpoints.glob("*/checkpoint-*")), default=0)


@pytest.mark.slow
def test_ranks_of_two_nodes_are_restarted_and_the_next_job_goes_on(shared: Path) -> None:
    port = free_port()
    nodes = [start(shared, number, port) for number in range(2)]
    checkpoints = shared / "checkpoints"
    for _ in range(2):
        # The first kill restarts the ranks of both nodes, the second is one too many.
        before = newest(checkpoints)
        while newest(checkpoints) <= before:
            assert all(node.poll() is None for node in nodes)
            time.sleep(0.1)
        (pid,) = shared.glob(".adapter.*/*/ranks/rank-1.pid")
        os.kill(int(pid.read_text()), signal.SIGKILL)
    assert [node.wait(60) for node in nodes] == [1, 1]
    directory = SharedDirectory(shared)
    outcome = directory.read_outcome()
    assert outcome is not None and outcome.kind == "TrainingError"
    assert "rank 1 of 2 was killed" in outcome.message
    assert "after 1 restart (train.max_restarts is 1)" in outcome.message
    assert len(directory.attempts()) == 2
    directory.clear()
    kept = newest(checkpoints)
    nodes = [start(shared, number, port) for number in range(2)]
    while newest(checkpoints) <= kept:
        assert all(node.poll() is None for node in nodes)
        time.sleep(0.1)
    for node in nodes:
        node.send_signal(signal.SIGTERM)
    outputs = [node.communicate(timeout=60)[0] for node in nodes]
    assert f"continuing from {checkpoints}" in outputs[0], outputs[0][-3000:]
    assert [node.returncode for node in nodes] == [143, 143]
    outcome = directory.read_outcome()
    assert outcome is not None and outcome.kind == "StoppedError"


def test_what_trainer_did_not_say_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Node.from_environment() is None
    monkeypatch.setenv("TUNELINE_NODES_DIR", str(tmp_path))
    monkeypatch.setenv("PET_NNODES", "2")
    with pytest.raises(
        RecipeError, match="no valid PET_NODE_RANK, .* does not know which node it is"
    ):
        Node.from_environment()


def test_attempts_are_begun_once(tmp_path: Path) -> None:
    shared = SharedDirectory(tmp_path)
    first = shared.announce(tmp_path / "a", num_ranks=2, device="cpu")
    second = shared.announce(tmp_path / "b", num_ranks=4, device="cpu")
    assert shared.attempts() == [first, second]
    assert second.begin(1)
    assert not second.begin(1)
    assert second.begin(2)
    began = time.monotonic()
    second.wait_for_others(0.2)
    assert time.monotonic() - began >= 0.2
    second.leave(1)
    second.leave(2)
    second.wait_for_others(60)
    assert time.monotonic() - began < 30
    first.end()
    assert [attempt.is_over for attempt in shared.attempts()] == [True, False]
    shared.write_outcome(Outcome("DataError", "no rows"))
    assert shared.read_outcome() == Outcome("DataError", "no rows")
    shared.clear()
    assert (shared.attempts(), shared.read_outcome()) == ([], None)
