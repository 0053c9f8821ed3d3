"""GPU profiles: the properties of each kind of GPU and of a node that usually has such GPUs.

This is the only table of GPUs; `placement.profile` names one of its entries. Placement reads the
node's values, and `tuneline plan` reads the GPU's memory, its speed and the types that it supports.
A new profile needs one entry here and nothing else.

Compute (without sparsity) and bandwidth are from the makers' datasheets; if a GPU has several
variants, the values are for SXM. Memory is the value of `torch.cuda.get_device_properties`, which
is below the nominal size because of ECC and the driver. A GPU of AMD is declared only: nothing of
tuneline ran on one, and `tuneline plan` says so.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tuneline.kernels.limits import FP8_CAPABILITY, MIN_CAPABILITY

BFLOAT16_CAPABILITY = (8, 0)
"""Lowest compute capability of GPUs that can multiply bfloat16 (Ampere)."""

FP8_TENSOR_CAPABILITY = (8, 9)
"""Lowest compute capability of GPUs that can multiply 8-bit floats (Ada)."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """The smallest common machine with the GPU, and the resources that a pod with one GPU requests.

    Requests are below the machine's size, because daemons of the node need some of it. A recipe
    that uses more GPUs per pod sets larger requests in `placement.accelerated`.
    """

    machine: str
    """Cloud machine types. If only machines with eight GPUs are common, the values below are an
    eighth of such a machine."""
    vcpus: int
    """vCPUs per GPU."""
    memory_gib: int
    """Memory per GPU, in GiB."""
    cpu: tuple[str, str]
    """CPU request and limit."""
    memory: tuple[str, str]
    """Memory request and limit."""
    shared_memory: str
    """Size of /dev/shm; files there count towards the pod's memory."""


@dataclass(frozen=True, kw_only=True)
class GpuProfile:
    """One kind of GPU."""

    products: tuple[str, ...]
    """Values of the node label with the GPU's product name (pods.PRODUCT_LABELS): for NVIDIA, the
    name in nvidia-smi, with dashes."""
    capability: tuple[int, int] | None
    """CUDA compute capability; None: a GPU of AMD."""
    gpu_memory_gib: float
    """Memory of the GPU that a process can use, in GiB."""
    tflops: float
    """Dense TFLOP/s in the type that `train.dtype: auto` chooses: bfloat16 if the GPU can multiply
    it, otherwise float32."""
    bandwidth: float
    """Memory bandwidth in GB/s."""
    node: Node

    @property
    def memory_bytes(self) -> float:
        """Memory of the GPU that a process can use, in bytes."""
        return self.gpu_memory_gib * 2**30

    @property
    def resource(self) -> str:
        """Name of the GPU as a resource of Kubernetes."""
        return "amd.com/gpu" if self.capability is None else "nvidia.com/gpu"

    @property
    def has_bfloat16(self) -> bool:
        """Whether the GPU can multiply bfloat16; if not, `train.dtype: auto` chooses float32."""
        return self.capability is None or self.capability >= BFLOAT16_CAPABILITY

    @property
    def has_fp8(self) -> bool:
        """Whether the GPU can multiply 8-bit floats, as servers of FP8 checkpoints do."""
        return self.capability is None or self.capability >= FP8_TENSOR_CAPABILITY

    @property
    def runs_kernels(self) -> bool:
        """Whether tuneline's kernels run on the GPU (`train.kernels`)."""
        return self.capability is not None and self.capability >= MIN_CAPABILITY

    @property
    def runs_fp8(self) -> bool:
        """Whether the kernels can multiply 8-bit floats on the GPU (`train.kernels: fp8`)."""
        return self.capability is not None and self.capability >= FP8_CAPABILITY

    @property
    def relative_speed(self) -> float:
        """Estimated training speed relative to an H100.

        A training step is limited by compute in some kernels and by bandwidth in others, so its
        relative speed is between the ratio of the compute and the ratio of the bandwidths. The
        estimate is the lower of the two ratios. It is derived from the datasheets, not measured.
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
    "mi300x": GpuProfile(
        products=("AMD_Instinct_MI300X_OAM", "AMD_Instinct_MI300X_VF"),
        capability=None,
        # 192 nominal; what torch can use was not measured.
        gpu_memory_gib=190,
        tflops=1307,
        bandwidth=5300,
        node=Node(
            machine="an eighth of ND96isr_MI300X_v5", vcpus=12, memory_gib=231,
            cpu=("10", "12"), memory=("180Gi", "210Gi"), shared_memory="16Gi",
        ),
    ),
}  # fmt: skip

LOCAL = "local"
"""Name of the profile without a GPU."""
SMALL = "small"
"""Name of the profile for a cluster of one small machine without a GPU."""

PROFILE_NAMES = (LOCAL, SMALL, *GPU_PROFILES)

if TYPE_CHECKING:
    Profile = str
else:
    Profile = Literal[PROFILE_NAMES]
"""Name of a profile in the table. Pydantic accepts only these names, and the JSON Schema lists
them."""


def fp8_profiles() -> list[str]:
    """Return the names of the profiles whose GPUs run `train.kernels: fp8`."""
    return [name for name, gpu in GPU_PROFILES.items() if gpu.runs_fp8]
