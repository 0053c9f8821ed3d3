"""fp8 rows and weights against torch's own cast, and the kernels' values before their rounding."""

import dataclasses

import pytest
import torch
import triton

from tuneline.kernels.ops import fp8
from tuneline.kernels.ops.adamw import dynamic_map
from tuneline.kernels.ops.fp8 import (
    LARGEST,
    largest_weight,
    nf4_to_fp8,
    quantize_rows,
    quantize_rows_reference,
    scaled_mm,
)
from tuneline.kernels.ops.nf4 import NF4Weight, dequantize_nf4_reference

E4M3 = torch.float8_e4m3fn

pytestmark = pytest.mark.usefixtures("poisoned")


def _randn(generator, *size):
    return torch.randn(*size, generator=generator, device=generator.device)


def _weight(N, K, generator, nested=True):
    """Return an NF4 weight with all its levels and, as bitsandbytes makes it, a level of 1."""
    device = generator.device
    packed = torch.randint(256, (N * K // 2,), generator=generator, device=device).to(torch.uint8)
    packed[::32] = 255  # Each block of 64 holds the largest level, 15.
    code = torch.linspace(-1, 1, 16, device=device)
    num_blocks = N * K // 64
    absmax = torch.rand(num_blocks, generator=generator, device=device) + 0.01
    weight = NF4Weight(packed, absmax, code, (N, K), torch.bfloat16)
    if not nested:
        return weight
    index = torch.randint(256, (num_blocks,), generator=generator, device=device)
    return dataclasses.replace(
        weight,
        absmax=index.to(torch.uint8),
        nested_absmax=absmax[: -(-num_blocks // 256)],
        nested_code=dynamic_map(signed=True).to(device),
        offset=torch.tensor(1.5, device=device),
    )


def _assert_cast_alike(x8, expected):
    """Compare bytes; the GPU's quotients may fall on the other side of a middle, seldom."""
    steps = (x8.view(torch.uint8).int() - expected.view(torch.uint8).int()).abs()
    allowed = 0.01 if x8.is_cuda else 0.0
    assert steps.max() <= 1 and (steps > 0).float().mean() <= allowed


def _wide(weight):
    return dequantize_nf4_reference(dataclasses.replace(weight, dtype=torch.float32))


@pytest.mark.parametrize("shape", [(1, 16), (47, 97), (5, 1500)])
def test_rows_are_torch_casts_within_half_a_step(shape, generator):
    x = _randn(generator, *shape) * _randn(generator, shape[0], 1).exp()
    x8, scale = quantize_rows(x)
    assert x8.dtype == E4M3 and scale.shape == shape[:1]
    torch.testing.assert_close(scale, x.abs().amax(1) / LARGEST, rtol=3e-7, atol=0)
    cast = (x * (LARGEST / x.abs().amax(1))[:, None]).to(E4M3)
    _assert_cast_alike(x8, cast)
    # Three bits of mantissa; below 2^-6 the steps are 2^-9.
    half_step = torch.maximum(x.abs() * 2**-4, 2**-10 * scale[:, None])
    assert ((x8.float() * scale[:, None] - x).abs() <= half_step * (1 + 1e-6)).all()
    assert (x8.float().abs().amax(1) == LARGEST).all()


def test_rows_of_zeros_floor_side_and_out(device, generator):
    x, side = _randn(generator, 6, 40), 9 * _randn(generator, 6, 64)
    x[2] = side[2] = 0
    floor = torch.tensor(7.0, device=device)
    buffer = torch.zeros(6, 110, device=device).to(E4M3)
    x8, scale = quantize_rows(x, side_TP=side, floor=floor, out=buffer[:, :104])
    whole = torch.cat([x, side], 1)
    assert x8.data_ptr() == buffer.data_ptr()
    expected, expected_scale = quantize_rows_reference(whole, floor=floor)
    assert torch.equal(expected_scale, whole.abs().amax(1).clamp(min=7) / LARGEST)
    torch.testing.assert_close(scale, expected_scale, rtol=3e-7, atol=0)
    _assert_cast_alike(x8, expected)
    assert (buffer.float()[:, 104:] == 0).all()
    zeros, scale = quantize_rows(torch.zeros(2, 40, device=device))
    assert (zeros.float() == 0).all() and (scale > 0).all()
    turned, scale = quantize_rows(x.t())
    assert torch.equal(turned.float(), quantize_rows(x.t().contiguous())[0].float())


@pytest.mark.parametrize("side", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_the_rows_kernel_before_its_rounding(turned, side, device, generator):
    """It runs in float32 here: a row's scale, masks and strides show, the cast is the chip's."""
    x = _randn(generator, 97, 7).t() if turned else _randn(generator, 7, 97)
    columns = 5 * _randn(generator, 7, 64) if side else x
    width = 97 + 64 * side
    out, scale = torch.empty(7, width, device=device), torch.empty(7, device=device)
    fp8._rows_kernel[(7,)](
        x, columns, out, scale, scale, *x.stride(), columns.stride(0), width,
        K=97, P=64 * side, HAS_FLOOR=False, BLOCK=128,
    )  # fmt: skip
    whole = torch.cat([x, columns], 1) if side else x
    largest = whole.abs().amax(1)
    torch.testing.assert_close(scale, largest / LARGEST, rtol=2e-7, atol=0)
    torch.testing.assert_close(out, whole * (LARGEST / largest)[:, None], rtol=4e-7, atol=0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(1, 64), (47, 192)])
def test_weights_are_casts_of_float32(shape, nested, transposed, device, generator):
    weight = _weight(*shape, generator, nested)
    wide = _wide(weight).t() if transposed else _wide(weight)
    scale = torch.rand(wide.shape[0], generator=generator, device=device) + 0.01
    buffer = torch.zeros(wide.shape[0], wide.shape[1] + 8, device=device).to(E4M3)
    nf4_to_fp8(weight, scale, out=buffer[:, : wide.shape[1]], transposed=transposed)
    expected = (wide / scale[:, None]).to(E4M3)
    _assert_cast_alike(buffer[:, : wide.shape[1]], expected)
    assert (buffer.float()[:, wide.shape[1] :] == 0).all()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_weight_kernels_before_their_rounding(transposed, nested, device, generator):
    """They run in float32 here, beside columns that they must leave alone."""
    N, K = 70, 192
    weight = _weight(N, K, generator, nested)
    wide = _wide(weight).t() if transposed else _wide(weight)
    scale = torch.rand(wide.shape[0], generator=generator, device=device) + 0.01
    out = torch.full((wide.shape[0], wide.shape[1] + 5), 3.0, device=device)
    pointers = [weight.packed.view(torch.int32), weight.absmax, weight.code]
    pointers += [weight.nested_absmax, weight.nested_code, weight.offset] if nested else [scale] * 3
    if transposed:
        grid = (triton.cdiv(N, 64), triton.cdiv(K, 128))
        fp8._transposed_kernel[grid](
            *pointers, scale, out, N, out.stride(0), K=K, NESTED=nested, ROWS=64, COLS=128
        )
    else:
        num_words = N * K // 8
        fp8._weight_kernel[(triton.cdiv(num_words, 512),)](
            *pointers, scale, out, num_words, out.stride(0), K=K, NESTED=nested, BLOCK=512
        )
    expected = wide / scale[:, None]
    torch.testing.assert_close(out[:, : wide.shape[1]], expected, rtol=5e-7, atol=0)
    assert (out[:, wide.shape[1] :] == 3.0).all()


@pytest.mark.parametrize("nested", [False, True])
def test_the_largest_weight_is_that_of_the_absmax(nested, generator):
    weights = [_weight(4, 64, generator, nested), _weight(9, 64, generator, nested)]
    largest = max(_wide(weight).abs().max() for weight in weights)
    assert largest_weight(weights) == largest


def test_products_are_off_by_the_rounding_of_their_operands(generator):
    x, w = _randn(generator, 48, 512), _randn(generator, 64, 512)
    (x8, x_scale), (w8, w_scale) = quantize_rows(x), quantize_rows(w)
    y = scaled_mm(x8, x_scale, w8, w_scale, dtype=torch.bfloat16)
    out = torch.empty(48, 64, dtype=torch.bfloat16, device=generator.device)
    assert scaled_mm(x8, x_scale, w8, w_scale, dtype=torch.bfloat16, out=out) is out
    truth = x.double() @ w.double().T
    of_rounded = (x8.double() * x_scale[:, None]) @ (w8.double() * w_scale[:, None]).T
    assert torch.equal(out, y) and y.dtype == torch.bfloat16
    assert (y.double() - of_rounded).norm() < 2**-8 * of_rounded.norm()
    error = (y.double() - truth).norm() / truth.norm()
    assert 0.02 < error < 0.05
