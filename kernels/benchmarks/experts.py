"""Time the ops of routed experts, and a layer's experts, forward and backward.

    python kernels/benchmarks/experts.py --out experts.csv [--sweep]

The shapes are those of one layer of Qwen3-30B-A3B and Mixtral-8x7B at 8192 tokens, with adapters of
rank 16 on both projections. The routing is that of a random router: the top k of normal scores.
`--sweep` also times the tile shapes of the grouped product. The peer's rows, torch's `_grouped_mm`,
run on rows padded to nothing and to 128 per expert.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.testing import do_bench

from tuneline.kernels.experts import gemm, skinny
from tuneline.kernels.experts import mlp as ops
from tuneline.kernels.experts.activation import (
    ExpertActivation,
    expert_activation_backward,
    expert_activation_forward,
)
from tuneline.kernels.experts.arena import Arena, new_rows
from tuneline.kernels.experts.combine import combine
from tuneline.kernels.experts.route import Routing, route
from tuneline.kernels.experts.stack import (
    ExpertLora,
    ExpertStack,
    LoraPair,
    dequantize_experts,
)
from tuneline.kernels.ops.adamw import dynamic_map

TOKENS, RANK = 8192, 16
SHAPES = {"qwen3-30b-a3b": (128, 8, 2048, 768), "mixtral-8x7b": (8, 2, 4096, 14336)}
"""Experts, experts per token, hidden size and intermediate size."""
SWEEP = [
    # Rows, columns, warps, stages.
    (128, 256, 8, 3), (128, 256, 8, 4), (256, 128, 8, 3), (256, 128, 8, 4), (128, 256, 4, 4),
    (64, 256, 4, 4),
]  # fmt: skip
LEVELS = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
LEVELS += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]


@dataclass
class Case:
    """One layer's experts, its input and its routing."""

    experts: ops.Experts
    x: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor


