"""A group's GEMM operands, in the model's dtype and in fp8, against one linear at a time."""

import dataclasses

import pytest
import torch

from tuneline.kernels.decoder import operands as operands_module
from tuneline.kernels.decoder.operands import (
    Fp8Operands,
    StoredOperands,
    WideOperands,
    augmented_input,
    group_operands,
)
from tuneline.kernels.ops import lora
from tuneline.kernels.ops.fp8 import largest_weight
from tuneline.kernels.ops.lora import (
    LoraGradients,
    LoraGroup,
    LoraLinear,
    group_reference,
    pack,
    pack_reference,
)
from tuneline.kernels.ops.nf4 import NF4Weight, dequantize_nf4_reference

TOKENS, INPUTS = 23, 64
CASES = {
    # name: (outputs, rank, bias) of each linear
    "qkv": ((96, 5, False), (32, 3, False), (32, 4, False)),
    "qkv_bias": ((96, 5, True), (32, 0, True), (32, 4, False)),
    "narrow": ((40, 7, False),),
    "bias_alone": ((40, 0, True),),
    "frozen": ((40, 0, False), (88, 0, False)),
    "frozen_alone": ((40, 0, False),),
    "wide_ranks": ((96, 40, False), (32, 30, True)),
}

pytestmark = pytest.mark.usefixtures("poisoned")


def _group(case, dtype, generator):
    def randn(*size):
        return torch.randn(*size, generator=generator, device=generator.device)

    linears = []
    for num_out, rank, bias in CASES[case]:
        adapter = {"lora_a": randn(rank, INPUTS), "lora_b": randn(num_out, rank)} if rank else {}
        linears.append(
            LoraLinear(
                randn(num_out, INPUTS).to(dtype),
                num_out,
                INPUTS,
                randn(num_out).to(dtype) if bias else None,
                scaling=0.7,
                **adapter,
            )  # fmt: skip
        )
    return LoraGroup(tuple(linears))


def _nf4_group(sizes, generator):
    """Build a group whose weights are NF4, with max |W| for fp8."""
    device, linears = generator.device, []
    for num_out, rank in sizes:
        size = (num_out * INPUTS // 2,)
        packed = torch.randint(256, size, generator=generator, device=device).to(torch.uint8)
        packed[::32] = 255
        absmax = torch.rand(num_out, generator=generator, device=device) + 0.5
        code = torch.linspace(-1, 1, 16, device=device)
        weight = NF4Weight(packed, absmax, code, (num_out, INPUTS), torch.float32)
        a = torch.randn(rank, INPUTS, generator=generator, device=device)
        b = 0.1 * torch.randn(num_out, rank, generator=generator, device=device)
        linears.append(LoraLinear(weight, num_out, INPUTS, lora_a=a, lora_b=b, scaling=0.7))
    return LoraGroup(tuple(linears), largest=largest_weight([x.weight for x in linears]))


def _run(operands, group, x, dy):
    """Return Y, dX and the gradients of the adapters as the layer computes them."""
    x_TKP = augmented_input(TOKENS, group, x)
    x_TKP[:, :INPUTS] = x
    operands.write_lora_columns(x_TKP)
    y = operands.forward(x_TKP)
    dx, g = operands.input_gradient(dy)
    grads = LoraGradients(group)
    half = TOKENS // 2
    for rows in (slice(half), slice(half, None)):
        g_rows = None if g is None else g[rows]
        grads.add(dy[rows], g_rows, x[rows], x_TKP[rows, INPUTS:])
    return [y, dx, *(grad.value(x.dtype) for grad in grads.split())]


def _reference(group, x, dy, dtype):
    """Differentiate `group_reference` in `dtype`."""

    def cast(tensor):
        if isinstance(tensor, NF4Weight):
            tensor = dequantize_nf4_reference(tensor)
        return None if tensor is None else tensor.detach().to(dtype)

    linears = tuple(
        LoraLinear(
            cast(z.weight),
            z.num_out,
            z.num_in,
            cast(z.bias),
            cast(z.lora_a),
            cast(z.lora_b),
            z.scaling,
        )  # fmt: skip
        for z in group.linears
    )
    copied = LoraGroup(linears)
    leaves = [cast(x).requires_grad_(), *(t.requires_grad_() for t in copied.parameters())]
    y = group_reference(leaves[0], copied, [z.weight for z in linears])
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]


