"""Time attention's backends: `python kernels/benchmarks/attention.py --out attention.csv`.

Cases: rows with GSM8K's lengths packed to 8192 tokens and dense rows of Llama-3.1-8B (32 + 8 heads
of 128), Gemma-2-9B's softcap (16 + 8 heads of 256), Phi-3.5's heads of 96. Providers: flash.py, and
torch's backends (aten's flash and cuDNN's). Times are those of replayed graphs, errors are against
float64. `--sweep` also times other tile shapes of flash.py.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from ops import Table, _error
from packed import make_rows

from tuneline.kernels.ops import attention, flash
from tuneline.kernels.ops.attention import AttentionConfig, AttentionPlan

TOKENS = 8192
SCALE = 128**-0.5
TILES = [
    flash.Blocks(rows, keys, warps, stages)
    for rows, keys, warps, stages in (
        (64, 32, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 4, 3), (128, 64, 4, 2),
        (128, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 128, 4, 2),
        (64, 128, 8, 2), (32, 64, 4, 2), (32, 128, 8, 2), (64, 64, 8, 2),
    )
]  # fmt: skip


def gsm8k_plan() -> AttentionPlan:
    """Return the plan of a pack of rows with GSM8K's lengths, in the dataset's order."""
    starts, total = [], 0
    for row in make_rows(1):
        if total + len(row["input_ids"]) > TOKENS:
            break
        starts.append(total)
        total += len(row["input_ids"])
    return AttentionPlan.packed(starts, TOKENS, torch.device("cuda"))


def time_case(
    table: Table, name: str, plan: AttentionPlan, config: AttentionConfig, batch: int, sweep: bool
) -> None:
    """Time all backends that can compute one case."""
    tokens = TOKENS // batch
    heads, shared, size = config.num_heads, config.num_kv_heads, config.head_dim
    sets = []
    for _ in range(3):
        fused = torch.randn(
            batch, tokens, heads + 2 * shared, size, device="cuda", dtype=torch.bfloat16
        )
        grads = torch.empty_like(fused)
        out = fused.new_empty(TOKENS, heads * size + 64)[:, : heads * size]
        out = out.view(batch, tokens, heads, size)
        dout = torch.randn(batch, tokens, heads, size, device="cuda", dtype=torch.bfloat16)
        split = [heads, shared, shared]
        sets.append((fused.split(split, 2), out, dout, grads.split(split, 2)))
    q, k, v = sets[0][0]
    group = heads // shared
    truth_in = [t[:1, :, :n].double().requires_grad_() for t, n in ((q, group), (k, 1), (v, 1))]
    few = AttentionConfig(group, 1, size, config.scale, config.window, config.softcap)
    if plan.sequence_lengths is None:
        truth_in = [t[:, :1024].detach().requires_grad_() for t in truth_in]
    truth = attention.attention_reference(*truth_in, plan, few)
    checked = slice(truth.shape[1])
    library = attention._backend(q, plan, config)
    if library == "own" and config.softcap is None:
        library = "flash"
    providers = ["own"] if library == "own" else [library, "own"]
    label = {"own": "tuneline"}
    stock = attention._backend
    for provider in providers:
        attention._backend = lambda *_, provider=provider: provider
        saved = [attention.attention_forward(*s[0], plan, config, out=s[1]) for s in sets]
        error = _error(sets[0][1][:1, checked, :group], truth.detach())
        table.check("attention", f"{name} {label.get(provider, provider)}", error, 5e-3)
        # Gradients can be compared only for a whole row.
        if plan.sequence_lengths is not None:
            s = sets[0]
            dq, dk = attention.attention_backward(
                s[2], *s[0], s[1], saved[0], plan, config, out=s[3]
            )
            upstream = s[2][:1, :, :group].double()
            wanted = torch.autograd.grad(truth, truth_in, upstream, retain_graph=True)
            found = dq[:1, :, :group], dk[:1, :, :1], s[3][2][:1, :, :1]
            error = max(_error(a, b) for a, b in zip(found, wanted, strict=True))
            table.check("attention", f"{name} {label.get(provider, provider)} bwd", error, 1e-2)
        forward: list[Callable[[], object]] = [
            lambda s=s: attention.attention_forward(*s[0], plan, config, out=s[1]) for s in sets
        ]
        backward: list[Callable[[], object]] = [
            lambda s=s, kept=kept: attention.attention_backward(
                s[2], *s[0], s[1], kept, plan, config, out=s[3]
            )
            for s, kept in zip(sets, saved, strict=True)
        ]
        shape = f"{batch}x{tokens}x{heads}+{shared}x{size}"
        who = label.get(provider, provider)
        table.time("attention", who, f"{name} fwd", shape, forward)
        table.time("attention", who, f"{name} bwd", shape, backward)
    if sweep:
        names = "_forward_blocks", "_dq_blocks", "_dkdv_blocks"
        defaults = {n: getattr(flash, n) for n in names}
        for which in names:
            calls = forward if which == "_forward_blocks" else backward
            for tile in TILES:
                setattr(flash, which, lambda head_dim, tile=tile: tile)
                mode = f"{name} {which[1:-7]}"
                text = f"{tile.rows}x{tile.keys} w{tile.num_warps} s{tile.num_stages}"
                table.time("attention", text, mode, shape, calls)
            setattr(flash, which, defaults[which])
    attention._backend = stock


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("attention.csv"))
    parser.add_argument(
        "--sweep", nargs="*", default=[], help="cases for which other tile shapes are timed"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    llama = AttentionConfig(32, 8, 128, SCALE)
    cases = {
        "packed": (gsm8k_plan(), llama, 1),
        "4x2048": (AttentionPlan(), llama, 4),
        "1x8192": (AttentionPlan(), llama, 1),
        "gemma2": (AttentionPlan(), AttentionConfig(16, 8, 256, SCALE, None, 50.0), 4),
        "phi": (AttentionPlan(), AttentionConfig(32, 32, 96, SCALE), 4),
    }
    table = Table(args.out)
    for name, (plan, config, batch) in cases.items():
        time_case(table, name, plan, config, batch, name in args.sweep)
        table.save()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
