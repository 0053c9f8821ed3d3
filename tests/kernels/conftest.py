"""Fixtures of the kernels' tests, which run on CUDA or in Triton's interpreter (tests/conftest)."""

import sys

import pytest
import torch


@pytest.fixture
def device() -> str:
    """Name the device the kernels run on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def generator(device: str) -> torch.Generator:
    """Return a seeded generator on the device."""
    return torch.Generator(device).manual_seed(1234)


_ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 1.25 * 2**-9}
"""Relative error allowed: float32 sums in another order; 1.25 bfloat16 roundings of 2^-9."""


@pytest.fixture
def references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all ops run their references: a layer is interpreted in seconds."""
    for name in [name for name in sys.modules if name.startswith("tuneline.kernels.")]:
        if hasattr(sys.modules[name], "use_kernel"):
            monkeypatch.setattr(sys.modules[name], "use_kernel", lambda x: False)


@pytest.fixture
def assert_near():
    """Return a check of values against a float64 truth, by the norm of the error.

    The error may be the dtype's rounding, or the stock implementation's own error where one is
    given, and a tenth more, for another order of sums. NaN never passes.
    """

    def check(actual: torch.Tensor, truth: torch.Tensor, stock: torch.Tensor | None = None) -> None:
        assert truth.dtype == torch.float64
        assert actual.shape == truth.shape
        error = (actual.double() - truth).norm().item()
        allowed = _ROUNDING[actual.dtype] * truth.norm().item() + 1e-12
        if stock is not None:
            allowed = max(allowed, 1.1 * (stock.double() - truth).norm().item())
        assert error <= allowed

    return check


@pytest.fixture(
    params=[
        torch.float32,
        # the interpreter truncates to bfloat16 where the hardware rounds
        pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
    ],
    ids=["float32", "bfloat16"],
)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Return each dtype the kernels can be checked in on this machine."""
    return request.param


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch):
    """Fill what `torch.empty` and its kin return with NaN, so that what nobody writes shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
