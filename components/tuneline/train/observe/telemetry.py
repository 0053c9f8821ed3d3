"""What a run costs while it goes: progress.jsonl, and at the end hours, energy and money.

progress.jsonl has one JSON object a logged step; a value that was not measured then is null. It
lies beside the checkpoints while the run goes and with the adapter when it is done. Energy and use
of a GPU come from NVML (the package nvidia-ml-py) and are null where it is not installed. What a
run did after its last checkpoint before it was killed is not in the sums.
"""

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tuneline.artifacts import PROGRESS_FILE
from tuneline.train.model.precision import peak_memory_bytes
from tuneline.train.ranks import collectives
from tuneline.train.trainer.state import RunState

logger = logging.getLogger(__name__)

_JOULES_PER_KWH = 3.6e6


class GpuMeter:
    """NVML's view of the GPUs that the run computes on; without one, all values are None.

    The ranks of a node see each other's GPUs, so that the first one can add up for all.
    """

    def __init__(self, device: str) -> None:
        self._nvml: Any = None
        self._handles: list[Any] = []
        if device == "cpu":
            return
        try:
            import pynvml
        except ImportError:
            logger.warning("no GPU use and energy: the package nvidia-ml-py is not installed")
            return
        count = collectives.num_ranks()
        devices = [device] if count == 1 else [f"{device}:{index}" for index in range(count)]
        uuids = [f"GPU-{torch.cuda.get_device_properties(one).uuid}" for one in devices]
        try:
            pynvml.nvmlInit()
            # By its name: CUDA_VISIBLE_DEVICES and MIG give other numbers than NVML's.
            self._handles = [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
        except pynvml.NVMLError as error:
            logger.warning("no GPU use and energy: NVML says %s", error)
            return
        self._nvml = pynvml

    def use(self) -> float | None:
        """Return the share of the last moments in which a kernel ran, 0 to 1: the GPUs' mean."""
        found = self._read("nvmlDeviceGetUtilizationRates")
        return None if found is None else sum(rates.gpu for rates in found) / len(found) / 100

    def energy_joules(self) -> float | None:
        """Return what the GPUs took since their driver was loaded."""
        found = self._read("nvmlDeviceGetTotalEnergyConsumption")
        return None if found is None else sum(found) / 1000

    def _read(self, name: str) -> list[Any] | None:
        if self._nvml is None:
            return None
        try:
            return [getattr(self._nvml, name)(handle) for handle in self._handles]
        except self._nvml.NVMLError:
            # Older and virtual GPUs lack single counters.
            return None


class TelemetryCallback(TrainerCallback):
    """Writes a line a logged step, and adds up time and energy. Comes after ProgressCallback."""

    def __init__(self, run_state: RunState, path: Path, device: str) -> None:
        self._run_state = run_state
        self._path = path
        self._device = device
        self._meter = GpuMeter(device)
        self._time = 0.0
        self._joules: float | None = None
        self._tokens = 0
        self._step_seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clocks, and drop lines of steps that will be taken again."""
        self._time = time.monotonic()
        self._joules = self._meter.energy_joules()
        self._tokens = self._run_state.num_tokens
        self._step_seconds = self._run_state.step_seconds
        if not collectives.is_first():
            return
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        kept = [line for line in lines if _step_of(line) <= state.global_step]
        self._path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add up, so that a checkpoint of this step has it."""
        self._add_up()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write a line, if something of the step was measured."""
        logs = kwargs["logs"]
        point = self._run_state.points.get(state.global_step)
        if point is None or not ("loss" in logs or "eval_loss" in logs):
            return
        self._add_up()
        if not collectives.is_first():
            return
        # A step that is logged and evaluated has two lines, each with what is known by then.
        line = {**point.model_dump(), "time": time.time(), **self._measured()}
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add up what came after the last log."""
        self._add_up()

    def _measured(self) -> dict[str, Any]:
        run_state = self._run_state
        tokens = run_state.num_tokens - self._tokens
        seconds = run_state.step_seconds - self._step_seconds
        self._tokens, self._step_seconds = run_state.num_tokens, run_state.step_seconds
        joules = run_state.energy_joules
        return {
            "num_tokens": run_state.num_tokens,
            "tokens_per_second": round(tokens / seconds, 1) if tokens and seconds else None,
            "peak_memory_bytes": peak_memory_bytes(self._device),
            "gpu_use": self._meter.use(),
            "device_seconds": round(run_state.device_seconds, 3),
            "energy_kwh": None if joules is None else joules / _JOULES_PER_KWH,
        }

    def _add_up(self) -> None:
        now, joules = time.monotonic(), self._meter.energy_joules()
        run_state = self._run_state
        run_state.device_seconds += (now - self._time) * collectives.num_ranks()
        if joules is not None and self._joules is not None:
            run_state.energy_joules = (run_state.energy_joules or 0.0) + joules - self._joules
        self._time, self._joules = now, joules


def costs(run_state: RunState, price_per_hour: float | None) -> dict[str, float | None]:
    """Return hours of the device, its energy and what it cost, as TrainingSummary names them."""
    hours = run_state.device_seconds / 3600
    joules = run_state.energy_joules
    return {
        "device_hours": hours,
        "energy_kwh": None if joules is None else joules / _JOULES_PER_KWH,
        "cost": None if price_per_hour is None else hours * price_per_hour,
    }


def keep_progress_file(path: Path, directory: Path) -> None:
    """Put progress.jsonl into the adapter's directory."""
    (directory / PROGRESS_FILE).write_bytes(path.read_bytes())


def _step_of(line: str) -> float:
    """Return a line's step; one that a kill cut short counts as never reached."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")
