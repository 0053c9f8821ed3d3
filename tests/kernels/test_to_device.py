"""Copies for which the host does not wait."""

import pytest
import torch

from tuneline.kernels.to_device import to_device


def test_on_a_cpu_nothing_is_copied():
    numbers = torch.arange(5)
    assert to_device(numbers, torch.device("cpu")) is numbers


@pytest.mark.gpu
def test_the_host_does_not_wait_for_a_gpu():
    numbers = torch.arange(100_000)
    torch.cuda.set_sync_debug_mode("error")
    try:
        copied = to_device(numbers, torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(copied.cpu(), numbers)
