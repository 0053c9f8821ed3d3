"""A run that is stopped or killed, and continued, ends as one that never was."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tuneline.artifacts import TrainingSummary
from tuneline.errors import StoppedError, StorageError, TrainingError
from tuneline.models.nf4 import load_base
from tuneline.runtime.step import main
from tuneline.train import TrainConfig
from tuneline.train.run import run

# Several epochs, dropout, and logs, evaluations and checkpoints that do not fall together.
SETTINGS = {
    "dtype": "float32",
    "learning_rate": 5e-3,
    "max_steps": 18,
    "eval_steps": 7,
    "logging_steps": 4,
    "global_batch_size": 2,
    "micro_batch_size": 1,
    "lora": {"lora_dropout": 0.1},
}


def train(where: Path, base_dir: Path, dataset: Path, **settings) -> TrainingSummary:
    return run(
        TrainConfig.parse({**SETTINGS, **settings}),
        base_model_dir=base_dir,
        dataset_dir=dataset,
        adapter_dir=where / "adapter",
        curves_path=where / "curves.html",
    )


@pytest.fixture(scope="module")
def start():
    """Start the same as `train` in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    # Imports take most of a minute on a busy machine; the processes share one.
    context.set_forkserver_preload(["tuneline.train.trainer.trainers", "bitsandbytes"])

    def begin(where: Path, base_dir: Path, dataset: Path, **settings):
        where.mkdir(exist_ok=True)
        config = where / "config.json"
        config.write_text(json.dumps({**SETTINGS, **settings}))
        arguments = [
            *("--config", str(config), "--base-model", str(base_dir), "--dataset", str(dataset)),
            *("--adapter", str(where / "adapter"), "--curves", str(where / "curves.html")),
        ]
        process = context.Process(target=main, args=("train", TrainConfig, run, arguments))
        process.start()
        return process

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", "1")
        yield begin


def wait_for(done, process) -> None:
    while not done():
        assert process.is_alive(), f"ended with {process.exitcode}"
        time.sleep(0.005)


def newest_step(where: Path) -> int:
    names = where.glob(".checkpoints/*/checkpoint-*")
    return max((int(path.name.removeprefix("checkpoint-")) for path in names), default=-1)


