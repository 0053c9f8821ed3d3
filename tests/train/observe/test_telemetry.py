"""progress.jsonl, energy, cost, and the trackers that a run reports to."""

import contextlib
import json
import statistics
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from tuneline.artifacts import TrainingPoint
from tuneline.errors import RecipeError
from tuneline.train import TrainConfig
from tuneline.train.observe import gpu_meter
from tuneline.train.observe import progress as progress_module
from tuneline.train.observe.gpu_meter import GpuMeter
from tuneline.train.observe.progress import ProgressCallback
from tuneline.train.observe.telemetry import TelemetryCallback, costs
from tuneline.train.run import run
from tuneline.train.trainer import trackers as tracking_module
from tuneline.train.trainer.state import RunState
from tuneline.train.trainer.trackers import trackers


def test_a_line_a_logged_step_and_the_cost(tmp_path, tiny_model_dir, dataset_dir, answer_rows):
    summary = run(
        TrainConfig.parse({"max_steps": 4, "eval_steps": 2, "price_per_hour": 3.5}),
        base_model_dir=tiny_model_dir,
        dataset_dir=dataset_dir(answer_rows),
        adapter_dir=tmp_path / "adapter",
        curves_path=tmp_path / "curves.html",
    )
    text = (tmp_path / "adapter" / "progress.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 4, 4]
    last = {line["step"]: line for line in lines}
    for point in summary.history:
        for name, value in point.model_dump().items():
            assert last[point.step][name] == value, (point.step, name)
    assert lines[-1]["num_tokens"] == summary.num_tokens
    measured = [line for line in lines if line["tokens_per_second"]]
    assert [line["step"] for line in measured] == [1, 2, 3, 4]
    rates = [line["tokens_per_second"] for line in measured]
    assert summary.tokens_per_second == pytest.approx(statistics.median(rates), abs=0.06)
    seconds = [line["device_seconds"] for line in lines]
    assert seconds == sorted(seconds) and all(line["peak_memory_bytes"] > 2**27 for line in lines)
    assert 0 < seconds[-1] / 3600 <= summary.device_hours + 1e-6 < summary.seconds / 3600
    assert summary.cost == pytest.approx(3.5 * summary.device_hours)
    assert summary.energy_kwh is None and lines[-1]["gpu_use"] is None
    assert "Cost" in (tmp_path / "curves.html").read_text()


class NVMLError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch):
    """One GPU of 500 W, as NVML shows it, that is read once per 10 ms."""
    readings = {"watts": 500.0, "num": 0, "threads": set(), "lost": False}

    def power(handle):
        if readings["lost"]:
            raise NVMLError("Not Supported")
        readings["num"] += 1
        readings["threads"].add(threading.current_thread().name)
        return int(1000 * readings["watts"])

    def handle(uuid):
        if uuid != "GPU-1234":
            raise NVMLError("Not Found")
        return uuid

    module = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=87),
        nvmlDeviceGetPowerUsage=power,
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234")
    )
    monkeypatch.setattr(gpu_meter, "_SECONDS_BETWEEN_READINGS", 0.01)
    return readings


def test_energy_is_added_up_over_an_interruption(tmp_path, nvml):
    run_state = RunState(energy_joules=2000.0, device_seconds=1800.0)
    callback = TelemetryCallback(run_state, tmp_path / "progress.jsonl", "cuda")
    now = SimpleNamespace(global_step=0)
    before = time.monotonic()
    callback.on_train_begin(None, now, None)
    began = time.monotonic()
    while nvml["num"] < 5:
        time.sleep(0.001)
        callback.on_step_end(None, now, None)
    # A checkpoint has the energy up to the last reading.
    assert 2000 < run_state.energy_joules <= 2000 + 500 * (time.monotonic() - before)
    ended = time.monotonic()
    callback.on_train_end(None, now, None)
    least, most = ended - began, time.monotonic() - before
    assert 2000 + 500 * least <= run_state.energy_joules <= 2000 + 500 * most
    found = costs(run_state, 4.0)
    assert found["energy_kwh"] == pytest.approx(run_state.energy_joules / 3.6e6)
    assert found["device_hours"] == pytest.approx(0.5, abs=0.01)
    assert found["cost"] == pytest.approx(2.0, abs=0.04)