def _activations(group, dtype, generator):
    sizes = (TOKENS, INPUTS), (TOKENS, group.num_out), (TOKENS, group.num_out)
    return [
        torch.randn(*size, generator=generator, device=generator.device).to(dtype) for size in sizes
    ]


@pytest.mark.parametrize("case", CASES)
def test_wide_and_stored_operands(case, dtype, generator, assert_near):
    group = _group(case, dtype, generator)
    x, dy, residual = _activations(group, dtype, generator)
    operands = group_operands(group, x)
    assert isinstance(operands, StoredOperands if case.startswith("frozen") else WideOperands)
    ours, again = _run(operands, group, x, dy), _run(operands, group, x, dy)
    truth, stock = (_reference(group, x, dy, kind) for kind in (torch.float64, dtype))
    for a, b, c, d in zip(ours, truth, stock, again, strict=True):
        assert_near(a, b, c)
        assert torch.equal(a, d)
    x_TKP = augmented_input(TOKENS, group, x)
    x_TKP[:, :INPUTS] = x
    operands.write_lora_columns(x_TKP)
    wide, stock_sum = truth[0] + residual.double(), stock[0] + residual
    assert_near(operands.forward(x_TKP, residual_TN=residual), wide, stock_sum)
    same = operands.forward(x_TKP, residual_TN=residual, out=residual)
    assert same.data_ptr() == residual.data_ptr()
    assert_near(residual, wide, stock_sum)
    # The same with room for G beside dY.
    room = dy.new_empty(TOKENS, group.num_out + group.num_columns)
    room[:, : group.num_out] = dy
    for a, b in zip(
        operands.input_gradient(room[:, : group.num_out], room),
        operands.input_gradient(dy),
        strict=True,
    ):
        assert a is b is None or torch.equal(a, b)
    _, g = operands.input_gradient(dy)
    alone = operands.lora_gradient(dy)
    assert g is alone is None or torch.allclose(g, alone, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("case", ["frozen", "frozen_alone"])
def test_stored_operands_read_the_weights_where_they_are(case, generator):
    group = _group(case, torch.float32, generator)
    x, _, residual = _activations(group, torch.float32, generator)
    operands = group_operands(group, x)
    expected = residual + 0.3 * group_reference(x, group, [z.weight for z in group.linears])
    found = operands.forward(x, residual_TN=residual, scale=0.3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for linear in group.linears:
        linear.weight.zero_()
    assert torch.equal(operands.forward(x, residual_TN=residual), residual)
    # Activations of another dtype need converted weights.
    assert isinstance(group_operands(group, x.bfloat16()), WideOperands)


@pytest.mark.parametrize("case", ["qkv", "qkv_bias", "bias_alone", "wide_ranks"])
def test_pack_writes_every_bit_of_its_reference(case, dtype, generator, monkeypatch):
    monkeypatch.setattr(lora, "_PACK_BLOCK", 32)
    group = _group(case, dtype, generator)
    buffers = []
    for function in (pack, pack_reference):
        wide = torch.empty(
            group.num_out + group.num_columns, INPUTS + group.num_columns,
            dtype=dtype, device=generator.device,
        )  # fmt: skip
        function(group, wide[: group.num_out, INPUTS:], wide[group.num_out :, :INPUTS])
        buffers.append(wide)
    ours, expected = (buffer.nan_to_num(nan=77.0) for buffer in buffers)
    assert torch.equal(ours, expected)
    # Neither touches the weight's place nor the corner that nobody reads.
    assert buffers[0][: group.num_out, :INPUTS].isnan().all()
    assert buffers[0][group.num_out :, INPUTS:].isnan().all()


@pytest.mark.parametrize("case", ["qkv", "wide_ranks"])
def test_pack_finds_the_largest_numbers_of_both(case, generator):
    group = _group(case, torch.float32, generator)
    for function in (pack, pack_reference):
        sb = torch.empty(group.num_out, group.num_columns, device=generator.device)
        a = torch.empty(group.num_columns, INPUTS, device=generator.device)
        peaks = torch.zeros(2, device=generator.device)
        function(group, sb, a, peaks)
        assert peaks.tolist() == [sb.abs().max(), a.abs().max()]


@pytest.mark.parametrize("sizes", [((96, 5), (32, 3), (32, 4)), ((48, 16),)])
def test_kept_fp8_operands_follow_the_adapters(sizes, generator, monkeypatch):
    """Also one that outgrows the weights, which share its scale."""
    group = _nf4_group(sizes, generator)
    kind = torch.bfloat16 if generator.device.type == "cuda" else torch.float32
    x, dy, _ = _activations(group, kind, generator)
    group.place.keep(True)
    group_operands(group, x)
    converted = []
    monkeypatch.setattr(operands_module, "nf4_to_fp8", lambda *a, **k: converted.append(a))
    arena = group.place.arena
    assert arena.nbytes == group.arena_bytes(kind.itemsize)
    for factor in (1, 1000, 1e-3):
        for linear in group.linears:
            # Numbers change places too: a multiple alone may have the same bytes.
            linear.lora_a.copy_(linear.lora_a.roll(1, 0))
            linear.lora_b.copy_(factor * linear.lora_b.roll(1, 0))
        group_operands(group, x)
        ours = _run(group_operands(group, x, packs=False), group, x, dy)
        y, dx, *grads = _reference(group, x, dy, torch.float64)
        for a, b in zip(ours[:2], (y, dx), strict=True):
            assert (a.double() - b).norm() < 0.06 * b.norm()
        for a, b in zip(ours[2:], grads, strict=True):
            assert (a.double() - b).norm() < (1e-2 if kind == torch.bfloat16 else 1e-6) * b.norm()
    assert not converted and group.place.arena is arena
    monkeypatch.undo()
    group.place.keep(False)
    again = _run(group_operands(group, x), group, x, dy)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


def test_an_arena_for_which_memory_ran_out_is_not_kept(generator, monkeypatch):
    group = _nf4_group([(48, 16)], generator)
    kind = torch.bfloat16 if generator.device.type == "cuda" else torch.float32
    x = _activations(group, kind, generator)[0]
    group.place.keep(True)

    def scarce(*args, transposed=False, **kwargs):
        if transposed:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(operands_module, "nf4_to_fp8", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        group_operands(group, x)
    assert group.place.arena is None
    monkeypatch.undo()
    group_operands(group, x)
    assert group.place.arena.nbytes == group.arena_bytes(kind.itemsize)


def test_an_adapter_beside_fp8_weights_that_are_all_zero(generator):
    group = _nf4_group([(48, 16)], generator)
    weight = group.linears[0].weight
    weight.absmax.zero_()
    group = dataclasses.replace(group, largest=largest_weight([weight]))
    kind = torch.bfloat16 if generator.device.type == "cuda" else torch.float32
    x, dy, _ = _activations(group, kind, generator)
    ours, truth = (
        _run(group_operands(group, x), group, x, dy),
        _reference(group, x, dy, torch.double),
    )
    for a, b in zip(ours, truth, strict=True):
        assert (a.double() - b).norm() < 0.06 * b.norm()


@pytest.mark.parametrize("sizes", [((96, 5), (32, 3), (32, 4)), ((48, 16),)])
def test_fp8_operands_are_off_by_their_rounding_alone(sizes, generator):
    group = _nf4_group(sizes, generator)
    kind = torch.bfloat16 if generator.device.type == "cuda" else torch.float32
    x, dy, residual = _activations(group, kind, generator)
    operands = group_operands(group, x)
    assert isinstance(operands, Fp8Operands)
    ours, again = _run(operands, group, x, dy), _run(operands, group, x, dy)
    y, dx, *grads = _reference(group, x, dy, torch.float64)
    for a, b in zip(ours[:2], (y, dx), strict=True):
        assert 0.01 < (a.double() - b).norm() / b.norm() < 0.05
    # The adapters' gradients are products in the model's own dtype.
    for a, b in zip(ours[2:], grads, strict=True):
        assert (a.double() - b).norm() < (1e-2 if kind == torch.bfloat16 else 1e-6) * b.norm()
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    x_TKP = augmented_input(TOKENS, group, x)
    x_TKP[:, :INPUTS] = x
    operands.write_lora_columns(x_TKP)
    expected = ours[0] + residual
    operands.forward(x_TKP, residual_TN=residual, out=residual)
    assert torch.equal(residual, expected)
