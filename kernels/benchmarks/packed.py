"""Time packed training through each engine's own trainer: tuneline, PEFT (+ Liger), Unsloth.

    python kernels/benchmarks/packed.py --engines tuneline peft liger unsloth

Rows have GSM8K's lengths and random tokens, packed to 8192 tokens per step. Every engine runs in
its own process with the same random weights in NF4, LoRA r=16 on all linears and 8-bit AdamW
(Unsloth: the optimizer of its best setting, see peers.py), in TRL's SFTTrainer (tuneline: in the
train step's SupervisedTrainer, a subclass). The engines take turns on the GPU. A step's time is
measured between the trainer's callbacks at its start and end, with the device synchronised at both;
tokens are those of the rows, without padding. The engines draw packs in different orders, so only
steps whose pack is at least 97 % full are counted.
"""

from __future__ import annotations

import argparse
import csv
import gc
import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "components"))

import peers
import train_step
from train_step import answer, receive, send, stop

PACK = 8192
FULL = 0.97 * PACK
LENGTH_DECILES = [97, 141, 158, 173, 188, 204, 222, 243, 269, 312, 570]
"""Tokens of GSM8K's training rows as chats under SmolLM2's tokenizer; their mean is 217."""


def main() -> None:
    """Run every mode on every engine and write one CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs="+", default=["tuneline", "peft", "liger"])
    parser.add_argument("--shape", default="llama-3.1-8b", choices=train_step.SHAPES)
    parser.add_argument("--modes", nargs="+", default=["free", "lean"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--out-dir", type=Path, default=train_step.RESULTS_DIR)
    parser.add_argument("--profile", action="store_true", help="profile two of tuneline's steps")
    parser.add_argument(
        "--peer-packages", type=Path, help="folder of the package versions that Unsloth asks for"
    )
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        engine, mode, checkpoint = args.worker
        return worker(engine, mode, Path(checkpoint), args.shape)
    rows = []
    with tempfile.TemporaryDirectory() as checkpoint:
        workers: dict[str, subprocess.Popen[str]] = {}
        for mode in args.modes:
            if "unsloth" in workers:
                stop(workers.pop("unsloth"))  # Each mode has a setting of its own.
            for engine in args.engines:
                if engine in workers:
                    continue
                process = start_worker(engine, mode, checkpoint, args)
                ready = receive(process)
                print(f"{engine} for {mode}: {ready}", flush=True)
                if "error" not in ready:
                    workers[engine] = process
            for engine, results in take_turns(mode, workers, args).items():
                rows.append(summary(args.shape, engine, mode, results))
                print(line(rows[-1]), flush=True)
        for process in workers.values():
            stop(process)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    path = args.out_dir / f"packed_{args.shape}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(line(row))


def take_turns(
    mode: str, workers: dict[str, subprocess.Popen[str]], args: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    """Let the engines take turns in one mode, and return each one's results, one per round."""
    collected: dict[str, list[dict[str, Any]]] = {}
    for turn in range(args.rounds):
        for engine, process in workers.items():
            profiles = args.profile and engine == "tuneline" and turn == args.rounds - 1
            profile = str(args.out_dir / f"profile_packed_{mode}.txt") if profiles else None
            request = {"mode": mode, "warmup": args.warmup, "steps": args.steps}
            send(process, {**request, "profile": profile})
            result = receive(process)
            if "error" in result:
                print(f"{engine} {mode}: {result['error']}", flush=True)
            else:
                collected.setdefault(engine, []).append(result)
    return collected


