"""GPU profiles: the hardware facts of each kind of GPU, and the node that usually has it.

This is the only table of GPUs. `placement.profile` names an entry of this table. Placement reads
the node's values from it, and `tuneline plan` reads the memory, the speed and what the GPU
supports. A new profile needs one entry here and nothing else.

Compute and bandwidth are from NVIDIA's datasheets, without sparsity, for the SXM variant where
there are several. Memory is what `torch.cuda.get_device_properties` reports, below the nominal size
because of ECC and the driver.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tuneline.kernels.limits import FP8_CAPABILITY, MIN_CAPABILITY

BFLOAT16_CAPABILITY = (8, 0)
"""Lowest compute capability that multiplies bfloat16 (Ampere)."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """The smallest common machine with the GPU, and what a pod with one GPU asks of it.

    Requests are below the machine's size, because the node's own daemons need room. A recipe that
    uses more GPUs per pod sets more in `placement.accelerated`.
    """

    machine: str
    """Cloud machine types. Where only machines with eight GPUs are common, an eighth of one."""
    vcpus: int
    """vCPUs per GPU."""
    memory_gib: int
    """Memory per GPU, in GiB."""
    cpu: tuple[str, str]
    """CPU request and limit."""
    memory: tuple[str, str]
    """Memory request and limit."""
    shared_memory: str
    """Size of /dev/shm, which counts towards the memory."""


@dataclass(frozen=True, kw_only=True)
class GpuProfile:
    """One kind of GPU."""

    products: tuple[str, ...]
    """Values of the node label nvidia.com/gpu.product: the name in nvidia-smi, with dashes."""
    capability: tuple[int, int]
    """CUDA compute capability."""
    gpu_memory_gib: float
    """Memory of the GPU that a process can use, in GiB."""
    tflops: float
    """Dense TFLOP/s in the type that `train.dtype: auto` chooses: bfloat16, or else float32."""
    bandwidth: float
    """Memory bandwidth in GB/s."""
    node: Node

    @property
    def memory_bytes(self) -> float:
        """Memory of the GPU that a process can use."""
        return self.gpu_memory_gib * 2**30

    @property
    def has_bfloat16(self) -> bool:
        """Whether the GPU multiplies bfloat16; `train.dtype: auto` chooses float32 elsewhere."""
        return self.capability >= BFLOAT16_CAPABILITY

    @property
    def runs_kernels(self) -> bool:
        """Whether tuneline's kernels run on the GPU (`train.kernels`)."""
        return self.capability >= MIN_CAPABILITY

    @property
    def runs_fp8(self) -> bool:
        """Whether the kernels can multiply 8-bit floats on the GPU (`train.kernels: fp8`)."""
        return self.capability >= FP8_CAPABILITY

    @property
    def relative_speed(self) -> float:
        """Estimated training speed as a fraction of an H100's.

        A training step is limited by compute in some kernels and by bandwidth in others, so its
        speed is between the two ratios; the lower one is the estimate. Only the speed of an H100
        and an H200 is measured (plan/estimate.py); for all other GPUs it is derived by this rule.
        """
        reference = GPU_PROFILES["h100"]
        return min(self.tflops / reference.tflops, self.bandwidth / reference.bandwidth)


