"""Resource use of a run: progress.jsonl while it trains, and its hours, energy and cost at the end.

progress.jsonl has one JSON object per logged loss; a value that was not measured is null. The file
is in the directory of the checkpoints while the run trains, and is copied to the adapter's
directory at the end.

GPU utilisation and energy come from NVML (gpu_meter.py), and are null if the package nvidia-ml-py
is not installed. The sums of time and energy are part of each checkpoint. If a run is killed, the
time and energy since its last checkpoint are not counted.
"""

import json
import time
from pathlib import Path
from typing import Any, TypedDict

from transformers import TrainerCallback

from tuneline.artifacts import PROGRESS_FILE
from tuneline.train.model.precision import peak_memory_bytes
from tuneline.train.observe.gpu_meter import GpuMeter
from tuneline.train.ranks import collectives
from tuneline.train.trainer.state import RunState

_JOULES_PER_KWH = 3.6e6


class TelemetryCallback(TrainerCallback):
    """Writes one line per logged loss to progress.jsonl, and adds up time and energy.

    Add this callback after ProgressCallback, which records the points and step times that are read
    here.
    """

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
        """Start the clocks, and delete the progress.jsonl lines of steps that will run again.

        These are the steps after the checkpoint from which the run resumes.
        """
        self._meter.start()
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
        """Add up time and energy, so that a checkpoint of this step includes those of the step."""
        self._add_up()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write a line if the training loss or the evaluation loss was logged."""
        logs = kwargs["logs"]
        point = self._run_state.points.get(state.global_step)
        if point is None or not ("loss" in logs or "eval_loss" in logs):
            return
        self._add_up()
        if not collectives.is_first():
            return
        # A step with both losses has two lines, and the second one repeats the first one's values.
        line = {**point.model_dump(), "time": time.time(), **self._measured()}
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add up the time and energy since the last step."""
        self.close()
        self._add_up()

    def close(self) -> None:
        """End the thread of the meter; call this also if training failed."""
        self._meter.close()

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
        """Add the time and the energy since the last call."""
        now, run_state = time.monotonic(), self._run_state
        run_state.device_seconds += (now - self._time) * collectives.num_ranks()
        joules = self._meter.energy_joules()
        if joules is not None and self._joules is not None:
            run_state.energy_joules = (run_state.energy_joules or 0.0) + joules - self._joules
        self._time, self._joules = now, joules


class Costs(TypedDict):
    """The fields of TrainingSummary for device hours, energy and cost."""

    device_hours: float
    energy_kwh: float | None
    cost: float | None


def costs(run_state: RunState, price_per_hour: float | None) -> Costs:
    """Return the fields of TrainingSummary for device hours, energy and cost.

    Args:
        run_state: State of the run, with its sums of time and energy.
        price_per_hour: Price of one device for an hour; None leaves the cost null.
    """
    hours = run_state.device_seconds / 3600
    joules = run_state.energy_joules
    return {
        "device_hours": hours,
        "energy_kwh": None if joules is None else joules / _JOULES_PER_KWH,
        "cost": None if price_per_hour is None else hours * price_per_hour,
    }


def keep_progress_file(path: Path, directory: Path) -> None:
    """Copy progress.jsonl to the adapter's directory."""
    (directory / PROGRESS_FILE).write_bytes(path.read_bytes())


def _step_of(line: str) -> float:
    """Return the step of a line; infinity if the line is incomplete because the run was killed."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return float("inf")