def assert_same(interrupted: Path, whole: Path) -> TrainingSummary:
    """The same adapter, bit for bit, and the same history."""
    weights = [path / "adapter" / "adapter_model.safetensors" for path in (interrupted, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    found, expected = (TrainingSummary.read(path / "adapter") for path in (interrupted, whole))
    assert found.history == expected.history
    assert (found.num_tokens, found.final_loss) == (expected.num_tokens, expected.final_loss)
    assert not (interrupted / ".checkpoints").exists()
    return found


@pytest.mark.slow
def test_kto_killed_then_finished(tmp_path, tiny_model_dir, dataset_dir, start):
    """A resumed run starts at the same row: the term z of KTO pairs each row with the last one."""
    rows = [
        {
            "prompt_ids": [100 + n, 101 + 2 * n],
            "completion_ids": [200 + n, 220],
            "label": n % 2 == 0,
        }
        for n in range(7)
    ]
    settings = {"global_batch_size": 4, "micro_batch_size": 2, "max_steps": 10, "eval_steps": 3}
    dataset = dataset_dir(rows, method="kto")
    train(tmp_path / "whole", tiny_model_dir, dataset, **settings)
    where = tmp_path / "interrupted"

    process = start(where, tiny_model_dir, dataset, checkpoint_minutes=0, **settings)
    wait_for(lambda: newest_step(where) >= 3, process)
    process.kill()
    process.join(60)
    assert not (where / "adapter").exists()

    train(where, tiny_model_dir, dataset, **settings)
    assert_same(where, tmp_path / "whole")


def test_killed_then_stopped_then_finished(
    tmp_path, tiny_model_dir, dataset_dir, answer_rows, start
):
    dataset = dataset_dir(answer_rows[:7], max_seq_length=32)
    train(tmp_path / "whole", tiny_model_dir, dataset)
    where = tmp_path / "interrupted"

    process = start(where, tiny_model_dir, dataset, checkpoint_minutes=0)
    wait_for(lambda: newest_step(where) >= 3, process)
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    killed_at = newest_step(where)

    process = start(where, tiny_model_dir, dataset, checkpoint_minutes=0)
    wait_for(lambda: newest_step(where) >= killed_at + 3, process)
    process.terminate()
    process.join(60)
    assert process.exitcode == 143
    assert not (where / "adapter").exists()
    assert killed_at + 3 <= newest_step(where) < 40

    train(where, tiny_model_dir, dataset)
    assert assert_same(where, tmp_path / "whole").num_resumptions == 2


@pytest.mark.parametrize(
    ("method", "optim"),
    [
        ("sft", "adamw_8bit"),
        pytest.param("dpo", "adamw_torch", marks=pytest.mark.slow),
    ],
)
def test_a_stop_in_an_evaluation_repeats_it(
    tmp_path, tiny_model_dir, dataset_dir, answer_rows, monkeypatch, optim, method
):
    if method == "dpo":
        answer_rows = [
            {"prompt_ids": ids[:2], "chosen_ids": ids[2:], "rejected_ids": ids[3:]}
            for ids in (row["input_ids"] for row in answer_rows[:4])
        ]
    dataset = dataset_dir(answer_rows[:7], method=method, max_seq_length=32)
    settings = {"optim": optim, "max_steps": 11, "eval_steps": 4, "logging_steps": 3}
    settings["global_batch_size"] = 1
    train(tmp_path / "whole", tiny_model_dir, dataset, **settings)

    where = tmp_path / "interrupted"
    # DPO is slower and differs in what it measures, not in how it is stopped.
    stops = ((0, 0), (1, 4), (2, 11)) if method == "sft" else ((1, 4),)
    for stop_at, step in stops:
        with monkeypatch.context() as patched, pytest.raises(StoppedError) as caught:
            _stop_in_evaluation(patched, stop_at)
            train(where, tiny_model_dir, dataset, **settings)
        assert f"after step {step} of 11" in str(caught.value)
        assert newest_step(where) == step
    train(where, tiny_model_dir, dataset, **settings)
    assert assert_same(where, tmp_path / "whole").num_resumptions == len(stops)


def _stop_in_evaluation(patched, number: int) -> None:
    """Send this process a SIGTERM in its evaluation of that number."""
    began = []

    def load(*args, **kwargs):
        model = load_base(*args, **kwargs)

        def forward(module, *_):
            if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                return  # Training has not begun: the model is asked whether it keeps packs apart.
            if not module.training and (not began or began[-1] != "evaluation"):
                began.append("evaluation")
                if began.count("evaluation") == number + 1:
                    os.kill(os.getpid(), signal.SIGTERM)
            elif module.training:
                began.append("training")

        model.register_forward_hook(forward)
        return model

    patched.setattr("tuneline.models.nf4.load_base", load)


def test_a_run_that_may_cost_no_more_continues_with_a_higher_limit(
    tmp_path, tiny_model_dir, dataset_dir, answer_rows
):
    dataset = dataset_dir(answer_rows[:7], max_seq_length=32)
    settings = {"max_steps": 4, "eval_steps": 2, "price_per_hour": 3.6e6}
    whole = train(tmp_path / "whole", tiny_model_dir, dataset, **settings)
    assert whole.cost > 2  # A millisecond costs one.

    where = tmp_path / "interrupted"
    says = r"has cost \S+ after step (\d) of 4, and train.max_cost is 1: .* higher train.max_cost"
    for step in (1, 2):
        with pytest.raises(TrainingError, match=says) as caught:
            train(where, tiny_model_dir, dataset, max_cost=1, **settings)
        assert f"after step {step} of 4" in str(caught.value)
        assert str(where / ".checkpoints") in str(caught.value)
        assert newest_step(where) == step
    finished = train(where, tiny_model_dir, dataset, max_cost=1e9, **settings)
    assert assert_same(where, tmp_path / "whole").num_resumptions == 2
    # What the attempts before it cost counts.
    assert finished.cost > 1


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(
    tmp_path, tiny_model_dir, dataset_dir, answer_rows, monkeypatch, caplog
):
    dataset = dataset_dir(answer_rows[:7], max_seq_length=32)
    settings = {"max_steps": 5, "eval_steps": 3, "checkpoint_minutes": 0}
    settings["global_batch_size"] = 1
    train(tmp_path / "whole", tiny_model_dir, dataset, **settings)

    where = tmp_path / "interrupted"
    with monkeypatch.context() as patched, pytest.raises(StoppedError):
        _stop_in_evaluation(patched, 1)
        train(where, tiny_model_dir, dataset, **settings)
    caplog.set_level("INFO")
    newest = next(where.glob(".checkpoints/*/checkpoint-3"))
    content = (newest / "optimizer.pt").read_bytes()
    (newest / "optimizer.pt").write_bytes(content[:-1])
    train(where, tiny_model_dir, dataset, **settings)
    assert f"deleting damaged checkpoint {newest}: optimizer.pt does not match" in caplog.text
    assert "checkpoint-2" in caplog.text
    assert_same(where, tmp_path / "whole")


def test_the_environment_names_the_root(
    tmp_path, tiny_model_dir, dataset_dir, answer_rows, monkeypatch, caplog
):
    monkeypatch.setenv("TUNELINE_CHECKPOINT_DIR", str(tmp_path / "volume"))
    dataset = dataset_dir(answer_rows[:7], max_seq_length=32)
    with monkeypatch.context() as patched, pytest.raises(StoppedError, match="volume"):
        _stop_in_evaluation(patched, 1)
        train(tmp_path / "one", tiny_model_dir, dataset, max_steps=3, eval_steps=2)
    caplog.set_level("INFO")
    changed = {"max_steps": 3, "eval_steps": 2, "weight_decay": 0.5}
    assert train(tmp_path / "two", tiny_model_dir, dataset, **changed).num_resumptions == 0
    assert "differs in train.weight_decay (was 0.01, is 0.5)" in caplog.text
    # Another output directory, as a retry on a cluster has: the run is the same one.
    same = train(tmp_path / "three", tiny_model_dir, dataset, max_steps=3, eval_steps=2)
    assert same.num_resumptions == 1 and not (tmp_path / "volume").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MiB, where the run in `interrupted` keeps its checkpoints."""
    path = tmp_path / "interrupted" / ".checkpoints"
    path.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.slow
def test_a_full_disk_costs_no_checkpoint(
    tmp_path, tiny_model_dir, dataset_dir, answer_rows, start, small_disk
):
    dataset = dataset_dir(answer_rows[:7], max_seq_length=32)
    settings = {"max_steps": 60, "eval_steps": 25}
    train(tmp_path / "whole", tiny_model_dir, dataset, **settings)
    where = tmp_path / "interrupted"
    process = start(where, tiny_model_dir, dataset, **settings, checkpoint_minutes=0)
    wait_for(lambda: len(list(small_disk.glob("*/checkpoint-*"))) == 2, process)
    with open(small_disk / "filler", "wb") as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(1 << 16))
            filler.flush()
    process.join(60)
    # The world's fault, as `step` counts them.
    assert process.exitcode == StorageError.exit_code == 1
    assert list(small_disk.glob("*/checkpoint-*")) and not (where / "adapter").exists()
    (small_disk / "filler").unlink()
    assert train(where, tiny_model_dir, dataset, **settings).num_resumptions == 1
    weights = [
        path / "adapter" / "adapter_model.safetensors" for path in (where, tmp_path / "whole")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
def test_twenty_kills_at_random_moments(tmp_path, tiny_model_dir, dataset_dir, answer_rows, start):
    dataset = dataset_dir(answer_rows[:7], max_seq_length=32)
    settings = {"max_steps": 800, "eval_steps": 90}
    train(tmp_path / "whole", tiny_model_dir, dataset, **settings)
    where = tmp_path / "interrupted"
    generator = random.Random(20)
    steps = []
    # How long a process takes to its first checkpoint depends on what else the machine does; the
    # very first one also waits for the imports that all share.
    seconds = 0.0
    for number in range(20):
        began = time.monotonic()
        # From the start of the process on: loading, steps, evaluations and writes are all hit.
        process = start(where, tiny_model_dir, dataset, **settings, checkpoint_minutes=0)
        if number < 2:
            before = newest_step(where)
            wait_for(lambda before=before: newest_step(where) > max(before, 0), process)
            seconds = time.monotonic() - began
        else:
            time.sleep(generator.uniform(0, 1.5 * seconds))
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        steps.append(newest_step(where))
    print("newest checkpoints at the kills:", steps)
    assert steps == sorted(steps) and steps[0] < steps[-1] < 800
    summary = train(where, tiny_model_dir, dataset, **settings, checkpoint_minutes=60)
    print("resumptions:", summary.num_resumptions)
    assert_same(where, tmp_path / "whole")


@pytest.mark.slow
def test_ranks_and_their_step_are_killed_at_random_moments(
    tmp_path, tiny_model_dir, dataset_dir, answer_rows, start
):
    dataset = dataset_dir(answer_rows[:7], max_seq_length=32)
    settings = {"max_steps": 40, "eval_steps": 15, "num_ranks": 2, "max_restarts": 0}
    train(tmp_path / "whole", tiny_model_dir, dataset, **settings)
    where = tmp_path / "interrupted"
    generator = random.Random(6)
    steps = []
    for victim in ("step", "rank-0", "rank-1", "step", "rank-1", "rank-0"):
        before = newest_step(where)
        process = start(where, tiny_model_dir, dataset, **settings, checkpoint_minutes=0)
        wait_for(lambda before=before: newest_step(where) > before, process)
        time.sleep(generator.uniform(0, 1))
        if victim == "step":
            process.kill()
        else:
            # Those of a step that was killed are still there.
            newest = max(where.rglob(f"{victim}.pid"), key=lambda path: path.stat().st_mtime)
            os.kill(int(newest.read_text()), signal.SIGKILL)
        process.join(60)
        # The sentence that a rank is gone is a fault of the world's.
        assert process.exitcode == (-signal.SIGKILL if victim == "step" else 1)
        # Ranks see within a second that their step is gone; until then they go on.
        for path in where.rglob("rank-?.pid"):
            while Path("/proc", path.read_text()).exists():
                time.sleep(0.05)
        steps.append(newest_step(where))
    print("newest checkpoints at the kills:", steps)
    assert steps == sorted(steps) and steps[-1] < 40
    summary = train(where, tiny_model_dir, dataset, **settings, checkpoint_minutes=60)
    assert summary.num_ranks == 2 and summary.num_resumptions > 0
    weights = [
        path / "adapter" / "adapter_model.safetensors" for path in (where, tmp_path / "whole")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    # A checkpoint has the mean of the ranks' losses so far, whose sum rounds otherwise.
    expected = TrainingSummary.read(tmp_path / "whole" / "adapter").history
    for found, whole in zip(summary.history, expected, strict=True):
        assert found.step == whole.step
        assert found.loss == pytest.approx(whole.loss, abs=1e-5)
        assert found.eval_loss == whole.eval_loss
