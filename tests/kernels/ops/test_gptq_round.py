"""gptq_round against the loop in torch, bit for bit, and against GPTQ's definition."""

import pytest
import torch

from tuneline.kernels.ops.gptq_round import round_block, round_block_reference


def _block(num_rows, num_columns, group_size, bits, generator):
    """Return arguments as gptqmodel passes them: views of wider tensors, symmetric groups."""

    def randn(*size):
        return torch.randn(*size, generator=generator, device=generator.device)

    x = randn(4 * num_columns, num_columns) @ randn(num_columns, num_columns)
    hessian = x.T @ x / len(x)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(num_columns, device=x.device)
    u = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    wide = torch.zeros(2 * num_columns, 2 * num_columns, device=x.device)
    wide[:num_columns, :num_columns] = u
    w = randn(num_rows, num_columns)
    num_codes = 2**bits
    largest = w.view(num_rows, -1, group_size).abs().amax(-1).T
    scale = (2 * largest / (num_codes - 1)).contiguous()
    zero = torch.full_like(scale, num_codes / 2)
    group = torch.arange(num_columns, device=x.device, dtype=torch.int32) // group_size
    outputs = [torch.full((num_rows, 3 * num_columns), torch.nan, device=x.device) for _ in "qel"]
    views = [t[:, num_columns : 2 * num_columns] for t in outputs]
    return w, wide[:num_columns, :num_columns], scale, zero, group, views, num_codes - 1


@pytest.mark.parametrize(
    ("num_rows", "num_columns", "group_size", "bits"),
    [
        pytest.param(5, 32, 16, 4, id="rows_left_over"),
        pytest.param(16, 16, 16, 3, id="one_group"),
        pytest.param(1, 32, 32, 8, id="one_row"),
        pytest.param(4096, 128, 64, 4, id="smollm2", marks=pytest.mark.gpu),
        pytest.param(1000, 128, 128, 2, id="two_bits", marks=pytest.mark.gpu),
    ],
)
def test_the_same_bits_as_the_loop(num_rows, num_columns, group_size, bits, generator):
    *inputs, ours, max_code = _block(num_rows, num_columns, group_size, bits, generator)
    theirs = [torch.empty_like(t) for t in ours]
    round_block(*inputs, *ours, max_code)
    round_block_reference(*inputs, *theirs, max_code)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_ties_large_values_and_nan(device):
    w = torch.tensor([[0.5, 1.5, 2.5, -0.5, 1e9, -1e9, 7.0, torch.nan]], device=device)
    ones = torch.ones(1, 1, device=device)
    group = torch.zeros(8, dtype=torch.int32, device=device)
    q, error, loss = (torch.empty_like(w) for _ in "qel")
    u = torch.eye(8, device=device)
    round_block(w, u, ones, 8 * ones, group, q, error, loss, 15)
    assert q[0, :7].tolist() == [0.0, 2.0, 2.0, 0.0, 7.0, -8.0, 7.0]
    assert q[0, 7].isnan() and error[0, 7].isnan() and loss[0, 7].isnan()
    assert error[0, :3].tolist() == [0.5, -0.5, 0.5]


def test_later_columns_make_errors_good(generator):
    """The output error is that of a least-squares correction, and less than without one."""
    w, u, scale, zero, group, (q, error, loss), max_code = _block(64, 32, 16, 3, generator)
    round_block(w, u, scale, zero, group, q, error, loss, max_code)
    hessian = torch.linalg.inv(u.double().T @ u.double())

    def output_error(q):
        delta = (w - q).double()
        return ((delta @ hessian) * delta).sum().item()

    s, z = (t[group.long()].T for t in (scale, zero))
    nearest = s * (torch.clamp(torch.round(w / s) + z, 0, max_code) - z)
    assert output_error(q) < 0.7 * output_error(nearest)
    assert output_error(q) == pytest.approx(loss.double().sum().item(), rel=1e-3)
