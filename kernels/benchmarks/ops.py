"""Time each op against its floor and its peers: `python kernels/benchmarks/ops.py --out ops.csv`.

The floor of a memory-bound op is its bytes (each input read once, each output written once) over
the copy bandwidth measured in the same run. Shapes are Llama-3.1-8B's at 8192 tokens. Short ops
are timed in replayed CUDA graphs over rotating copies larger than the L2 cache. Peers: torch
eager, torch.compile, and bitsandbytes and Liger-Kernel where they can be imported. `--sweep` also
times launch variants.
"""

import argparse
import csv
import itertools
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tuneline.kernels import NF4Weight, dequantize_nf4  # noqa: E402

OPS = {
    name: import_module(f"tuneline.kernels.ops.{name}")
    for name in ("nf4", "rms_norm", "rope", "gated_activation", "cross_entropy", "adamw")
}
T, K, F, V, HQ, HK, D = 8192, 4096, 14336, 128256, 32, 8, 128
COLUMNS = ["op", "provider", "mode", "metric", "unit", "shape", "median", "p20", "p80", "device"]
NF4_LEVELS = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip


class Table:
    """Table of results, which prints its rows and holds the copy bandwidth."""

    def __init__(self, path: Path):
        self.path, self.rows, self.bandwidth = path, [], 0.0
        self.device = torch.cuda.get_device_name()

    def time(
        self,
        op: str,
        provider: str,
        mode: str,
        shape: str,
        calls: list[Callable[[], object]],
        num_bytes: int = 0,
        flops: int = 0,
        graph: bool = True,
    ) -> float:
        """Time calls in turn, record microseconds per call, and return the median."""
        try:
            times = _graph_times(calls) if graph else _event_times(calls)
        except Exception as error:  # A peer that fails must not end the run.
            print(f"{op:18} {provider:14} {mode:16} FAILED {type(error).__name__}: {error}"[:300])
            return float("nan")
        median, p20, p80 = times
        us = [1e3 * t for t in (median, p20, p80)]
        self.rows.append([op, provider, mode, "time", "us", shape, *(f"{t:.1f}" for t in us)])
        line = f"{op:18} {provider:14} {mode:16} {us[0]:9.1f} us [{us[1]:.1f} {us[2]:.1f}]"
        if num_bytes:
            rate = num_bytes / us[0] / 1e6
            row = [op, provider, mode, "bandwidth", "TB/s", shape, f"{rate:.3f}", "", ""]
            self.rows.append(row)
            line += f" {rate:6.2f} TB/s"
            if self.bandwidth:
                line += f" {rate / self.bandwidth:5.0%} of copy"
        if flops:
            line += f" {flops / us[0] / 1e6:6.0f} TFLOP/s"
        print(line, flush=True)
        return us[0]

    def check(self, op: str, mode: str, error: float, allowed: float) -> None:
        """Record a relative error against float64, and print whether it is within the limit."""
        self.rows.append([op, "tuneline", mode, "error", "relative", "", f"{error:.3e}", "", ""])
        verdict = "ok" if error <= allowed else "WRONG"
        numbers = f"{error:.3e} <= {allowed:.3e}"
        print(f"{op:18} check          {mode:16} {numbers} {verdict}", flush=True)

    def save(self) -> None:
        """Write the CSV."""
        versions = f"torch {torch.__version__} triton {triton.__version__}"
        with self.path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*COLUMNS, "versions"])
            writer.writerows([*row, self.device, versions] for row in self.rows)


def _event_times(calls: list[Callable[[], object]]) -> list[float]:
    """Return the median, p20 and p80 in ms, including the time of launches from Python."""
    turn = itertools.cycle(calls)
    p20, median, p80 = triton.testing.do_bench(
        lambda: next(turn)(), warmup=20, rep=100, quantiles=[0.2, 0.5, 0.8]
    )
    return [median, p20, p80]


