"""Run `python -m tuneline.train` on an 8B shape with packed rows as long as GSM8K's, on one GPU.

    python tests/measure/gpu/whole_step_on_gpu.py --out-dir DIR
    python tests/measure/gpu/whole_step_on_gpu.py --parts bare free       some of the parts
    python tests/measure/gpu/whole_step_on_gpu.py --tiny                  a trial without a GPU

    bare    the kernels in a plain loop without a trainer, as the upper bound of the step's speed
    free    the step, with all memory for activations
    fp8     the same with 8-bit matrix products
    lean    the step, with no memory for activations; SIGTERM half-way, then resumed to the end
    oom     the step, while another process takes the memory that the step has planned to use

All parts use the same random weights and tokens, so the losses can be compared. Prints tokens per
second by wall-clock time, peak memory beside the estimate, and NVML's figures.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_inputs
from gpu_inputs import GIB, largest_difference, say, train

PARTS = ("bare", "free", "fp8", "lean", "oom")
WARM_UP = 6
"""First step whose speed counts; earlier steps may compile kernels."""
HOG = """
import sys, torch
torch.zeros(1, device="cuda")
print("ready", flush=True)
sys.stdin.readline()
taken = torch.empty(torch.cuda.mem_get_info()[0] - int(sys.argv[1]) * 2**30, dtype=torch.uint8,
    device="cuda")
