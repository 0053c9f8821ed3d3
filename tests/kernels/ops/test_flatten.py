"""Scaled matrices in one flat tensor: the kernel, its plain torch form, and a captured launch."""

import pytest
import torch

from tuneline.kernels.ops import flatten
from tuneline.kernels.ops.flatten import Flattener, Scaled

SHAPES = [(3, 1500), (1500, 3), (16, 64), (1, 1), (70, 30)]


def _matrices(generator, device, dtype=torch.float32):
    """Return matrices with the strides that a layer's gradients have, and NaN beside them."""

    def randn(*size):
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    wide = randn(1500, 64)
    wide[:, 3:] = torch.nan
    return [
        Scaled(randn(64, 1500)[:3]),
        Scaled(wide[:, :3], 0.37),
        Scaled(randn(64, 16).t(), -2.0),
        Scaled(randn(1, 1), 1.5),
        Scaled(randn(30, 70).t()),
    ]


def _expected(matrices, dtype):
    return torch.cat([(x * factor).to(dtype).reshape(-1) for x, factor in matrices])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_writes_the_products_bit_for_bit(generator, device, dtype, monkeypatch):
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates to bfloat16 where the hardware rounds")
    matrices = _matrices(generator, device)
    out = torch.full((sum(r * c for r, c in SHAPES),), torch.nan, dtype=dtype, device=device)
    flattener = Flattener(SHAPES, out)
    flattener.launch(matrices)
    assert torch.equal(out, _expected(matrices, dtype))
    # A later launch reads other matrices, and leaves nothing of the first.
    others = _matrices(generator, device)
    flattener.launch(others)
    assert torch.equal(out, _expected(others, dtype))
    monkeypatch.setattr(flatten, "use_kernel", lambda x: False)
    flattener.launch(matrices)
    assert torch.equal(out, _expected(matrices, dtype))


def test_matrices_of_another_type_are_concatenated(generator, device):
    matrices = _matrices(generator, device, torch.float64)
    out = torch.empty(sum(r * c for r, c in SHAPES), dtype=torch.float64, device=device)
    Flattener(SHAPES, out).launch(matrices)
    assert torch.equal(out, _expected(matrices, torch.float64))


def test_a_value_without_a_factor_is_not_copied():
    x = torch.ones(2, 3)
    assert Scaled(x).value(torch.float32) is x
    assert torch.equal(Scaled(x, 0.5).value(torch.float64), torch.full((2, 3), 0.5).double())


@pytest.mark.gpu
def test_a_replay_reads_the_matrices_that_were_captured(generator):
    matrices = _matrices(generator, "cuda")
    out = torch.zeros(sum(r * c for r, c in SHAPES), device="cuda")
    flattener = Flattener(SHAPES, out)
    flattener.launch(_matrices(generator, "cuda"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        flattener.launch(matrices)
    flattener.fill()
    for x, _ in matrices:
        x.mul_(3)
    graph.replay()
    assert torch.equal(out, _expected(matrices, torch.float32))