def main() -> None:
    """Time every op of every shape and write one CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--out", type=Path, default=Path("experts.csv"))
    parser.add_argument("--sweep", action="store_true")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []

    def record(shape: str, op: str, run: Callable[[], Any], *, gbytes=0.0, tflop=0.0) -> None:
        try:
            low, median, high = do_bench(run, warmup=30, rep=150, quantiles=[0.2, 0.5, 0.8])
        except Exception as error:
            print(f"{shape:14} {op:44} {type(error).__name__}: {str(error)[:80]}", flush=True)
            return
        rate = f"{tflop / median * 1e3:7.0f} TFLOP/s" if tflop else f"{gbytes / median:7.2f} TB/s"
        print(f"{shape:14} {op:44} {median:8.3f} ms {rate}", flush=True)
        rows.append(
            {"op": op, "provider": "torch" if "torch" in op else "tuneline", "shape": shape,
             "metric": "time", "unit": "ms", "median": round(median, 4), "p20": round(low, 4),
             "p80": round(high, 4), "tflops": round(tflop / median * 1e3), "tbps": round(
                 gbytes / median, 2), "device": torch.cuda.get_device_name(),
             "versions": f"torch {torch.__version__} triton {triton.__version__}"}
        )  # fmt: skip

    for shape in args.shapes:
        made = case(shape)
        time_ops(shape, made, record)
        time_layer(shape, made, record)
        time_few_tokens(shape, made, record)
        time_products(shape, made, record, sweep=args.sweep)
        del made
        torch.cuda.empty_cache()
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def stack(experts: int, num_out: int, num_in: int) -> ExpertStack:
    """Return random bytes: every bit pattern is a valid NF4 stack."""
    blocks = num_out * num_in // 64

    def byte(*size: int) -> torch.Tensor:
        return torch.randint(0, 256, size, dtype=torch.uint8, device="cuda")

    return ExpertStack(
        byte(experts, num_out * num_in // 2),
        byte(experts, blocks),
        torch.tensor(LEVELS, device="cuda"),
        num_out,
        num_in,
        torch.bfloat16,
        nested_absmax=torch.full((experts, -(-blocks // 256)), 0.02, device="cuda"),
        nested_code=dynamic_map(signed=True).cuda(),
        offset=torch.full((experts,), 0.03, device="cuda"),
    )


def case(shape: str) -> Case:
    """Return random experts, tokens and routing."""
    experts, top_k, hidden, inner = SHAPES[shape]
    torch.manual_seed(0)
    scores, index = torch.randn(TOKENS, experts, device="cuda").topk(top_k)
    pairs = [
        LoraPair(
            torch.randn(experts, RANK, ins, device="cuda").mul_(0.02).requires_grad_(),
            torch.randn(outs, RANK, experts, device="cuda").mul_(0.02)
            .permute(2, 0, 1).requires_grad_(),
            1.0,
        )
        for outs, ins in ((2 * inner, hidden), (hidden, inner))
    ]  # fmt: skip
    return Case(
        ops.Experts(
            stack(experts, 2 * inner, hidden),
            stack(experts, hidden, inner),
            ExpertActivation("silu"),
            ExpertLora(*pairs),
        ),
        torch.randn(TOKENS, hidden, device="cuda").bfloat16().requires_grad_(),
        index,
        scores.softmax(-1).bfloat16().requires_grad_(),
    )


def time_ops(shape: str, made: Case, record: Callable[..., None]) -> None:
    """Time the ops that move memory."""
    experts = made.experts
    gate_up, down = experts.gate_up, experts.down
    hidden, inner, num = down.num_out, down.num_in, gate_up.num_experts
    block = ops.tile_rows(*made.index.shape, num)
    routing = route(made.index, num, block)
    x, weights = made.x.detach(), made.weights.detach()
    rows, giga = routing.num_rows, 1e-9  # A GB per ms is a TB per s.
    record(shape, "route", lambda: route(made.index, num, block))
    record(
        shape,
        "route, torch sort + bincount",
        lambda: (made.index.flatten().sort(stable=True), made.index.flatten().bincount()),
    )
    for name, one in (("gate_up", gate_up), ("down", down)):
        size = num * one.num_out * one.num_in
        arena = x.new_empty(num, *one.stored_shape)
        record(
            shape,
            f"dequantise {name}",
            lambda one=one, out=arena: dequantize_experts(
                one, routing.starts, first=0, last=num, out=out
            ),
            gbytes=size * (2 + 0.516) * giga,
        )
        del arena
        whole = Arena(one, getattr(experts.lora, name), routing, x)
        record(
            shape,
            f"fill arena {name}",
            lambda whole=whole: whole._fill(0, num),
            gbytes=size * (2 + 0.516) * giga,
        )
    pair = experts.lora.gate_up
    x_rows, d_rows = (new_rows(rows, size, RANK, x) for size in (hidden, 2 * inner))
    h_rows = new_rows(rows, inner, RANK, x)
    for buffer in (x_rows, d_rows, h_rows):
        buffer.normal_()
    h, gate_up_rows = h_rows[:, :inner], d_rows[:, : 2 * inner]
    dh = torch.randn_like(h).contiguous()
    p = x.new_empty(rows, RANK)
    a_x = pair.a.detach().bfloat16()
    a_h = experts.lora.down.a.detach().bfloat16()
    sb = pair.b.detach().bfloat16().contiguous().transpose(1, 2)
    gather = {"copy_SI": x_rows[:, :hidden]}
    record(
        shape,
        "project x, gather and copy",
        lambda: skinny.project(x, a_x, routing, p_SR=p, room_SR=x_rows[:, hidden:], **gather),
        gbytes=(rows * hidden * 2 + x.numel() * 2) * giga,
    )
    record(
        shape,
        "gather and copy",
        lambda: skinny.project(x, None, routing, **gather),
        gbytes=(rows * hidden * 2 + x.numel() * 2) * giga,
    )
    record(
        shape,
        "activation forward",
        lambda: expert_activation_forward(gate_up_rows, routing, experts.activation, out=h),
        gbytes=rows * inner * 6 * giga,
    )
    record(
        shape,
        "activation backward",
        lambda: expert_activation_backward(
            dh, gate_up_rows, weights, routing, experts.activation, out=gate_up_rows
        ),
        gbytes=rows * inner * 12 * giga,
    )
    record(
        shape,
        "project h",
        lambda: skinny.project(h, a_h, routing, p_SR=p, room_SR=h_rows[:, inner:]),
        gbytes=rows * inner * 2 * giga,
    )
    record(
        shape,
        "project d_gate_up",
        lambda: skinny.project(gate_up_rows, sb, routing, p_SR=p, room_SR=d_rows[:, 2 * inner :]),
        gbytes=rows * inner * 4 * giga,
    )
    record(
        shape,
        "outer, dA of gate_up",
        lambda: skinny.outer(p, x, routing, rank=RANK, gather=True),
        gbytes=x.numel() * 2 * giga,
    )
    record(
        shape,
        "outer, dB of gate_up",
        lambda: skinny.outer(p, gate_up_rows, routing, rank=RANK, transposed=True),
        gbytes=rows * inner * 4 * giga,
    )
    record(
        shape,
        "outer, dA of down",
        lambda: skinny.outer(p, h, routing, rank=RANK, weights_Tk=weights),
        gbytes=rows * inner * 2 * giga,
    )
    record(
        shape,
        "outer, dB of down",
        lambda: skinny.outer(
            p, x, routing, rank=RANK, gather=True, weights_Tk=weights, transposed=True
        ),
        gbytes=x.numel() * 2 * giga,
    )
    whole_rows = torch.randn(rows, hidden, device="cuda").bfloat16()
    record(
        shape,
        "combine",
        lambda: combine(whole_rows, routing, weights_Tk=weights),
        gbytes=(rows * hidden * 2 + x.numel() * 2) * giga,
    )


def time_layer(shape: str, made: Case, record: Callable[..., None]) -> None:
    """Time the experts of a layer, with routing, forward and with backward."""
    experts = made.experts
    dy = torch.randn_like(made.x)
    for keep in (True, False):
        for lora in (experts.lora, None):
            name = f"keep {keep}, {'LoRA' if lora else 'no LoRA'}"

            def forward(keep=keep, lora=lora) -> torch.Tensor:
                return ops.experts_mlp(
                    made.x, made.index, made.weights, experts.gate_up, experts.down,
                    activation=experts.activation, lora=lora, keep_gate_up=keep,
                )  # fmt: skip

            def both(forward=forward) -> None:
                forward().backward(dy)
                for tensor in (made.x, made.weights, *experts.parameters()):
                    tensor.grad = None

            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            both()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**30
            if keep:
                record(shape, f"experts forward, {name}", forward)
            record(shape, f"experts both, {name}, {peak:.2f} GiB", both)


def time_few_tokens(shape: str, made: Case, record: Callable[..., None]) -> None:
    """Time a layer's experts for few tokens, in tiles of few and of many rows."""
    experts, rows = made.experts, ops.tile_rows
    for tokens in (64, 256, 512, 1024, 2048):
        x = made.x.detach()[:tokens].clone().requires_grad_()
        dy, weights = torch.randn_like(x), made.weights.detach()[:tokens]

        def both(x=x, dy=dy, weights=weights, tokens=tokens) -> None:
            ops.experts_mlp(
                x, made.index[:tokens], weights, experts.gate_up, experts.down,
                activation=experts.activation, lora=experts.lora,
            ).backward(dy)  # fmt: skip
            for tensor in (x, *experts.parameters()):
                tensor.grad = None

        for block in (16, 64, 128):
            ops.tile_rows = lambda *_, block=block: block
            record(shape, f"experts both, {tokens} tokens, tiles of {block}", both)
    ops.tile_rows = rows