def test_counters_are_read_in_a_thread_and_on_the_first_rank_only(tmp_path, nvml, monkeypatch):
    run_state = RunState(points={1: TrainingPoint(step=1, loss=1.5)})
    callback = TelemetryCallback(run_state, tmp_path / "progress.jsonl", "cuda")
    now = SimpleNamespace(global_step=1)
    callback.on_train_begin(None, now, None)
    while nvml["num"] < 3:
        time.sleep(0.001)
    nvml["threads"].clear()
    num = nvml["num"]
    while nvml["num"] < num + 3:
        callback.on_step_end(None, now, None)
        callback.on_log(None, now, None, logs={"loss": 1.5})
    assert nvml["threads"] == {"gpu-meter"}
    line = json.loads((tmp_path / "progress.jsonl").read_text().splitlines()[-1])
    assert line["gpu_use"] == 0.87 and line["energy_kwh"] > 0
    # Training failed: the thread ends, and a second end does nothing.
    callback.close()
    callback.close()
    assert "gpu-meter" not in {thread.name for thread in threading.enumerate()}
    num = nvml["num"]

    monkeypatch.setattr("tuneline.train.ranks.collectives.is_first", lambda: False)
    other = TelemetryCallback(RunState(), tmp_path / "progress.jsonl", "cuda")
    other.on_train_begin(None, now, None)
    other.on_train_end(None, now, None)
    assert nvml["num"] == num


def test_a_gpu_without_counters_has_none(nvml, monkeypatch, caplog):
    nvml["lost"] = True
    meter = GpuMeter("cuda")
    assert meter.use() is None
    meter.start()
    meter.close()
    assert meter.energy_joules() is None and meter.use() == 0.87
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="99")
    )
    GpuMeter("cuda").start()
    assert "NVML reports Not Found" in caplog.text
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert GpuMeter("cuda").energy_joules() is None
    assert "nvidia-ml-py is not installed" in caplog.text


def test_several_nodes_are_read_on_the_first_one_only(nvml, monkeypatch):
    asked = []

    def properties(name):
        asked.append(name)
        return SimpleNamespace(uuid="1234")

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr("tuneline.train.ranks.collectives.num_ranks", lambda: 4)
    energies = []
    for local in ("2", "4"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        with contextlib.closing(GpuMeter("cuda")) as meter:
            meter.start()
            assert meter.use() == 0.87
        energies.append(meter.energy_joules())
    assert asked[:2] == ["cuda:0", "cuda:1"]
    assert energies[0] is None and energies[1] > 0


def test_the_speed_is_that_of_steps_without_compilation(monkeypatch):
    seconds = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: seconds[0])
    run_state = RunState(num_tokens=7)
    callback = ProgressCallback(run_state, shows=False)
    callback.on_train_begin(None, None, None)
    for duration in (60.0, 10.0, 0.5, 0.5, 0.4):
        run_state.num_tokens += 1000
        callback.on_step_begin(None, None, None)
        seconds[0] += duration
        callback.on_step_end(None, None, None)
    assert run_state.step_rates == pytest.approx([1000 / 60, 100, 2000, 2000, 2500])
    assert run_state.step_seconds == pytest.approx(71.4)


def test_steps_that_are_taken_again_have_one_line(tmp_path):
    path = tmp_path / "progress.jsonl"
    path.write_text("".join(f'{{"step": {n}, "loss": {n}}}\n' for n in range(6)) + '{"step": 2, "l')
    run_state = RunState(points={3: TrainingPoint(step=3, loss=1.5)})
    callback = TelemetryCallback(run_state, path, "cpu")
    callback.on_train_begin(None, SimpleNamespace(global_step=2), None)
    callback.on_log(None, SimpleNamespace(global_step=3), None, logs={"loss": 1.5})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and lines[-1]["loss"] == 1.5


def test_trackers_are_off_until_named(monkeypatch, caplog):
    for name in ("MLFLOW_RUN_ID", "TENSORBOARD_LOGGING_DIR"):
        monkeypatch.delenv(name, raising=False)
    installed = {"tensorboardX"}
    monkeypatch.setattr(
        tracking_module.importlib.util, "find_spec", lambda name: name in installed or None
    )
    assert trackers(TrainConfig()) == []
    with pytest.raises(RecipeError, match="names wandb, but the package wandb is not installed"):
        trackers(TrainConfig(track=("wandb",)))
    with pytest.raises(RecipeError, match="TENSORBOARD_LOGGING_DIR"):
        trackers(TrainConfig(track=("tensorboard",)))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "/logs")
    assert trackers(TrainConfig(track=("tensorboard",))) == ["tensorboard"]
    monkeypatch.setenv("MLFLOW_RUN_ID", "7")
    assert trackers(TrainConfig()) == []
    assert "MLFLOW_RUN_ID is set but nothing is reported" in caplog.text
    installed.add("mlflow")
    assert trackers(TrainConfig()) == ["mlflow"]
