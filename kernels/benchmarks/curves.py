"""Train the same adapters for 200 steps with and without our kernels, and compare the losses.

    python kernels/benchmarks/curves.py

--shapes selects a small Llama (4 layers of 512) and shapes of train_step.py; NF4 base, LoRA r=16,
bfloat16, the same initial adapters and the same batches of a Markov chain. Runs:

    peft            the stock model, torch's AdamW
    peft-split      the same with every batch in two halves: other GEMM shapes, other roundings
    tuneline        the patched model, torch's AdamW
    tuneline-fp8    the patched model with fp8 products, torch's AdamW
    float32         the stock model on the same NF4 weights, otherwise in float32 (small model only)
    peft-8bit       the stock model, bitsandbytes' 8-bit AdamW
    tuneline-8bit   the patched model, FlatAdamW with 8-bit state

The measure is the mean over all steps of the absolute difference between two runs' losses. The
difference between peft and peft-split is the effect of rounding alone; float32 shows which run
deviates from the exact result.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import train_step

SMALL = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
RUNS = ("peft", "peft-split", "tuneline", "peft-8bit", "tuneline-8bit", "tuneline-fp8", "float32")
PAIRS = (
    ("peft", "peft-split"),
    ("peft", "tuneline"),
    ("tuneline", "tuneline-fp8"),
    ("float32", "peft"),
    ("float32", "peft-split"),
    ("float32", "tuneline"),
    ("peft-8bit", "tuneline-8bit"),
    ("float32", "peft-8bit"),
    ("float32", "tuneline-8bit"),
)


def main() -> None:
    """Run both models and write the losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--shapes", nargs="+", default=["small", "llama-3.1-8b"])
    parser.add_argument("--runs", nargs="+", default=RUNS, choices=RUNS)
    parser.add_argument("--out-dir", type=Path, default=train_step.RESULTS_DIR)
    args = parser.parse_args()
    train_step.SHAPES["small"] = ("Llama", SMALL)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    with (args.out_dir / "curves.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "run", "step", "loss"])
        for shape in args.shapes:
            model = train_step.peft_model(shape, "peft", wide_adapters=True)
            initial = [p.detach().clone() for p in trained(model)]
            batches = markov_batches(args.steps, 2, 512)
            names = [name for name in args.runs if name != "float32" or shape == "small"]
            losses = {name: train(model, initial, batches, name) for name in names}
            for name, curve in losses.items():
                writer.writerows([shape, name, step, loss] for step, loss in enumerate(curve))
            first, last = losses["peft"][0], sum(losses["peft"][-10:]) / 10
            print(f"{shape}: {args.steps} steps, peft {first:.4f} -> {last:.4f}")
            for one, other in PAIRS:
                if one not in losses or other not in losses:
                    continue
                gaps = [abs(a - b) for a, b in zip(losses[one], losses[other], strict=True)]
                bias = sum(b - a for a, b in zip(losses[one], losses[other], strict=True))
                print(
                    f"  {one} and {other}: mean {sum(gaps) / len(gaps):.6f}, signed "
                    f"{bias / len(gaps):+.6f}, greatest {max(gaps):.6f}",
                    flush=True,
                )
            del model
            torch.cuda.empty_cache()


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the adapters' parameters."""
    return [p for p in model.parameters() if p.requires_grad]


def markov_batches(num_steps: int, num_rows: int, length: int) -> torch.Tensor:
    """Draw tokens [steps, rows, length], each of which has four likely successors."""
    generator = torch.Generator().manual_seed(7)
    followers = torch.randint(0, 2048, (2048, 4), generator=generator)
    tokens = torch.empty(num_steps * num_rows, length, dtype=torch.long)
    tokens[:, 0] = torch.randint(0, 2048, (len(tokens),), generator=generator)
    choices = torch.randint(0, 4, tokens.shape, generator=generator)
    for place in range(1, length):
        tokens[:, place] = followers[tokens[:, place - 1], choices[:, place]]
    return tokens.view(num_steps, num_rows, length).cuda()


def train(model: Any, initial: list[torch.Tensor], batches: torch.Tensor, name: str) -> list[float]:
    """Train from the initial adapters and return the losses."""
    import bitsandbytes

    from tuneline.kernels import FlatAdamW, patch, unpatch

    parameters = trained(model)
    with torch.no_grad():
        for parameter, value in zip(parameters, initial, strict=True):
            parameter.data = value.clone()
            parameter.grad = None
    if name.startswith("tuneline"):
        report = patch(model, fp8=name == "tuneline-fp8")
        assert not report.unfused and report.loss == "fused", str(report)
    mixed = name != "float32"
    if not mixed:
        # The last run of a model, so it is not needed in bfloat16 again.
        for module in model.modules():
            if hasattr(module, "compute_dtype"):
                module.compute_dtype = torch.float32
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dtype == torch.bfloat16:
                tensor.data = tensor.data.float()
    optimizer: Any
    if name == "tuneline-8bit":
        optimizer = FlatAdamW(parameters, lr=1e-3, state_bits=8)
    elif name == "peft-8bit":
        optimizer = bitsandbytes.optim.AdamW8bit(parameters, lr=1e-3, weight_decay=0.01)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01, fused=True)
    model.train()
    losses = []
    for rows in batches:
        parts = rows.split(1) if name == "peft-split" else [rows]
        total = torch.zeros((), device="cuda")
        for part in parts:
            with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
                loss = model(input_ids=part, labels=part, use_cache=False).loss / len(parts)
            loss.backward()
            total += loss.detach().float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
    unpatch(model)
    return torch.stack(losses).tolist()


if __name__ == "__main__":
    main()