def time_products(shape: str, made: Case, record: Callable[..., None], *, sweep: bool) -> None:
    """Time the grouped products of both projections in both directions."""
    for name, one in (("gate_up", made.experts.gate_up), ("down", made.experts.down)):
        arena = torch.randn(one.num_experts, *one.stored_shape, device="cuda").bfloat16()
        for oi in (True, False):
            label = f"{name} {'forward' if oi else 'dX'}"
            time_product(shape, label, arena, made.index, oi, record, sweep=sweep)


def time_product(
    shape: str,
    label: str,
    arena: torch.Tensor,
    index: torch.Tensor,
    oi: bool,
    record: Callable[..., None],
    *,
    sweep: bool,
) -> None:
    """Time one grouped product with and without the adapter, and torch's."""
    num = arena.shape[0]
    ins, outs = (arena.shape[2], arena.shape[1]) if oi else arena.shape[1:]
    routing = route(index, num, ops.tile_rows(*index.shape, num))
    rows = routing.num_rows
    x_side = new_rows(rows, ins, RANK, arena).normal_()
    x = torch.randn(rows, ins, device="cuda").bfloat16()
    out = x.new_empty(rows, outs)
    # As in an arena: 16 more rows, and 64 more columns, of which 16 are read.
    with_side = torch.nn.functional.pad(arena, (0, 64, 0, RANK))
    tflop = 2 * rows * ins * outs / 1e12

    def ours(routing: Routing = routing, lora: bool = True) -> None:
        operands = (x_side, with_side) if lora else (x, arena)
        gemm.grouped_mm(*operands, routing, stored_oi=oi, out=out)

    record(shape, f"grouped {label}", ours, tflop=tflop)
    record(shape, f"grouped {label}, no LoRA", lambda: ours(lora=False), tflop=tflop)
    weight, ends = arena.transpose(1, 2) if oi else arena, routing.starts[1:]
    record(
        shape,
        f"torch._grouped_mm {label}",
        lambda: torch._grouped_mm(x, weight, offs=ends),
        tflop=tflop,
    )
    padded_ends = ((routing.starts.diff() + 127) // 128 * 128).cumsum(0).int()
    padded = torch.randn(int(padded_ends[-1]), ins, device="cuda").bfloat16()
    record(
        shape,
        f"torch._grouped_mm {label}, padded to 128",
        lambda: torch._grouped_mm(padded, weight, offs=padded_ends),
        tflop=tflop,
    )
    if sweep:
        chosen = gemm._shape
        for block_m, *rest in SWEEP:
            gemm._shape = lambda *_, rest=rest: rest
            tiles = route(index, num, block_m)
            name = "x".join(str(size) for size in (block_m, *rest))
            record(shape, f"sweep {label} {name}", lambda t=tiles: ours(t), tflop=tflop)
        gemm._shape = chosen


if __name__ == "__main__":
    main()
