"""The table of GPUs: whole entries, nodes that can exist, and the rule for the speed."""

import dataclasses

import pytest

from tuneline.gpu_profiles import GPU_PROFILES, GpuProfile, Node
from tuneline.placement import quantity_value


def test_an_entry_cannot_leave_anything_out() -> None:
    for record in (GpuProfile, Node):
        for field in dataclasses.fields(record):
            assert field.default is field.default_factory is dataclasses.MISSING, field.name


@pytest.mark.parametrize("name", GPU_PROFILES)
def test_an_entry_is_plausible(name: str) -> None:
    gpu = GPU_PROFILES[name]
    assert gpu.products and all(gpu.products)
    assert 8 <= gpu.gpu_memory_gib <= 300 and 8 <= gpu.node.memory_gib <= 300
    assert gpu.tflops > 0 and gpu.bandwidth > 0
    assert gpu.node.machine.strip()
    for request, limit in (gpu.node.cpu, gpu.node.memory):
        assert 0 < quantity_value(request) <= quantity_value(limit)
    assert 0 < quantity_value(gpu.node.shared_memory) < quantity_value(gpu.node.memory[0])


def test_no_product_is_in_two_profiles() -> None:
    products = [product for gpu in GPU_PROFILES.values() for product in gpu.products]
    assert len(products) == len(set(products))


@pytest.mark.parametrize("name", GPU_PROFILES)
def test_the_resource_is_that_of_the_maker(name: str) -> None:
    gpu = GPU_PROFILES[name]
    maker = "amd" if name.startswith("mi") else "nvidia"
    assert gpu.resource == f"{maker}.com/gpu"
    assert (gpu.capability is None) == (maker == "amd")


@pytest.mark.parametrize("name", GPU_PROFILES)
def test_a_pod_and_the_daemons_fit_the_machine(name: str) -> None:
    node = GPU_PROFILES[name].node
    memory = node.memory_gib * 2**30
    assert quantity_value(node.cpu[0]) <= min(node.vcpus - 1, quantity_value(node.cpu[1]))
    assert quantity_value(node.cpu[1]) <= node.vcpus
    assert quantity_value(node.memory[0]) <= min(0.9 * memory, quantity_value(node.memory[1]))
    assert quantity_value(node.memory[1]) <= 0.95 * memory


def test_the_lower_of_compute_and_bandwidth_decides_the_speed() -> None:
    speeds = {name: gpu.relative_speed for name, gpu in GPU_PROFILES.items()}
    assert speeds == {
        "t4": 8.1 / 989, "l4": 300 / 3350, "a10g": 70 / 989, "l40s": 864 / 3350,
        "a100-40g": 312 / 989, "a100-80g": 312 / 989, "h100": 1.0, "h200": 1.0, "b200": 2250 / 989,
        "mi300x": 1307 / 989,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kernels", "fp8", "bfloat16"),
    [
        ("t4", False, False, False),
        # torch multiplies fp8 on Ada too, but our kernels are not made or tested for it.
        ("l4", True, False, True), ("l40s", True, False, True),
        ("a10g", True, False, True), ("a100-40g", True, False, True),
        ("a100-80g", True, False, True),
        ("h100", True, True, True), ("h200", True, True, True), ("b200", True, True, True),
        # Not tried on ROCm.
        ("mi300x", False, False, True),
    ],
)  # fmt: skip
def test_what_a_gpu_supports(name: str, kernels: bool, fp8: bool, bfloat16: bool) -> None:
    gpu = GPU_PROFILES[name]
    assert (gpu.runs_kernels, gpu.runs_fp8, gpu.has_bfloat16) == (kernels, fp8, bfloat16)