def _graph_times(calls: list[Callable[[], object]], num_replays: int = 15) -> list[float]:
    """Return the median, p20 and p80 in ms of a call in a replayed CUDA graph.

    The graph holds about 12 calls, each with its own inputs and outputs. There are no launch gaps,
    and the L2 cache holds nothing that it would not hold in a training step.
    """
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    num_calls = len(calls) * -(-12 // len(calls))
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for i in range(num_calls):
            kept.append(calls[i % len(calls)]())
    times = []
    for _ in range(num_replays + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    values = torch.tensor([a.elapsed_time(b) / num_calls for a, b in times[3:]])
    del graph, kept
    torch.cuda.empty_cache()
    return values.quantile(torch.tensor([0.5, 0.2, 0.8])).tolist()


def _error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    return ((actual.double() - truth).norm() / truth.norm()).item()


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _copies(make: Callable[[], object], num_copies: int = 3) -> list:
    return [make() for _ in range(num_copies)]


def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def bench_copy(table: Table) -> None:
    """Measure the ceilings: a device-to-device copy, counting bytes read and written, and a fill.

    Not in a graph: there a copy is a memcpy node, which runs slower than the copy kernel.
    """
    source, target = _randn(2**30), _randn(2**30)
    copy, fill = [lambda: target.copy_(source)], [lambda: target.fill_(1.0)]
    us = table.time("copy", "torch", "-", "2 GiB", copy, 2**32, 0, False)
    table.bandwidth = 2**32 / us / 1e6
    table.time("fill", "torch", "-", "2 GiB", fill, 2**31, 0, False)
    small = [lambda t=t: t.fill_(1.0) for t in _copies(lambda: _randn(F, K + 64))]
    table.time("fill", "torch", "-", f"{F}x{K + 64}", small, F * (K + 64) * 2)


def _nf4(N: int, K: int) -> NF4Weight:
    return NF4Weight(
        packed=torch.randint(0, 256, (N * K // 2,), dtype=torch.uint8, device="cuda"),
        absmax=torch.randint(0, 256, (N * K // 64,), dtype=torch.uint8, device="cuda"),
        code=torch.tensor(NF4_LEVELS, device="cuda"),
        shape=(N, K),
        dtype=torch.bfloat16,
        nested_absmax=torch.rand(-(-N * K // 64 // 256), device="cuda"),
        nested_code=OPS["adamw"].dynamic_map(signed=True).cuda(),
        offset=torch.tensor(0.03, device="cuda"),
    )


def bench_nf4(table: Table, sweep: bool) -> None:
    """Time dequantisation, alone and with LoRA columns, rows; compare bits with the reference."""
    nf4 = OPS["nf4"]
    for N, k in ((F, K), (K, F), (1024, K)):
        weights = _copies(lambda N=N, k=k: _nf4(N, k))
        b, a = torch.randn(N, 16, device="cuda"), torch.randn(16, k, device="cuda")
        modes = {
            "plain": {},
            "columns": dict(lora_b=b, lora_scale=2.0, lora_column=16),
            "rows": dict(lora_a=a),
        }
        for mode, side in modes.items():
            outs = [dequantize_nf4(w, **side).fill_(float("nan")) for w in weights]
            for w, out in zip(weights, outs, strict=True):
                dequantize_nf4(w, out=out, **side)
                differ = (out != nf4.dequantize_nf4_reference(w, **side)).sum().item()
                table.check("nf4", f"{mode} bits", differ, 0)
            calls = [
                lambda w=w, out=out, side=side: dequantize_nf4(w, out=out, **side)
                for w, out in zip(weights, outs, strict=True)
            ]
            size = outs[0].numel() * 2 + N * k // 2 + N * k // 64
            table.time("nf4", "tuneline", mode, f"{N}x{k}", calls, size)
            if sweep and mode == "columns" and N == F:
                keep = nf4._BLOCK_WORDS, nf4._NUM_WARPS
                for block, warps in itertools.product((256, 512, 1024), (2, 4, 8)):
                    nf4._BLOCK_WORDS, nf4._NUM_WARPS = block, warps
                    table.time("nf4", f"w{block}/{warps}", mode, f"{N}x{k}", calls, size)
                nf4._BLOCK_WORDS, nf4._NUM_WARPS = keep
        try:
            import bitsandbytes.functional as bnb
        except ImportError:
            continue
        for w in weights:
            nested = bnb.QuantState(w.nested_absmax, code=w.nested_code, blocksize=256)
            nested.dtype = torch.float32
            state = bnb.QuantState(
                w.absmax, shape=torch.Size(w.shape), code=w.code, blocksize=64, quant_type="nf4",
                dtype=w.dtype, offset=w.offset, state2=nested,
            )  # fmt: skip
            packed = w.packed.view(-1, 1)
            differ = (bnb.dequantize_4bit(packed, state) != dequantize_nf4(w)).sum().item()
            table.check("nf4", "bitsandbytes bits", differ, 0)
        table.time(
            "nf4", "bitsandbytes", "plain", f"{N}x{k}",
            [lambda packed=packed, state=state: bnb.dequantize_4bit(packed, state)],
            N * k * 2 + N * k // 2 + N * k // 64,
        )  # fmt: skip


def bench_rms_norm(table: Table, sweep: bool) -> None:
    """Time the norm with and without residual, forward and backward."""
    op = OPS["rms_norm"]
    sets = _copies(lambda: (_randn(T, K), _randn(T, K), _randn(T, K), _randn(T, K)))
    weight, size = _randn(K), T * K * 2
    x, residual, dy, ds = sets[0]
    y, s, rstd = op.rms_norm_forward(x, weight, 1e-5, residual=residual)
    dx, _ = op.rms_norm_backward(dy, s, weight, rstd, gemma=False, dresidual=ds)
    wide = [t[:256].double() for t in (x, residual, dy, ds)]
    fn = lambda a, r, w: (op.rms_norm_reference(a + r, w, 1e-5), a + r)  # noqa: E731
    truth, vjp = torch.func.vjp(lambda a: fn(a, wide[1], weight.double()), wide[0])
    stock, stock_vjp = torch.func.vjp(lambda a: fn(a, residual[:256], weight), x[:256])
    table.check("rms_norm", "forward", _error(y[:256], truth[0]), 1.01 * _error(stock[0], truth[0]))
    grad, stock_grad = vjp((wide[2], wide[3]))[0], stock_vjp((dy[:256], ds[:256]))[0]
    table.check("rms_norm", "backward", _error(dx[:256], grad), 1.01 * _error(stock_grad, grad))
    wide_out = torch.empty(T, K + 64, device="cuda", dtype=torch.bfloat16)
    fwd = [lambda a=a: op.rms_norm_forward(a[0], weight, 1e-5) for a in sets]
    out = [lambda a=a: op.rms_norm_forward(a[0], weight, 1e-5, out=wide_out[:, :K]) for a in sets]
    fwd_res = [lambda a=a: op.rms_norm_forward(a[0], weight, 1e-5, residual=a[1]) for a in sets]
    bwd = [
        lambda a=a: op.rms_norm_backward(a[2], a[0], weight, rstd, gemma=False, dresidual=a[3])
        for a in sets
    ]
    bwd_w = [
        lambda a=a: op.rms_norm_backward(a[2], a[0], weight, rstd, gemma=False, need_dweight=True)
        for a in sets
    ]
    shape = f"{T}x{K}"
    table.time("rms_norm", "tuneline", "forward", shape, fwd, 2 * size)
    table.time("rms_norm", "tuneline", "forward, wide", shape, out, 2 * size)
    table.time("rms_norm", "tuneline", "forward+res", shape, fwd_res, 4 * size)
    table.time("rms_norm", "tuneline", "backward+res", shape, bwd, 4 * size)
    table.time("rms_norm", "tuneline", "backward+dw", shape, bwd_w, 3 * size)
    if sweep:
        keep = op._COLS_PER_WARP
        for warps in (2, 4, 8, 16):
            op._COLS_PER_WARP = K // warps
            table.time("rms_norm", f"w{warps}", "forward+res", shape, fwd_res, 4 * size)
            table.time("rms_norm", f"w{warps}", "backward+res", shape, bwd, 4 * size)
        op._COLS_PER_WARP = keep
    eager = [lambda a=a: fn(a[0], a[1], weight) for a in sets]
    table.time("rms_norm", "eager", "forward+res", shape, eager, 4 * size)
    compiled = _compiled(fn)
    inductor = [lambda a=a: compiled(a[0], a[1], weight) for a in sets]
    table.time("rms_norm", "torch.compile", "forward+res", shape, inductor, 4 * size)


def bench_rope(table: Table, sweep: bool) -> None:
    """Time rope on slices of a fused projection, with and without the head norm."""
    op = OPS["rope"]
    sets = _copies(lambda: _randn(4, T // 4, HQ + 2 * HK, D))
    angle = torch.rand(1, T // 4, D // 2, device="cuda") * 6
    cos = torch.cat([angle.cos()] * 2, -1).bfloat16()
    sin = torch.cat([angle.sin()] * 2, -1).bfloat16()
    weights = dict(q_weight=_randn(D), k_weight=_randn(D))
    size = T * (HQ + HK) * D * 2
    split = [(s[:, :, :HQ], s[:, :, HQ : HQ + HK]) for s in sets]
    for mode, kw in (("plain", {}), ("head norm", weights)):
        q, k = (t[:1, :64] for t in split[0])
        args = (cos[:, :64], sin[:, :64])
        ours = op.rope_forward(q, k, *args, **kw)
        kw64 = {n: w.double() for n, w in kw.items()}
        truth = op.rope_reference(q.double(), k.double(), *(t.double() for t in args), **kw64)
        stock = op.rope_reference(q, k, *args, **kw)
        bound = 1.01 * _error(stock[0], truth[0])
        table.check("rope", mode, _error(ours[0], truth[0]), bound)
        calls = [lambda a=a, kw=kw: op.rope_forward(*a, cos, sin, **kw) for a in split]
        table.time("rope", "tuneline", mode, f"{T}x{HQ}+{HK}x{D}", calls, 2 * size)
        back = [
            lambda a=a, b=b, kw=kw: op.rope_backward(*b, cos, sin, q=a[0], k=a[1], **kw)
            for a, b in zip(split, split[1:] + split[:1], strict=True)
        ]
        passes = 3 if kw else 2
        table.time("rope", "tuneline", f"{mode} bwd", f"{T}x{HQ}+{HK}x{D}", back, passes * size)
    calls = [lambda a=a: op.rope_forward(*a, cos, sin, out=a) for a in split]
    table.time("rope", "tuneline", "in place", f"{T}x{HQ}+{HK}x{D}", calls, 2 * size)
    if sweep:
        for warps in (1, 2, 4, 8):
            op._ELEMENTS_PER_WARP = HQ * D // 2 // warps
            table.time("rope", f"w{warps}", "in place", f"{T}x{HQ}+{HK}x{D}", calls, 2 * size)
        op._ELEMENTS_PER_WARP = 512
    compiled = _compiled(op.rope_reference)
    inductor = [lambda a=a: compiled(*a, cos, sin) for a in split]
    table.time("rope", "torch.compile", "plain", f"{T}x{HQ}+{HK}x{D}", inductor, 2 * size)


def bench_gated_activation(table: Table, sweep: bool) -> None:
    """Time SwiGLU and GeGLU, forward and backward in place."""
    op = OPS["gated_activation"]
    sets = _copies(lambda: (_randn(T, 2 * F), _randn(T, F)), 2)
    size, shape = T * F * 2, f"{T}x{F}"
    for kind in ("silu", "gelu_tanh"):
        part, dh = (t[:128] for t in sets[0])
        h = op.gated_activation_forward(part, kind)
        truth, vjp = torch.func.vjp(
            lambda t, kind=kind: op.gated_activation_reference(t, kind), part.double()
        )
        table.check("gated_activation", f"{kind} fwd", _error(h, truth), 1.25 * 2**-9)
        grad, _ = op.gated_activation_backward(dh, part, kind)
        error = _error(grad, vjp(dh.double())[0])
        table.check("gated_activation", f"{kind} bwd", error, 1.25 * 2**-9)
        fwd = [lambda a=a, kind=kind: op.gated_activation_forward(a[0], kind) for a in sets]
        table.time("gated_activation", "tuneline", f"{kind} fwd", shape, fwd, 3 * size)
        for need_h in (False, True):
            # Not in place: repeated in-place calls would diverge to infinity.
            bwd = [
                lambda a=a, kind=kind, h=need_h: op.gated_activation_backward(
                    a[1], a[0], kind, need_h=h
                )
                for a in sets
            ]
            mode = f"{kind} bwd" + (" + h" if need_h else "")
            passes = 6 if need_h else 5
            table.time("gated_activation", "tuneline", mode, shape, bwd, passes * size)
            if sweep and kind == "silu" and not need_h:
                for block, warps in ((512, 2), (1024, 2), (1024, 4), (2048, 4), (2048, 8)):
                    op._BLOCK, op._NUM_WARPS = block, warps
                    name = f"b{block}/w{warps}"
                    table.time("gated_activation", name, "silu fwd", shape, fwd, 3 * size)
                    table.time("gated_activation", name, "silu bwd", shape, bwd, 5 * size)
                op._BLOCK, op._NUM_WARPS = 1024, 4
    eager = [lambda a=a: torch.nn.functional.silu(a[0][:, :F]) * a[0][:, F:] for a in sets]
    table.time("gated_activation", "eager", "silu fwd", shape, eager, 3 * size)


def bench_cross_entropy(table: Table, sweep: bool) -> None:
    """Time the chunked loss at several chunk sizes; the head GEMMs are the floor."""
    op = OPS["cross_entropy"]
    hidden, weight = _randn(T, K), _randn(V, K) * 0.02
    labels = torch.randint(0, V, (T,), device="cuda")
    labels[::7] = -100
    leaf = hidden.requires_grad_()

    def ours(chunk: int | None = None, softcap: float | None = None) -> None:
        leaf.grad = None
        op.linear_cross_entropy(
            leaf, weight, labels, chunk_tokens=chunk, softcap=softcap
        ).backward()

    part = hidden.detach()[:256].double().requires_grad_()
    few = labels[:256]
    for cap in (None, 30.0):
        truth = op.linear_cross_entropy_reference(part, weight.double(), few, softcap=cap)
        (truth_grad,) = torch.autograd.grad(truth, part)
        small = hidden.detach()[:256].requires_grad_()
        loss = op.linear_cross_entropy(small, weight, few, softcap=cap)
        (grad,) = torch.autograd.grad(loss, small)
        stock = op.linear_cross_entropy_reference(small, weight, few, softcap=cap)
        (stock_grad,) = torch.autograd.grad(stock, small)
        table.check("cross_entropy", f"grad cap={cap}", _error(grad, truth_grad), max(
            1.25 * 2**-9, 1.01 * _error(stock_grad, truth_grad)))  # fmt: skip
        table.check("cross_entropy", f"loss cap={cap}", _error(loss, truth), 1e-4)
    flops = 4 * T * K * V
    chunks = (256, 512, 2048) if sweep else ()
    for chunk in (None, *chunks):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        mode = f"fwd+bwd {chunk or ''}"
        call = [lambda c=chunk: ours(c)]
        table.time("cross_entropy", "tuneline", mode, f"{T}x{V}", call, 0, flops, False)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        row = ["cross_entropy", "tuneline", mode, "peak", "MiB", f"{T}x{V}", f"{peak:.0f}", "", ""]
        table.rows.append(row)
        print(f"    peak {peak:.0f} MiB")
    call = [lambda: ours(None, 30.0)]
    table.time("cross_entropy", "tuneline", "softcap", f"{T}x{V}", call, 0, flops, False)
    logits = _randn(1024, V)
    for block, warps in ((8192, 16), (16384, 32)) if sweep else ((8192, 16),):
        op._BLOCK, op._NUM_WARPS = block, warps
        call = [lambda z=logits: op._log_probs_(z, labels[:1024], -100, None, True)]
        name = f"b{block}/w{warps}"
        table.time("log_probs kernel", name, "1024 rows", f"1024x{V}", call, 3 * 1024 * V * 2)
    op._BLOCK, op._NUM_WARPS = 8192, 16
    del logits
    buffer = torch.empty(1024, V, device="cuda", dtype=torch.bfloat16)

    def gemms() -> None:
        for start in range(0, T, 1024):
            torch.mm(hidden.detach()[start : start + 1024], weight.T, out=buffer)
            torch.mm(buffer, weight)

    table.time("cross_entropy", "GEMMs alone", "fwd+bwd", f"{T}x{V}", [gemms], 0, flops, False)
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyFunction as Liger,
        )
    except ImportError:
        return

    def liger() -> None:
        leaf.grad = None
        out = Liger.apply(leaf, weight, labels)
        (out[0] if isinstance(out, tuple) else out).backward()

    table.time("cross_entropy", "liger", "fwd+bwd", f"{T}x{V}", [liger], 0, flops, False)


def bench_adamw(table: Table, sweep: bool) -> None:
    """Time the step of Llama-3.1-8B's 448 LoRA tensors at rank 16."""
    op = OPS["adamw"]
    sizes = [(K, K), (K, 1024), (K, 1024), (K, K), (K, F), (K, F), (F, K)]
    shapes = [s for i, o in sizes for s in ((16, i), (o, 16))] * 32
    for bits in (32, 8):
        params = [torch.randn(s, device="cuda").requires_grad_() for s in shapes]
        optimizer = op.FlatAdamW(params, lr=1e-4, state_bits=bits, max_grad_norm=1.0)
        flat = optimizer._flats[0]
        grad = torch.randn_like(flat.p)
        for p in params:
            p.grad = torch.randn_like(p)
        group = optimizer.param_groups[0]

        def kernels(optimizer=optimizer, flat=flat, group=group, grad=grad) -> None:
            group["step"] += 1
            optimizer._step_group(group, flat, grad, op._partial_squares([grad]))

        size = flat.p.numel() * (4 + 12 + (16 if bits == 32 else 4))
        shape = f"{flat.p.numel()} in {len(params)}"
        table.time("adamw", "tuneline", f"{bits}-bit kernels", shape, [kernels], size)
        step = [optimizer.step]
        table.time("adamw", "tuneline", f"{bits}-bit step()", shape, step, size, 0, False)
    clip = [lambda: op.clip_grad_norm_flat_(grad, 1.0)]
    table.time("clip", "tuneline", "-", shape, clip, flat.p.numel() * 12)
    params = [torch.randn(s, device="cuda").requires_grad_() for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    fused = torch.optim.AdamW(params, lr=1e-4, fused=True)

    def stock() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        fused.step()

    table.time("adamw", "torch fused", "32-bit step()", shape, [stock], size, 0, False)


def main() -> None:
    """Run the benchmarks named on the command line, all by default."""
    benches = {
        "nf4": bench_nf4,
        "rms_norm": bench_rms_norm,
        "rope": bench_rope,
        "gated_activation": bench_gated_activation,
        "cross_entropy": bench_cross_entropy,
        "adamw": bench_adamw,
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", default=list(benches), help=f"of {', '.join(benches)}")
    parser.add_argument("--out", type=Path, default=Path("ops.csv"), help="CSV file to write")
    parser.add_argument("--sweep", action="store_true", help="also time launch variants")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch._inductor")
    torch.manual_seed(0)
    table = Table(args.out)
    bench_copy(table)
    for name in args.ops:
        torch.cuda.empty_cache()
        benches[name](table, args.sweep)
        table.save()


if __name__ == "__main__":
    main()