GPU_PROFILES: dict[str, GpuProfile] = {
    "t4": GpuProfile(
        products=("Tesla-T4",),
        capability=(7, 5),
        gpu_memory_gib=14.6,
        tflops=8.1,
        bandwidth=300,
        node=Node(
            machine="g4dn.xlarge", vcpus=4, memory_gib=16,
            cpu=("3", "4"), memory=("12Gi", "14Gi"), shared_memory="2Gi",
        ),
    ),
    "a10g": GpuProfile(
        products=("NVIDIA-A10G",),
        capability=(8, 6),
        gpu_memory_gib=22.1,
        tflops=70,
        bandwidth=600,
        node=Node(
            machine="g5.2xlarge", vcpus=8, memory_gib=32,
            cpu=("6", "8"), memory=("24Gi", "29Gi"), shared_memory="4Gi",
        ),
    ),
    "l4": GpuProfile(
        products=("NVIDIA-L4",),
        capability=(8, 9),
        gpu_memory_gib=22.0,
        tflops=121,
        bandwidth=300,
        node=Node(
            machine="g2-standard-8, g6.2xlarge", vcpus=8, memory_gib=32,
            cpu=("6", "8"), memory=("24Gi", "29Gi"), shared_memory="4Gi",
        ),
    ),
    "l40s": GpuProfile(
        products=("NVIDIA-L40S",),
        capability=(8, 9),
        gpu_memory_gib=44.4,
        tflops=362,
        bandwidth=864,
        node=Node(
            machine="g6e.4xlarge", vcpus=16, memory_gib=128,
            cpu=("13", "16"), memory=("96Gi", "116Gi"), shared_memory="8Gi",
        ),
    ),
    "a100-40g": GpuProfile(
        products=("NVIDIA-A100-SXM4-40GB", "NVIDIA-A100-PCIE-40GB"),
        capability=(8, 0),
        gpu_memory_gib=39.4,
        tflops=312,
        bandwidth=1555,
        node=Node(
            machine="a2-highgpu-1g", vcpus=12, memory_gib=85,
            cpu=("10", "12"), memory=("64Gi", "72Gi"), shared_memory="8Gi",
        ),
    ),
    "a100-80g": GpuProfile(
        products=("NVIDIA-A100-SXM4-80GB", "NVIDIA-A100-80GB-PCIe"),
        capability=(8, 0),
        gpu_memory_gib=79.2,
        tflops=312,
        bandwidth=2039,
        node=Node(
            machine="a2-ultragpu-1g", vcpus=12, memory_gib=170,
            cpu=("10", "12"), memory=("120Gi", "150Gi"), shared_memory="16Gi",
        ),
    ),
    "h100": GpuProfile(
        products=("NVIDIA-H100-80GB-HBM3", "NVIDIA-H100-PCIe"),
        capability=(9, 0),
        gpu_memory_gib=79.1,
        tflops=989,
        bandwidth=3350,
        node=Node(
            machine="a3-highgpu-1g", vcpus=26, memory_gib=234,
            cpu=("20", "26"), memory=("180Gi", "210Gi"), shared_memory="16Gi",
        ),
    ),
    "h200": GpuProfile(
        products=("NVIDIA-H200",),
        capability=(9, 0),
        gpu_memory_gib=139.8,
        tflops=989,
        bandwidth=4800,
        node=Node(
            machine="an eighth of ND96isr_H200_v5", vcpus=12, memory_gib=231,
            cpu=("10", "12"), memory=("180Gi", "210Gi"), shared_memory="16Gi",
        ),
    ),
    "b200": GpuProfile(
        products=("NVIDIA-B200",),
        capability=(10, 0),
        gpu_memory_gib=178.3,
        tflops=2250,
        bandwidth=7700,
        node=Node(
            machine="an eighth of p6-b200.48xlarge", vcpus=24, memory_gib=256,
            cpu=("20", "24"), memory=("200Gi", "230Gi"), shared_memory="16Gi",
        ),
    ),
}  # fmt: skip

LOCAL = "local"
"""The profile without a GPU."""

PROFILE_NAMES = (LOCAL, *GPU_PROFILES)

if TYPE_CHECKING:
    Profile = str
else:
    Profile = Literal[PROFILE_NAMES]
"""Name of a profile; pydantic accepts, and the JSON Schema lists, the names in the table."""


def fp8_profiles() -> list[str]:
    """Return the names of the profiles whose GPUs run `train.kernels: fp8`."""
    return [name for name, gpu in GPU_PROFILES.items() if gpu.runs_fp8]
