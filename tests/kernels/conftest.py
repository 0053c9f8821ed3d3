"""Runs the kernels on CUDA when there is a device, else in Triton's interpreter on the CPU."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel is defined, so before any kernel module is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> str:
    """Name the device the kernels run on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def generator(device: str) -> torch.Generator:
    """Return a seeded generator on the device."""
    return torch.Generator(device).manual_seed(1234)
