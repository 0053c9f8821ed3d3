"""A rank that dies or meets a fault of its GPU is replaced, but never for a fault that stays.

The ranks run on a CPU; tests/measure/gpu/restart_on_gpu.py causes real faults of CUDA.
"""

import logging
import signal
from pathlib import Path

import pytest
import rank_cases
from transformers import TrainerControl, TrainerState

from tuneline.artifacts import TrainingSummary
from tuneline.errors import TrainingError
from tuneline.train import TrainConfig, within_memory
from tuneline.train.checkpoints import CheckpointStore
from tuneline.train.ranks.faults import RankFault, is_transient
from tuneline.train.ranks.launch import run_on_ranks
from tuneline.train.restarts import Restarts, StepCallback
from tuneline.train.run import run

SETTINGS = {
    "dtype": "float32",
    "learning_rate": 5e-3,
    "max_steps": 6,
    "eval_steps": 4,
    "global_batch_size": 4,
    "micro_batch_size": 2,
    "num_ranks": 2,
    "lora": {"lora_dropout": 0.1},
}


@pytest.fixture(autouse=True)
def cases_are_importable(monkeypatch):
    """The ranks import rank_cases too."""
    monkeypatch.setenv("PYTHONPATH", str(Path(rank_cases.__file__).parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def train(tmp_path, tiny_model_dir, dataset_dir, answer_rows, monkeypatch):
    """Train on two ranks, of which the last fails in a step of the first `times` attempts."""
    data = dataset_dir(answer_rows, max_seq_length=32)

    def start(name, *, kind="SIGKILL", step=4, times=0, **settings) -> TrainingSummary:
        where = tmp_path / name
        (where / "faults").mkdir(parents=True)
        monkeypatch.setenv("RANK_FAULT", f"{kind},{step},{times},{where / 'faults'}")
        monkeypatch.setattr(within_memory, "train", rank_cases.train_with_faults)
        return run(
            TrainConfig.parse({**SETTINGS, **settings}),
            base_model_dir=tiny_model_dir,
            dataset_dir=data,
            adapter_dir=where / "adapter",
            curves_path=where / "curves.html",
        )

    return start


@pytest.mark.slow
def test_a_killed_rank_is_replaced_and_nothing_else_changes(tmp_path, train, caplog):
    whole = train("whole")
    with caplog.at_level(logging.WARNING):
        found = train("killed", times=1, checkpoint_minutes=0)
    paths = [tmp_path / name / "adapter" for name in ("whole", "killed")]
    weights = [(path / "adapter_model.safetensors").read_bytes() for path in paths]
    assert weights[0] == weights[1]
    assert found.history == whole.history
    assert (whole.num_restarts, whole.num_resumptions) == (0, 0)
    assert (found.num_restarts, found.num_resumptions) == (1, 1)
    assert (
        "this happened at step 4: restart 1 of at most 3, from the checkpoint of step 3"
        in caplog.text
    )
    assert "Restarted after a fault" in (tmp_path / "killed" / "curves.html").read_text()


@pytest.mark.slow
def test_a_rank_that_dies_in_the_same_step_again_ends_the_run(tmp_path, train):
    with pytest.raises(TrainingError, match="rank 1 of 2 was killed.* at step 4, and a restart"):
        train("again", times=9, checkpoint_minutes=10)
    assert len(list((tmp_path / "again" / "faults").iterdir())) == 2


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("CUDA error: uncorrectable ECC error encountered", RankFault),
        ("CUDA error: device-side assert triggered", TrainingError),
        ("SIGSEGV", RankFault),
        ("SIGKILL", RankFault),
    ],
)
def test_a_single_rank_is_a_process_of_its_own(tmp_path, monkeypatch, kind, error):
    monkeypatch.setenv("RANK_FAULT", kind)
    with pytest.raises(TrainingError) as caught:
        run_on_ranks(
            1,
            rank_cases.fail_at_once,
            {},
            directory=tmp_path / "ranks",
            device="cpu",
            grouped=False,
        )
    assert type(caught.value) is error
    assert str(caught.value).startswith("rank 0 of 1 ")
    expected = "was killed or crashed" if hasattr(signal, kind) else f"RuntimeError: {kind}"
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        # The messages of cudaGetErrorString, as torch quotes them.
        ("AcceleratorError: CUDA error: an illegal memory access was encountered", True),
        ("AcceleratorError: CUDA error: unspecified launch failure", True),
        ("RuntimeError: CUDA error: uncorrectable ECC error encountered", True),
        ("RuntimeError: CUDA error: unknown error", True),
        ("RuntimeError: CUDA error: all CUDA-capable devices are busy or unavailable", True),
        ("RuntimeError: CUDA driver error: unknown error", True),
        ("RuntimeError: No CUDA GPUs are available", False),
        ("AcceleratorError: CUDA error: device-side assert triggered", False),
        ("RuntimeError: CUDA error: invalid argument", False),
        ("RuntimeError: CUDA error: no kernel image is available for execution", False),
        ("RuntimeError: CUDA error: too many resources requested for launch", False),
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", False),
        ("RuntimeError: CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling", True),
        ("RuntimeError: CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling", False),
        ("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling", False),
        # torch/csrc/distributed/c10d/NCCLUtils.cpp: what torch says of ncclResult_t.
        (
            "DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3356, remote process exited or "
            "there was a network error, NCCL version 2.27.5",
            True,
        ),
        (
            "DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:94, unhandled cuda error (run "
            "with NCCL_DEBUG=INFO for details), NCCL version 2.27.5",
            True,
        ),
        ("DistBackendError: NCCL error in: NCCLUtils.cpp:94, invalid usage (run with", False),
        ("DistBackendError: NCCL error in: NCCLUtils.cpp:94, invalid argument (run with", False),
        ("DistBackendError: [Rank 0] Watchdog caught collective operation timeout: Work", True),
        ("RuntimeError: [gloo/transport/tcp/pair.cc:544] Connection closed by peer [::1]", True),
        ("DistNetworkError: The client socket has timed out after 600000ms", True),
        ("Exception: the pod of node 1 restarted while its ranks were running", True),
        ("ValueError: unknown error in row 3", False),
        ("IndexError: index 9 is out of range", False),
        ("OSError: [Errno 28] No space left on device", False),
    ],
)
def test_faults_that_new_processes_survive(message: str, expected: bool):
    assert is_transient(message) == expected


def test_a_restart_needs_progress_since_the_last(tmp_path):
    store = CheckpointStore(tmp_path)
    fault = RankFault("rank 1 of 2 was killed")

    def reach(step: int, checkpoint: int) -> None:
        StepCallback(store).on_step_begin(
            None, TrainerState(global_step=step - 1), TrainerControl()
        )
        store.path(checkpoint).mkdir(exist_ok=True)

    reach(900, 0)  # of another pod
    restarts = Restarts(store, 3)
    reach(57, 50)
    restarts.count(fault)
    reach(58, 50)  # further
    restarts.count(fault)
    reach(56, 55)  # not further, but from a newer checkpoint
    restarts.count(fault)
    assert restarts.num_restarts == 3
    reach(70, 65)
    with pytest.raises(TrainingError, match=r"at step 70, after 3 restarts \(train.max_restarts"):
        restarts.count(fault)

    restarts = Restarts(store, 3)
    restarts.count(fault)  # while the model was loaded
    with pytest.raises(TrainingError, match="this happened before the first step, and a restart"):
        restarts.count(fault)
    with pytest.raises(TrainingError, match="killed; this happened before the first step, after 0"):
        Restarts(store, 0).count(fault)