def summary(shape: str, engine: str, mode: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Reduce all rounds of one engine in one mode to a CSV row."""
    steps = [pair for r in results for pair in zip(r["milliseconds"], r["tokens"], strict=True)]
    steps = [(milliseconds, tokens) for milliseconds, tokens in steps if tokens >= FULL]
    times = [milliseconds for milliseconds, _ in steps]
    tokens = sum(tokens for _, tokens in steps)
    quantiles = statistics.quantiles(times, n=5)
    return {
        "engine": engine,
        "model": shape,
        "mode": mode,
        "setting": peers.setting(engine, f"packed/{mode}").name,
        "shape": f"packed to {PACK}",
        "metric": "step",
        "unit": "ms",
        "median": round(statistics.median(times), 2),
        "p20": round(quantiles[0], 2),
        "p80": round(quantiles[-1], 2),
        "num_steps": len(times),
        "tokens_per_second": round(tokens / sum(times) * 1e3),
        "peak_allocated_gib": max(r["peak_allocated_gib"] for r in results),
        "peak_reserved_gib": max(r["peak_reserved_gib"] for r in results),
        "first_loss": results[0]["losses"][0],
        "last_loss": results[0]["losses"][-1],
        "device": results[0]["device"],
        "versions": results[0]["versions"],
    }


def line(row: dict[str, Any]) -> str:
    """Format one row for the terminal."""
    return (
        f"{row['engine']:9} {row['mode']:5} {row['median']:8.1f} ms [{row['p20']:.1f}, "
        f"{row['p80']:.1f}] {row['tokens_per_second']:6} tok/s alloc "
        f"{row['peak_allocated_gib']:6.2f} reserved {row['peak_reserved_gib']:6.2f} GiB "
        f"loss {row['first_loss']:.4f} -> {row['last_loss']:.4f}"
    )


def start_worker(
    engine: str, mode: str, checkpoint: str, args: argparse.Namespace
) -> subprocess.Popen[str]:
    """Start one engine, which answers when its model is built."""
    command = [sys.executable, __file__, "--worker", engine, mode, checkpoint]
    command += ["--shape", args.shape]
    environment = peers.environment(engine, f"packed/{mode}", args.peer_packages)
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**environment, "TQDM_DISABLE": "1"},  # A progress bar would fill the pipe.
    )


def worker(engine: str, mode: str, checkpoint: Path, shape: str) -> None:
    """Build the model, then serve requests until stdin closes."""
    import json

    if engine == "unsloth":
        model = train_step.unsloth_model(shape, f"packed/{mode}", checkpoint)
    elif engine == "tuneline":
        model = train_step.base_model(shape)
        train_step.quantize(model)
        model.requires_grad_(False)
    else:
        model = train_step.peft_model(shape, engine, wide_adapters=False)
    import torch

    torch.cuda.empty_cache()
    answer({"ready": round(torch.cuda.memory_allocated() / 2**30, 2)})
    state: dict[str, Any] = {"model": model}
    for text in sys.stdin:
        try:
            answer(run(state, engine, json.loads(text)))
        except Exception as error:
            traceback.print_exc()
            answer({"error": f"{type(error).__name__}: {str(error)[:300]}"})
        gc.collect()
        torch.cuda.empty_cache()


def row_length(place: float) -> float:
    """Return the row length at a quantile, given in deciles from 0 to 10."""
    low, high = LENGTH_DECILES[int(place)], LENGTH_DECILES[int(place) + 1]
    return low + (high - low) * (place % 1)


def make_rows(num_packs: int) -> list[dict[str, list[int]]]:
    """Return rows for `num_packs` packs, the same in every process."""
    draw = random.Random(0)
    rows, total = [], 0
    while total < num_packs * PACK:
        length = round(row_length(draw.random() * 10))
        rows.append({"input_ids": [draw.randrange(10, 32000) for _ in range(length)]})
        total += length
    return rows


def run(state: dict[str, Any], engine: str, request: dict[str, Any]) -> dict[str, Any]:
    """Train for a request's steps and time them."""
    import torch
    import transformers
    import trl
    from datasets import Dataset

    num_steps = request["warmup"] + request["steps"]
    lean = request["mode"] == "lean"
    rows = Dataset.from_list(make_rows(num_steps + 1))
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": num_steps,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "optim": "adamw_8bit",
        "bf16": True,
        "packing": True,
        "max_length": PACK,
        "gradient_checkpointing": lean,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if lean else None,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }
    if engine == "unsloth":
        if not peers.UNSLOTH[f"packed/{request['mode']}"].has_8bit_optimizer:
            settings["optim"] = "adamw_torch_fused"
        settings["gradient_checkpointing_kwargs"] = None
        settings["gradient_checkpointing"] = "unsloth" if lean else False
        settings["dataset_num_proc"] = 1
    else:
        rows = trl.pack_dataset(rows.map(lambda row: {"labels": row["input_ids"]}), PACK, "bfd")
        settings["dataset_kwargs"] = {"skip_prepare_dataset": True}
    timer = Timer()
    trainer = make_trainer(engine, state, trl.SFTConfig(**settings), rows, lean, timer)
    try:
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        if request["profile"]:
            trainer.args.max_steps = 2
            train_step.write_profile(trainer.train, Path(request["profile"]), num_steps=2)
    finally:
        # Free what the trainer holds: the next trainer creates its own optimizer.
        trainer.optimizer = trainer.lr_scheduler = None
    keep = slice(request["warmup"], num_steps)
    return {
        "milliseconds": timer.milliseconds[keep],
        "tokens": timer.tokens[keep],
        "losses": losses,
        "peak_allocated_gib": round(peaks[0] / 2**30, 2),
        "peak_reserved_gib": round(peaks[1] / 2**30, 2),
        "device": torch.cuda.get_device_name(),
        "versions": f"torch {torch.__version__} transformers {transformers.__version__} "
        f"trl {trl.__version__}",
    }


