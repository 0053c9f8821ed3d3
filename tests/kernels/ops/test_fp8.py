"""fp8 rows and weights against torch's own cast, and the kernels' values before their rounding."""

import dataclasses

import pytest
import torch
import triton

from tuneline.kernels.ops import fp8
from tuneline.kernels.ops.adamw import dynamic_map
from tuneline.kernels.ops.fp8 import (
    LARGEST,
    Side,
    largest_weight,
    nf4_to_fp8,
    quantize_rows,
    quantize_rows_reference,
    quantize_side,
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


def test_rows_of_zeros_and_of_other_strides(device, generator):
    zeros, scale = quantize_rows(torch.zeros(2, 40, device=device))
    assert (zeros.float() == 0).all() and (scale > 0).all()
    x = _randn(generator, 6, 40)
    turned, scale = quantize_rows(x.t())
    assert torch.equal(turned.float(), quantize_rows(x.t().contiguous())[0].float())


@pytest.mark.parametrize("peak", [0.0, 3.0, 40.0])
def test_a_side_is_multiplied_and_its_counterpart_divided_by_the_same_factor(
    peak, device, generator
):
    x, side = _randn(generator, 6, 40), 9 * _randn(generator, 6, 64)
    x[2] = side[2] = 0
    peak, largest = torch.tensor([peak, 4.0], device=device)
    factor = max(1.0, peak.item() / 4)
    x8, scale = quantize_rows(x, Side(side, peak, largest))
    expected, expected_scale = quantize_rows_reference(x, Side(side, peak, largest))
    whole = torch.cat([x, factor * side], 1)
    torch.testing.assert_close(expected_scale, (whole.abs().amax(1) / LARGEST).clamp_min(1e-15))
    torch.testing.assert_close(scale, expected_scale, rtol=3e-7, atol=0)
    _assert_cast_alike(x8, expected)
    counterpart = (torch.rand(90, 64, generator=generator, device=device) * 2 - 1) * peak
    buffer = torch.zeros(90, 70, device=device).to(E4M3)
    for given in (counterpart, counterpart.t().contiguous().t()):
        quantize_side(given, peak=peak, largest=largest, out=buffer[:, 6:])
        _assert_cast_alike(buffer[:, 6:], (given / factor / 4.0 * LARGEST).to(E4M3))
        assert (buffer.float()[:, :6] == 0).all()
    # The product of the two sides is that of what was given.
    y = scaled_mm(
        x8[:, 40:].contiguous(), scale, buffer[:, 6:].contiguous()[:80],
        (largest / LARGEST).expand(80).contiguous(), dtype=torch.bfloat16,
    )  # fmt: skip
    truth = side.double() @ counterpart.double()[:80].T
    assert (y.double() - truth).norm() <= 0.06 * truth.norm()


@pytest.mark.parametrize("peak", [0.5, 12.0])
@pytest.mark.parametrize("side", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_the_rows_kernel_before_its_rounding(turned, side, peak, device, generator):
    """It runs in float32 here: a row's scale, masks and strides show, the cast is the chip's."""
    x = _randn(generator, 97, 7).t() if turned else _randn(generator, 7, 97)
    columns = 5 * _randn(generator, 7, 64) if side else x
    width = 97 + 64 * side
    out, scale = torch.empty(7, width, device=device), torch.empty(7, device=device)
    peak, largest = torch.tensor([peak, 3.0], device=device)
    fp8._rows_kernel[(7,)](
        x, columns, out, scale, peak, largest, *x.stride(), columns.stride(0), width,
        K=97, P=64 * side, BLOCK=128,
    )  # fmt: skip
    whole = torch.cat([x, columns * max(1.0, peak.item() / 3)], 1) if side else x
    biggest = whole.abs().amax(1)
    torch.testing.assert_close(scale, biggest / LARGEST, rtol=2e-7, atol=0)
    torch.testing.assert_close(out, whole * (LARGEST / biggest)[:, None], rtol=4e-7, atol=0)


@pytest.mark.parametrize("peak", [0.5, 12.0])
def test_the_side_kernel_before_its_rounding(peak, device, generator):
    side = _randn(generator, 64, 70).t()
    out = torch.full((70, 64 + 5), 3.0, device=device)
    peak, largest = torch.tensor([peak, 3.0], device=device)
    fp8._side_kernel[(triton.cdiv(70, 32),)](
        side, out, peak, largest, 70, *side.stride(), out.stride(0), P=64, ROWS=32
    )
    expected = side * (LARGEST / max(3.0, peak.item()))
    torch.testing.assert_close(out[:, :64], expected, rtol=4e-7, atol=0)
    assert (out[:, 64:] == 3.0).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(1, 64), (47, 192)])
def test_weights_are_casts_of_float32(shape, nested, transposed, device, generator):
    weight = _weight(*shape, generator, nested)
    wide = _wide(weight).t() if transposed else _wide(weight)
    largest = 1.3 * wide.abs().max()
    buffer = torch.zeros(wide.shape[0], wide.shape[1] + 8, device=device).to(E4M3)
    nf4_to_fp8(weight, largest, out=buffer[:, : wide.shape[1]], transposed=transposed)
    expected = (wide * (LARGEST / largest)).to(E4M3)
    _assert_cast_alike(buffer[:, : wide.shape[1]], expected)
    assert (buffer.float()[:, wide.shape[1] :] == 0).all()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_weight_kernels_before_their_rounding(transposed, nested, device, generator):
    """They run in float32 here, beside columns that they must leave alone."""
    N, K = 70, 192
    weight = _weight(N, K, generator, nested)
    wide = _wide(weight).t() if transposed else _wide(weight)
    largest = 1.3 * wide.abs().max()
    out = torch.full((wide.shape[0], wide.shape[1] + 5), 3.0, device=device)
    pointers = [weight.packed.view(torch.int32), weight.absmax, weight.code]
    pointers += (
        [weight.nested_absmax, weight.nested_code, weight.offset] if nested else [largest] * 3
    )
    if transposed:
        grid = (triton.cdiv(N, 64), triton.cdiv(K, 128))
        fp8._transposed_kernel[grid](
            *pointers, largest, out, N, out.stride(0), K=K, NESTED=nested, ROWS=64, COLS=128
        )
    else:
        num_words = N * K // 8
        fp8._weight_kernel[(triton.cdiv(num_words, 512),)](
            *pointers, largest, out, num_words, out.stride(0), K=K, NESTED=nested, BLOCK=512
        )
    expected = wide * (LARGEST / largest)
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
