"""Routed experts in NF4: the hand-written forward and backward against autograd in float64."""

from dataclasses import replace

import pytest
import torch

from tuneline.kernels.experts import arena
from tuneline.kernels.experts.activation import ExpertActivation
from tuneline.kernels.experts.mlp import experts_mlp, experts_mlp_reference
from tuneline.kernels.experts.route import route, route_reference
from tuneline.kernels.experts.stack import ExpertLora, ExpertStack, LoraPair, dequantize_experts
from tuneline.kernels.ops.adamw import dynamic_map
from tuneline.kernels.ops.nf4 import NF4Weight, dequantize_nf4

E, H, F, K, RANK = 5, 64, 32, 2, 4
CODE = [-1.0, -0.69, -0.52, -0.39, -0.28, -0.18, -0.09, 0.0]
CODE += [0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1.0]


def stack(
    num_out, num_in, dtype, generator, *, transposed=False, bias=False, nested=True, experts=E
):
    """Return random bytes with a small scale: every bit pattern is a valid NF4 stack."""
    E = experts
    device, blocks = generator.device, num_out * num_in // 64
    rand = lambda *size: torch.rand(size, generator=generator, device=device)  # noqa: E731

    def byte(*size):
        return (rand(*size) * 256).to(torch.uint8)

    result = ExpertStack(
        byte(E, num_out * num_in // 2),
        rand(E, blocks) * 0.1,
        torch.tensor(CODE, device=device),
        num_out,
        num_in,
        dtype,
        transposed=transposed,
        bias=(rand(E, num_out) - 0.5).to(dtype) if bias else None,
    )
    if not nested:
        return result
    return replace(
        result,
        absmax=byte(E, blocks),
        nested_absmax=rand(E, -(-blocks // 256)) * 0.05,
        nested_code=dynamic_map(signed=True).to(device),
        offset=rand(E) * 0.2,
    )


def case(
    dtype, generator, *, tokens=37, rank=RANK, activation="silu", transposed=False, bias=False,
    sizes=(E, H, F),
):  # fmt: skip
    """Return x, index, weights, the two stacks and the adapters, leaves that require gradients."""
    device, (E, H, F) = generator.device, sizes
    randn = lambda *size: torch.randn(size, generator=generator, device=device)  # noqa: E731
    x = randn(tokens, H).to(dtype).requires_grad_()
    index = torch.rand(tokens, E, generator=generator, device=device).topk(K).indices
    weights = torch.rand(tokens, K, generator=generator, device=device).to(dtype).requires_grad_()
    options = {"transposed": transposed, "bias": bias, "experts": E}
    gate_up = stack(2 * F, H, dtype, generator, **options)
    down = stack(H, F, dtype, generator, **options)
    pairs = [
        LoraPair(
            (randn(E, rank, ins) / 8).requires_grad_(),
            # peft stores B as [out, r, E].
            (randn(outs, rank, E) / 4).permute(2, 0, 1).requires_grad_(),
            0.5,
        )
        for outs, ins in ((2 * F, H), (H, F))
    ]
    return (x, index, weights, gate_up, down), {
        "activation": ExpertActivation(activation),
        "lora": ExpertLora(*pairs) if rank else None,
    }


def leaves(arguments, options):
    x, _, weights, *_ = arguments
    lora = options["lora"]
    pairs = [] if lora is None else [lora.gate_up, lora.down]
    return [x, weights, *(t for pair in pairs if pair is not None for t in (pair.a, pair.b))]


def exact(arguments, options):
    """Return y and the gradients in float64, of the same quantised weights."""
    x, index, weights, gate_up, down = arguments
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, weights))
    lora = options["lora"]
    if lora is not None:
        lora = ExpertLora(
            *(
                pair
                and LoraPair(
                    pair.a.detach().double().requires_grad_(),
                    pair.b.detach().double().requires_grad_(),
                    pair.scaling,
                )
                for pair in (lora.gate_up, lora.down)
            )
        )
    arguments64, options64 = (x64, index, w64, gate_up, down), {**options, "lora": lora}
    y = experts_mlp_reference(*arguments64, **options64)
    return y, arguments64, options64


def check(arguments, options, *, keep_gate_up=True, tolerance=None):
    y64, arguments64, options64 = exact(arguments, options)
    y = experts_mlp(*arguments, **options, keep_gate_up=keep_gate_up)
    dy = torch.randn(y.shape, device=y.device, dtype=torch.float64)
    grads64 = torch.autograd.grad(y64, leaves(arguments64, options64), dy)
    grads = torch.autograd.grad(y, leaves(arguments, options), dy.to(y.dtype))
    for actual, truth in zip([y, *grads], [y64, *grads64], strict=True):
        assert actual.shape == truth.shape
        error = (actual.double() - truth).norm() / truth.norm()
        assert error < (tolerance or (1e-5 if y.dtype == torch.float32 else 1.5e-2))


ACTIVATIONS = ["silu", "gelu_tanh", "clamped_swiglu"]


@pytest.mark.parametrize("keep_gate_up", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_path_gives_the_gradients_of_float64(
    activation, keep_gate_up, references, generator
):
    oss = activation == "clamped_swiglu"
    arguments, options = case(
        torch.float32, generator, activation=activation, transposed=oss, bias=oss
    )
    check(arguments, options, keep_gate_up=keep_gate_up)


def test_reference_path_in_bfloat16(references, generator, poisoned):
    arguments, options = case(torch.bfloat16, generator, tokens=90, rank=16)
    check(arguments, options, keep_gate_up=False)


@pytest.mark.parametrize("keep_gate_up", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernels_give_the_gradients_of_float64(
    activation, keep_gate_up, dtype, generator, poisoned
):
    oss = activation == "clamped_swiglu"
    arguments, options = case(dtype, generator, activation=activation, transposed=oss, bias=oss)
    check(arguments, options, keep_gate_up=keep_gate_up)


def test_chunks_of_experts_give_the_same_bits(dtype, generator, monkeypatch, poisoned):
    arguments, options = case(dtype, generator)
    results = []
    for limit in (2**31, 3 * 2 * F * H * dtype.itemsize):
        monkeypatch.setattr(arena, "ARENA_BYTES", limit)
        y = experts_mlp(*arguments, **options)
        results.append([y, *torch.autograd.grad(y.sum(), leaves(arguments, options))])
    for whole, chunked in zip(*results, strict=True):
        assert torch.equal(whole, chunked)


def test_a_dropped_choice_adds_nothing(dtype, generator, poisoned):
    arguments, options = case(dtype, generator, activation="clamped_swiglu", bias=True)
    x, index, weights, *stacks = arguments
    index = index.clone()
    index[3], index[5, 1], index[7, 0] = E, -1, E + 3
    check((x, index, weights, *stacks), options)
    y = experts_mlp(x, index, weights, *stacks, **options)
    (dw,) = torch.autograd.grad(y.sum(), weights)
    assert not y[3].any() and not dw[3].any() and not dw[5, 1] and not dw[7, 0]


@pytest.mark.parametrize("without", ["all", "gate_up", "down"])
def test_a_projection_may_have_no_adapter(without, dtype, generator, poisoned):
    arguments, options = case(dtype, generator)
    lora = ExpertLora() if without == "all" else replace(options["lora"], **{without: None})
    check(arguments, {**options, "lora": lora}, keep_gate_up=False)


@pytest.mark.parametrize("tokens", [1, 37, 700])
def test_routing_is_a_stable_sort(tokens, generator):
    device = generator.device
    index = torch.randint(-1, 14, (tokens, 3), generator=generator, device=device)
    index[:, 1] = 11  # One expert with many rows, and some with none.
    ours, reference = route(index, 13, 16), route_reference(index, 13, 16)
    rows = int(reference.starts[-1])
    tiles = int(reference.tile_starts[-1])
    assert torch.equal(ours.slot_of_row[:rows], reference.slot_of_row[:rows])
    assert torch.equal(ours.row_of_slot, reference.row_of_slot)
    assert torch.equal(ours.starts, reference.starts)
    assert torch.equal(ours.tile_starts, reference.tile_starts)
    assert torch.equal(ours.expert_of_tile[:tiles], reference.expert_of_tile[:tiles])
    assert tiles <= ours.max_tiles


@pytest.mark.parametrize("nested", [True, False])
def test_dequantised_bits_are_those_of_each_expert_alone(nested, dtype, device, generator):
    one = stack(2 * F, H, dtype, generator, nested=nested)
    starts = torch.tensor([0, 2, 2, 3, 4, 5], dtype=torch.int32, device=device)
    out = torch.full((E, 2 * F + 16, H + 64), float("nan"), dtype=dtype, device=device)
    dequantize_experts(one, starts, first=0, last=E, out=out[:, : 2 * F, :H])
    for expert in (0, 2, 3, 4):
        alone = NF4Weight(
            one.packed[expert], one.absmax[expert], one.code, (2 * F, H), dtype,
            one.nested_absmax[expert] if nested else None, one.nested_code if nested else None,
            one.offset[expert] if nested else None,
        )  # fmt: skip
        assert torch.equal(out[expert, : 2 * F, :H], dequantize_nf4(alone))
    # No row goes to expert 1.
    assert out[1].isnan().all() and out[:, 2 * F :].isnan().all() and out[:, :, H:].isnan().all()


def test_a_stack_whose_blocks_cross_experts_is_refused(generator):
    with pytest.raises(ValueError, match="a multiple of 64"):
        stack(12, 8, torch.float32, generator)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [150, 1100])
@pytest.mark.parametrize("activation", ["silu", "clamped_swiglu"])
def test_many_rows(tokens, activation, dtype, generator, poisoned):
    oss = activation == "clamped_swiglu"
    arguments, options = case(
        dtype, generator, tokens=tokens, activation=activation, transposed=oss, bias=oss,
        sizes=(8, 384, 192), rank=16,
    )  # fmt: skip
    tolerance = 1.5e-2 if dtype == torch.bfloat16 else 2e-3
    check(arguments, options, keep_gate_up=False, tolerance=tolerance)