def make_trainer(
    engine: str, state: dict[str, Any], arguments: Any, rows: Any, lean: bool, timer: Timer
) -> Any:
    """Return the engine's trainer, its batches and steps seen by the timer."""
    import torch
    import trl
    from transformers import TrainerCallback

    from tuneline.kernels import patch

    named: dict[str, Any] = {"processing_class": peers.tokenizer()}
    if engine == "tuneline":
        from peft import LoraConfig

        from tuneline.train.model.adapter import keep_adapter_in_fp32
        from tuneline.train.model.fuse import fuse_model, fuse_trainer
        from tuneline.train.trainer.trainers import SupervisedTrainer

        base = state["model"]
        if not hasattr(base, "peft_config"):
            fuse_model(base)
            named["peft_config"] = LoraConfig(
                r=16, lora_alpha=16, target_modules=train_step.TARGETS, task_type="CAUSAL_LM"
            )
        trainer = SupervisedTrainer(model=base, args=arguments, train_dataset=rows, **named)
        state["model"] = trainer.model
        keep_adapter_in_fp32(trainer.model)
        print(fuse_trainer(trainer), file=sys.stderr)
    else:
        if engine != "unsloth" and not lean:
            state["model"].gradient_checkpointing_disable()
        trainer = trl.SFTTrainer(model=state["model"], args=arguments, train_dataset=rows, **named)

    class Callback(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            if engine == "tuneline" and lean:
                # The trainer has moved the model to the GPU by now, the embedding too.
                patch(trainer.model, budget="lean", tables_on_host=True)

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if engine == "unsloth":
                # Its trainer switches recomputation on regardless of the arguments.
                for module in state["model"].modules():
                    if hasattr(module, "gradient_checkpointing"):
                        module.gradient_checkpointing = lean
            timer.begin(torch)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            timer.end(torch)

    trainer.add_callback(Callback())
    collate = trainer.data_collator
    pad = trainer.processing_class.pad_token_id

    def counting(examples: Any) -> Any:
        batch = collate(examples)
        timer.collated.append(int((batch["input_ids"] != pad).sum()))
        return batch

    trainer.data_collator = counting
    return trainer


class Timer:
    """Wall time and tokens by step."""

    def __init__(self) -> None:
        """Start empty."""
        self.milliseconds: list[float] = []
        self.collated: list[int] = []
        self._start = 0.0

    @property
    def tokens(self) -> list[int]:
        """Tokens of each step's batch; one batch per step, read ahead by the loader."""
        return self.collated[: len(self.milliseconds)]

    def begin(self, torch: Any) -> None:
        """Synchronise the device and start the clock."""
        if not self.milliseconds:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        self._start = time.perf_counter()

    def end(self, torch: Any) -> None:
        """Synchronise the device and stop the clock."""
        torch.cuda.synchronize()
        self.milliseconds.append((time.perf_counter() - self._start) * 1e3)


if __name__ == "__main__":
    main()