print(f"{taken.numel() / 2**30:.0f} GiB taken", flush=True)
sys.stdin.readline()
"""


def main() -> None:
    """Run the parts one after another until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out-dir", type=Path, default=Path("."), help="for whole_step.json, logs")
    parser.add_argument(
        "--work-dir", type=Path, help="for the 16 GB base; default: /dev/shm or disk"
    )
    parser.add_argument(
        "--deadline", type=float, default=210, help="start no run after this many seconds"
    )
    parser.add_argument("--tiny", action="store_true", help="two small layers and short rows")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return bare(Path(args.child[0]), Path(args.child[1]), args.steps)
    began = time.monotonic()
    gpu_inputs.check_packages()
    import torch

    has_gpu = torch.cuda.is_available()
    work = args.work_dir or gpu_inputs.roomy_directory(0 if args.tiny else 17 * 10**9)
    base, dataset = work / "base", work / "dataset"
    pack = 256 if args.tiny else 8192
    say(f"{torch.cuda.get_device_name() if has_gpu else 'CPU'}, torch {torch.__version__}, {work}")
    gpu_inputs.write_base(base, "tiny" if args.tiny else "Llama-3.1-8B")
    size = gpu_inputs.write_weights(base)
    lengths = gpu_inputs.gsm8k_lengths(args.steps * pack, scale=0.1 if args.tiny else 1.0)
    gpu_inputs.write_dataset(
        dataset,
        lengths,
        max_seq_length=pack,
        num_eval_rows=pack // 256,
        max_token=500 if args.tiny else 30000,
    )
    say(f"{size / 1e9:.1f} GB of weights and {len(lengths)} rows: {time.monotonic() - began:.0f} s")
    results: dict[str, Any] = {}
    files = {"base": base, "dataset": dataset, "work": work}

    def finish(run: gpu_inputs.Run) -> gpu_inputs.Run:
        say(run.show(WARM_UP))
        results[run.name] = {
            "tokens_per_second": run.tokens_per_second(WARM_UP),
            "losses": run.losses,
            **{name: value for name, value in run.summary.items() if name != "history"},
        }
        args.out_dir.mkdir(parents=True, exist_ok=True)
        (args.out_dir / f"whole_step_{run.name}.log").write_text("\n".join(run.log))
        (args.out_dir / "whole_step.json").write_text(json.dumps(results, indent=1))
        return run

    runs: dict[str, gpu_inputs.Run] = {}
    try:
        for part in args.parts:
            if time.monotonic() - began > args.deadline:
                say(f"{part}: not started: {args.deadline:.0f} s have passed")
            elif part == "bare":
                command = [sys.executable, __file__, "--steps", str(args.steps)]
                done = subprocess.run(
                    [*command, "--child", str(base), str(dataset)], capture_output=True, text=True
                )
                say(done.stdout.strip() or f"bare: {done.stderr[-1500:]}")
            elif part == "free":
                runs[part] = finish(train(part, config(args.steps), **files))
            elif part == "fp8":
                settings = {**config(args.steps), "kernels": "fp8"}
                runs[part] = finish(train(part, settings, **files))
            elif part == "lean":
                settings = {**config(args.steps), "memory_gib": 1.0 if args.tiny else 8.4}
                half = args.steps // 2
                stopped = train(part, settings, **files, stop_at=half)
                say(f"lean: stopped with exit code {stopped.code}: {stopped.log_tail[-300:]}")
                runs[part] = finish(train(part, settings, **files))
            elif part == "oom" and has_gpu:
                runs[part] = finish(crowded(config(args.steps // 3), files))
        if "free" in runs and "lean" in runs:
            compare(runs["free"], runs["lean"], args.steps)
        if "free" in runs and "fp8" in runs:
            apart = [runs["fp8"].losses[n] - loss for n, loss in runs["free"].losses.items()]
            say(
                f"losses of fp8 are {statistics.mean(apart):+.4f} from those of free in the mean, "
                f"by at most {max(map(abs, apart)):.4f}"
            )
        say(f"{time.monotonic() - began:.0f} s in total")
    finally:
        if args.work_dir is None:
            shutil.rmtree(work, ignore_errors=True)


def config(num_steps: int) -> dict[str, Any]:
    """Return a TrainConfig with one pack per optimizer step, as a dictionary."""
    return {
        "max_steps": num_steps,
        "warmup_steps": 3,
        "global_batch_size": 1,
        "micro_batch_size": 1,
        "num_ranks": 1,
        "eval_steps": max(1, num_steps // 2),
        "early_stopping_patience": None,
        "price_per_hour": 2.5,
    }


def compare(free: gpu_inputs.Run, lean: gpu_inputs.Run, num_steps: int) -> None:
    """Print the largest difference of the losses before and after the stop."""
    half = num_steps // 2
    parts = {"before": range(1, half + 1), "after": range(half + 1, num_steps + 1)}
    apart = {
        name: largest_difference(free.losses, lean.losses, steps) for name, steps in parts.items()
    }
    say(
        f"losses of free and lean differ by at most {apart['before']:.4f} before the stop and by "
        f"{apart['after']:.4f} after it (-1: no steps in common)"
    )


def crowded(settings: dict[str, Any], files: dict[str, Path]) -> gpu_inputs.Run:
    """Train while another process takes all but 20 GiB of the GPU once the plan is made."""
    hog = subprocess.Popen(
        [sys.executable, "-c", HOG, "20"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert hog.stdin is not None and hog.stdout is not None
    hog.stdout.readline()

    def take() -> None:
        hog.stdin.write("now\n")  # type: ignore[union-attr]
        hog.stdin.flush()  # type: ignore[union-attr]
        say(f"oom: {hog.stdout.readline().strip()} by another process")  # type: ignore[union-attr]

    try:
        # memory_gib fixes how many activations are kept; otherwise the free memory decides later.
        granted = {**settings, "memory_gib": 40.0, "checkpoint_minutes": 0}
        return train("oom", granted, **files, on_log=("GiB free", take))
    finally:
        hog.kill()


def bare(base: Path, dataset: Path, num_steps: int) -> None:
    """Train with the kernels alone, and print tokens per second and the peak memory."""
    import peft
    import torch

    from tuneline.artifacts import DatasetManifest
    from tuneline.kernels import FlatAdamW, patch
    from tuneline.models import nf4
    from tuneline.train.config import TrainConfig
    from tuneline.train.model.adapter import keep_adapter_in_fp32
    from tuneline.train.model.targets import lora_config
    from tuneline.train.rows.load import load_rows

    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = TrainConfig()
    model = nf4.load_base(base, dtype=torch.bfloat16, device=device, quantized=True)
    model = peft.get_peft_model(model, lora_config(recipe.lora, model)).train()
    keep_adapter_in_fp32(model)
    patch(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = FlatAdamW(
        trained, lr=2e-4, weight_decay=0.01, state_bits=8, max_grad_norm=recipe.max_grad_norm
    )
    manifest = DatasetManifest.read(dataset)
    packs, _ = load_rows(dataset, manifest, packing=True, cache_dir=dataset / "cache")
    rates, losses = [], []
    for step in range(min(num_steps, len(packs))):
        pack = packs[step]
        start = time.perf_counter()
        places = [torch.arange(length) for length in pack["seq_lengths"]]
        labels = torch.tensor([pack["labels"]])
        with torch.autocast(device, torch.bfloat16):
            loss = model(
                input_ids=torch.tensor([pack["input_ids"]]).to(device),
                position_ids=torch.cat(places)[None].to(device),
                labels=labels.to(device),
                num_items_in_batch=(labels[:, 1:] != -100).sum().to(device),
            ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        rates.append(len(pack["input_ids"]) / (time.perf_counter() - start))
    peak = torch.cuda.max_memory_allocated() / GIB if device == "cuda" else 0.0
    print(
        f"bare: {statistics.median(rates[WARM_UP:] or rates):.0f} tok/s, peak {peak:.2f} GiB, "
        f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, {len(rates)} steps"
    )


if __name__ == "__main__":
    main()
