"""dequantize_nf4 bit for bit against bitsandbytes and its own reference."""

import dataclasses

import pytest
import torch

from tuneline.kernels.ops.adamw import dynamic_map
from tuneline.kernels.ops.nf4 import NF4Weight, dequantize_nf4, dequantize_nf4_reference


def _weight(N, K, dtype, generator, nested=True):
    """Return random bytes: every bit pattern is a valid NF4 weight."""
    device = generator.device

    def randint(high, size):
        return torch.randint(
            high, (size,), generator=generator, device=device, dtype=torch.int64
        ).to(torch.uint8)

    def rand(size):
        return torch.rand(size, generator=generator, device=device) + 0.01

    num_blocks = -(-N * K // 64)
    code = torch.cat([-rand(8).sort().values.flip(0)[:7], torch.zeros(1, device=device), rand(8)])
    weight = NF4Weight(
        randint(256, N * K // 2), rand(num_blocks), code, (N, K), dtype,
    )  # fmt: skip
    if not nested:
        return weight
    return dataclasses.replace(
        weight,
        absmax=randint(256, num_blocks),
        nested_absmax=rand(-(-num_blocks // 256)),
        nested_code=dynamic_map(signed=True).to(device),
        offset=torch.tensor(0.0371, device=device),
    )


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(1, 64), (47, 576), (3, 72), (130, 192)])
def test_bits_equal_the_reference(shape, nested, dtype, device, generator):
    weight = _weight(*shape, dtype, generator, nested)
    out = torch.full(shape, float("nan"), dtype=dtype, device=device)
    assert dequantize_nf4(weight, out=out) is out
    assert torch.equal(out, dequantize_nf4_reference(weight))


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(
    "kind", [torch.float16, torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
def test_bits_equal_bitsandbytes(kind, nested, device, generator):
    functional = pytest.importorskip("bitsandbytes.functional")
    dense = torch.randn(47, 576, generator=generator, device=device).to(kind)
    packed, state = functional.quantize_4bit(dense, quant_type="nf4", compress_statistics=nested)
    packed.quant_state = state
    weight = NF4Weight.from_bnb(packed)
    assert torch.equal(dequantize_nf4(weight), functional.dequantize_4bit(packed, state))


def test_reference_equals_bitsandbytes_in_bfloat16():
    functional = pytest.importorskip("bitsandbytes.functional")
    dense = torch.randn(47, 576, generator=torch.Generator().manual_seed(1)).bfloat16()
    packed, state = functional.quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
    packed.quant_state = state
    expected = functional.dequantize_4bit(packed, state)
    assert torch.equal(dequantize_nf4_reference(NF4Weight.from_bnb(packed)), expected)


@pytest.mark.parametrize("rank, column, pad", [(5, 0, 64), (16, 16, 64), (40, 32, 128)])
def test_lora_columns(rank, column, pad, dtype, device, generator):
    weight = _weight(47, 576, dtype, generator)
    lora_b = torch.randn(rank, 47, generator=generator, device=device).T  # strided, float32
    side = dict(lora_b=lora_b, lora_scale=0.3, lora_column=column)
    buffer = torch.full((49, 576 + pad + 8), float("nan"), dtype=dtype, device=device)
    dequantize_nf4(weight, out=buffer[1:48, : 576 + pad], **side)
    assert torch.equal(buffer[1:48, : 576 + pad], dequantize_nf4_reference(weight, **side))
    assert torch.equal(buffer[1:48, 576 + column : 576 + column + rank], (lora_b * 0.3).to(dtype))
    assert buffer[0].isnan().all() and buffer[48].isnan().all()
    assert buffer[:, 576 + pad :].isnan().all()
    assert dequantize_nf4(weight, **side).shape == (47, 576 + pad)


def test_lora_rows(dtype, device, generator):
    weight = _weight(47, 576, dtype, generator)
    lora_a = torch.randn(5, 576, generator=generator, device=device)
    out = torch.full((111, 576), float("nan"), dtype=dtype, device=device)
    dequantize_nf4(weight, out=out, lora_a=lora_a)
    assert torch.equal(out[:47], dequantize_nf4(weight))
    assert torch.equal(out[47:52], lora_a.to(dtype))
    assert (out[52:] == 0).all()


def test_refusals(device, generator):
    weight = _weight(47, 576, torch.float32, generator)
    lora_a, lora_b = torch.ones(5, 576, device=device), torch.ones(47, 5, device=device)
    with pytest.raises(ValueError, match="one of them"):
        dequantize_nf4(weight, lora_a=lora_a, lora_b=lora_b)
    with pytest.raises(ValueError, match="needs 0 more rows and 5 more columns"):
        dequantize_nf4(weight, lora_b=lora_b, out=torch.empty(47, 580, device=device))
    with pytest.raises(ValueError, match="no pad"):
        dequantize_nf4(weight, out=torch.empty(47, 640, device=device))
    with pytest.raises(ValueError, match="quant_state"):
        NF4Weight.from_bnb(torch.nn.Parameter(torch.ones(2)))


@pytest.mark.parametrize("wrong", [dict(quant_type="fp4"), dict(blocksize=128)])
def test_other_formats_are_refused(wrong):
    functional = pytest.importorskip("bitsandbytes.functional")
    options = dict(quant_type="nf4", blocksize=64) | wrong
    packed, packed_state = functional.quantize_4bit(torch.ones(4, 128), **options)
    packed.quant_state = packed_state
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        NF4Weight.from_bnb(packed)
