"""Utilisation and energy of the GPUs of this node, read from NVML in a thread.

The energy is the power integrated over time. NVML also has an energy counter, but a reading of it
takes 3.5 ms per GPU (H100), in which the rank's kernel launches can wait for the driver; a reading
of power or utilisation takes 0.05 ms.
"""

import logging
import threading
import time
from typing import Any

import torch

from tuneline.train.ranks import collectives

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_READINGS = 1.0
"""Since Ampere, NVML's power is the mean over the last second, so that power x time is the energy
exactly if it is read once per second."""


class GpuMeter:
    """Measures utilisation and energy between `start` and `close`; without NVML, both are None.

    Only the meter of rank 0 reads, for the GPUs of all ranks of its node. NVML knows no other node,
    so a run on several nodes reports the utilisation of the first node's GPUs, and no energy.
    """

    def __init__(self, device: str) -> None:
        self._nvml: Any = None
        self._handles: list[Any] = []
        self._sees_all = True
        self._thread: threading.Thread | None = None
        self._ends = threading.Event()
        self._lock = threading.Lock()
        self._read_at = 0.0
        self._joules: float | None = None
        self._uses: list[float] = []
        if device == "cpu" or not collectives.is_first():
            return
        try:
            import pynvml
        except ImportError:
            logger.warning(
                "GPU utilisation and energy are not measured: the package nvidia-ml-py is not "
                "installed"
            )
            return
        count = collectives.num_ranks_here()
        self._sees_all = count == collectives.num_ranks()
        devices = [device] if count == 1 else [f"{device}:{index}" for index in range(count)]
        uuids = [f"GPU-{torch.cuda.get_device_properties(name).uuid}" for name in devices]
        try:
            pynvml.nvmlInit()
            # By UUID: CUDA_VISIBLE_DEVICES and MIG number the GPUs differently from NVML.
            self._handles = [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
        except pynvml.NVMLError as error:
            logger.warning("GPU utilisation and energy are not measured: NVML reports %s", error)
            return
        self._nvml = pynvml

    def start(self) -> None:
        """Read from now on, in a thread; without effect if the meter reads already."""
        if self._nvml is None or self._thread is not None:
            return
        self._read_at = time.monotonic()
        self._read()
        self._ends.clear()
        self._thread = threading.Thread(target=self._keep_reading, name="gpu-meter", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Read once more, and end the thread."""
        if self._thread is None:
            return
        self._ends.set()
        self._thread.join()
        self._thread = None
        self._read()

    def use(self) -> float | None:
        """Return the fraction of time in which a kernel ran (0 to 1), averaged over GPUs.

        The time is that since the last call, or since the last reading if it was before that call.
        """
        with self._lock:
            if not self._uses:
                return None
            mean = sum(self._uses) / len(self._uses)
            del self._uses[:-1]
            return mean

    def energy_joules(self) -> float | None:
        """Return the energy that the GPUs have used while this meter was reading, in joules."""
        return self._joules

    def _keep_reading(self) -> None:
        while not self._ends.wait(_SECONDS_BETWEEN_READINGS):
            self._read()

    def _read(self) -> None:
        now = time.monotonic()
        milliwatts = self._of_each("nvmlDeviceGetPowerUsage") if self._sees_all else None
        rates = self._of_each("nvmlDeviceGetUtilizationRates")
        with self._lock:
            if milliwatts is not None:
                used = sum(milliwatts) / 1000 * (now - self._read_at)
                self._joules = (self._joules or 0.0) + used
            self._read_at = now
            if rates is not None:
                self._uses.append(sum(rate.gpu for rate in rates) / len(rates) / 100)

    def _of_each(self, counter: str) -> list[Any] | None:
        try:
            return [getattr(self._nvml, counter)(handle) for handle in self._handles]
        except self._nvml.NVMLError:
            # Older and virtual GPUs lack some of the counters.
            return None
