"""Time whole QLoRA training steps: tuneline beside PEFT, PEFT + Liger-Kernel and Unsloth.

    python kernels/benchmarks/train_step.py --engines tuneline peft liger unsloth

Every engine runs in its own process (Unsloth patches transformers globally) with the same random
weights in NF4 with double quantisation, LoRA r=16 on all linears, and the same batches; tuneline
uses its own 8-bit AdamW, PEFT and Liger use bitsandbytes', and Unsloth the one of its setting: each
case has the setting that is best for Unsloth (peers.py), which the CSV names. The engines take
turns on the GPU, `--rounds` times per case. A row of the table is an engine in a mode: `free`
recomputes nothing (tuneline: budget auto), `lean` recomputes the most and keeps the input embedding
on the host (tuneline and Unsloth). `tuneline-fp8` is tuneline with its opt-in fp8 products; because
both keep what fits into the free memory, they cannot share a GPU in a free case.

`median` is the time of a step with the device synchronised before and after it; `in_a_row` is that
of `--steps` steps that nothing waits for, divided by their number. 1x131072 is one step alone.

Floor: the products of the frozen weights and of causal attention in forward and input gradient
(lean: plus a second forward without down_proj), at the rate of `--peak-tflops`.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import peers

RESULTS_DIR = Path(__file__).parent / "results"
SOURCE_DIR = Path(__file__).parents[1]
CASES = {
    "4x2048": (4, 2048),
    "2x512": (2, 512),
    "1x8192": (1, 8192),
    "1x32768": (1, 32768),
    "1x65536": (1, 65536),
    "1x131072": (1, 131072),
}
LONGEST = 131072
"""Rows of as many tokens take one timed step, after one of 2048 tokens."""
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1-8b": (
        "Llama",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
    "qwen2.5-7b": (
        "Qwen2",
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
        },
    ),
    "phi-3.5-mini": (
        "Phi3",
        {
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 8192,
            "pad_token_id": 0,
        },
    ),
    "gemma-2-9b": (
        "Gemma2",
        {
            "vocab_size": 256000,
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_hidden_layers": 42,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "attn_implementation": "eager",
        },
    ),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PHI_TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def main() -> None:
    """Run every case on every engine and write one CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs="+", default=["tuneline", "peft", "liger"])
    parser.add_argument("--shape", default="llama-3.1-8b", choices=SHAPES)
    parser.add_argument(
        "--cases", nargs="+", default=["4x2048/free", "4x2048/lean", "2x512/free", "1x8192/lean"]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=3, help="untimed steps")
    parser.add_argument("--peak-tflops", type=float, default=700.0)
    parser.add_argument("--out-dir", type=Path, default=RESULTS_DIR)
    parser.add_argument(
        "--same-optimizer",
        action="store_true",
        help="bitsandbytes' AdamW8bit on float32 adapters everywhere, to compare losses",
    )
    parser.add_argument("--profile", action="store_true", help="profile tuneline's first case")
    parser.add_argument(
        "--peer-packages", type=Path, help="folder of the package versions that Unsloth asks for"
    )
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        engine, case, checkpoint = args.worker
        return worker(engine, case, Path(checkpoint), args.shape, args.same_optimizer)
    free = [case for case in args.cases if case.endswith("/free")]
    if free and {"tuneline", "tuneline-fp8"} <= set(args.engines):
        parser.error(
            f"tuneline and tuneline-fp8 both keep what fits into the free memory in {free[0]}: run "
            "them in separate calls"
        )
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    losses: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as checkpoint:
        # An engine keeps its process from case to case, unless its setting changes.
        workers: dict[str, tuple[peers.Setting, subprocess.Popen[str]]] = {}
        for case in args.cases:
            for engine in args.engines:
                wanted = peers.setting(engine, case)
                if engine in workers and workers[engine][0] == wanted:
                    continue
                if engine in workers:
                    stop(workers.pop(engine)[1])
                process = start_worker(engine, case, checkpoint, args)
                ready = receive(process)
                print(f"{engine} for {case}: {ready} after {time.perf_counter() - start:.0f} s")
                if "error" not in ready:
                    workers[engine] = wanted, process
            running = {engine: process for engine, (_, process) in workers.items()}
            for engine, answers in take_turns(case, running, args).items():
                rows.append(summary(args, engine, case, answers))
                print(line(rows[-1]), flush=True)
                numbered = enumerate(answers[0]["losses"])
                losses += [[engine, *case.split("/"), index, loss] for index, loss in numbered]
            if rows:
                write(args, rows, losses)
        for _, process in workers.values():
            stop(process)
    print(f"{time.perf_counter() - start:.0f} s in all")
    for row in rows:
        print(line(row))


def write(args: argparse.Namespace, rows: list[dict[str, Any]], losses: list[list[Any]]) -> None:
    """Write the CSVs; called after each case, so that a cut run leaves those it has finished."""
    args.out_dir.mkdir(parents=True, exist_ok=True)
    suffix = "_same_optimizer" if args.same_optimizer else ""
    path = args.out_dir / f"train_step_{args.shape}{suffix}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with path.with_name(path.stem + "_losses.csv").open("w", newline="") as file:
        plain = csv.writer(file)
        plain.writerow(["engine", "shape", "mode", "step", "loss"])
        plain.writerows(losses)


def take_turns(
    case: str, running: dict[str, subprocess.Popen[str]], args: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    """Let the engines take turns in one case, and return each one's answers, one per round."""
    shape, mode = case.split("/")
    num_rounds, num_steps = args.rounds, args.steps
    if is_longest := CASES[shape][1] >= LONGEST:
        num_rounds = num_steps = 1
    collected: dict[str, list[dict[str, Any]]] = {}
    for turn in range(num_rounds):
        warmup = args.warmup if turn == 0 else 1
        for engine, process in running.items():
            profile = args.profile and engine.startswith("tuneline") and turn == num_rounds - 1
            name = f"profile_{engine}_{case.replace('/', '_')}.txt"
            request = {
                "rows": CASES[shape][0],
                "length": CASES[shape][1],
                "mode": mode,
                "warmup": 0 if is_longest else warmup,
                "steps": num_steps,
                "profile": str(args.out_dir / name) if profile else None,
            }
            send(process, request)
            result = receive(process)
            if "error" in result:
                print(f"{engine} {case}: {result['error']}", flush=True)
            else:
                collected.setdefault(engine, []).append(result)
                seconds = statistics.median(result["milliseconds"]) / 1e3
                print(f"{engine} {case}: {seconds:.3f} s in round {turn + 1}", flush=True)
    return collected


def summary(
    args: argparse.Namespace, engine: str, case: str, answers: list[dict[str, Any]]
) -> dict[str, Any]:
    """Reduce all rounds of one engine in one case to a CSV row."""
    shape, mode = case.split("/")
    times = [t for answer in answers for t in answer["milliseconds"]]
    quantiles = statistics.quantiles(times, n=5) if len(times) > 1 else times
    num_tokens = CASES[shape][0] * CASES[shape][1]
    median = statistics.median(times)
    floor = floor_tflop(args.shape, *CASES[shape], mode) / args.peak_tflops * 1e3
    return {
        "engine": engine,
        "model": args.shape,
        "mode": mode,
        "setting": peers.setting(engine, case).name,
        "shape": shape,
        "metric": "step",
        "unit": "ms",
        "median": round(median, 2),
        "p20": round(quantiles[0], 2),
        "p80": round(quantiles[-1], 2),
        "in_a_row": round(statistics.median(a["in_a_row"] for a in answers), 2),
        "num_steps": len(times),
        "tokens_per_second": round(num_tokens / median * 1e3),
        "peak_allocated_gib": max(a["peak_allocated_gib"] for a in answers),
        "peak_reserved_gib": max(a["peak_reserved_gib"] for a in answers),
        "floor_fraction": round(floor / median, 3),
        "first_loss": answers[0]["losses"][0],
        "last_loss": answers[0]["losses"][-1],
        "device": answers[0]["device"],
        "versions": answers[0]["versions"],
    }


def line(row: dict[str, Any]) -> str:
    """Format one row for the terminal."""
    return (
        f"{row['engine']:9} {row['shape']:7} {row['mode']:5} {row['median']:8.1f} ms "
        f"[{row['p20']:.1f}, {row['p80']:.1f}] in a row {row['in_a_row']:.1f} "
        f"{row['tokens_per_second']:6} tok/s "
        f"alloc {row['peak_allocated_gib']:6.2f} reserved {row['peak_reserved_gib']:6.2f} GiB "
        f"floor {row['floor_fraction']:.2f} loss {row['first_loss']:.4f} -> {row['last_loss']:.4f}"
    )


def floor_tflop(shape: str, num_rows: int, length: int, mode: str) -> float:
    """Return the TFLOP that a step cannot avoid; see the module's docstring."""
    config = SHAPES[shape][1]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    attention_linears = hidden * head_dim * (2 * heads + 2 * kv_heads)
    down = hidden * inner
    layer = attention_linears + 3 * down
    tokens = num_rows * length
    scores = 2 * num_rows * heads * length * length * head_dim  # q k^T and p v, half masked
    passes = 2 * layer + (layer - down if mode == "lean" else 0)
    attention = scores * (1 + 2.5 + (1 if mode == "lean" else 0))
    per_layer = 2 * tokens * passes + attention
    head = 2 * 2 * tokens * hidden * config["vocab_size"]
    return (config["num_hidden_layers"] * per_layer + head) / 1e12


def start_worker(
    engine: str, case: str, checkpoint: str, args: argparse.Namespace
) -> subprocess.Popen[str]:
    """Start one engine, which answers when its model is built."""
    command = [sys.executable, __file__, "--worker", engine, case, checkpoint]
    command += ["--shape", args.shape]
    command += ["--same-optimizer"] if args.same_optimizer else []
    environment = peers.environment(engine, case, args.peer_packages)
    environment["PYTHONPATH"] = f"{SOURCE_DIR}:{environment['PYTHONPATH']}"
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def stop(process: subprocess.Popen[str]) -> None:
    """End a worker, which frees its part of the GPU."""
    process.stdin.close()
    process.wait()


def send(process: subprocess.Popen[str], message: dict[str, Any]) -> None:
    """Write one request."""
    process.stdin.write(json.dumps(message) + "\n")
    process.stdin.flush()


def receive(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Read lines until the worker's answer, skipping what libraries print in between."""
    for text in process.stdout:
        if text.startswith("ANSWER "):
            return json.loads(text.removeprefix("ANSWER "))
    return {"error": f"worker ended with {process.wait()}"}


def answer(message: dict[str, Any]) -> None:
    """Send an answer from inside a worker."""
    print("ANSWER " + json.dumps(message), flush=True)


def worker(engine: str, case: str, checkpoint: Path, shape: str, same_optimizer: bool) -> None:
    """Build the model, then serve requests until stdin closes."""
    if engine == "unsloth":
        model = unsloth_model(shape, case, checkpoint)
    else:
        wide = same_optimizer or engine.startswith("tuneline")
        model = peft_model(shape, engine, wide_adapters=wide)
    import bitsandbytes
    import torch

    fused = engine == "unsloth" and not peers.UNSLOTH[case].has_8bit_optimizer

    trained = [p for p in model.parameters() if p.requires_grad]
    initial = [p.detach().cpu() for p in trained]
    torch.cuda.empty_cache()
    answer({"ready": round(torch.cuda.memory_allocated() / 2**30, 2)})
    for text in sys.stdin:
        request = json.loads(text)
        try:
            with torch.no_grad():
                for parameter, value in zip(trained, initial, strict=True):
                    parameter.copy_(value)
            optimizer = None
            if engine.startswith("tuneline") and not same_optimizer:
                from tuneline.kernels import FlatAdamW

                optimizer = FlatAdamW(trained, lr=1e-4, state_bits=8)
            elif fused and not same_optimizer:
                optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
            else:
                optimizer = bitsandbytes.optim.AdamW8bit(trained, lr=1e-4)
            set_mode(model, engine, request["mode"])
            # A graph of the last case holds its memory until here.
            gc.collect()
            torch.cuda.empty_cache()
            answer(run_steps(model, optimizer, request))
        except torch.cuda.OutOfMemoryError as error:
            model.zero_grad(set_to_none=True)
            answer({"error": str(error).splitlines()[0]})
        torch.cuda.empty_cache()


def run_steps(model: Any, optimizer: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Time the steps of one request, with the device synchronised before and after each step."""
    import torch
    import transformers

    generator = torch.Generator().manual_seed(0)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    size = (request["warmup"] + request["steps"], request["rows"], request["length"])
    batches = torch.randint(0, vocab_size, size, generator=generator).cuda()
    milliseconds, losses = [], []

    def step(input_ids: torch.Tensor) -> torch.Tensor:
        loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    if request["warmup"] == 0:
        # Compile and load the kernels.
        step(batches[0][:, :2048])
    # Counted from before the warm-up, because a graph allocates its memory when it is captured.
    torch.cuda.reset_peak_memory_stats()
    for input_ids in batches:
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = step(input_ids)
        torch.cuda.synchronize()
        milliseconds.append((time.perf_counter() - start) * 1e3)
        losses.append(loss.item())
    in_a_row = milliseconds[-1]
    if request["steps"] > 1:
        start = time.perf_counter()
        for input_ids in batches[request["warmup"] :]:
            step(input_ids)
        torch.cuda.synchronize()
        in_a_row = (time.perf_counter() - start) * 1e3 / request["steps"]
    peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    if request["profile"]:
        write_profile(lambda: step(batches[0]), Path(request["profile"]))
    return {
        "milliseconds": milliseconds[request["warmup"] :],
        "in_a_row": in_a_row,
        "losses": losses,
        "peak_allocated_gib": round(peaks[0] / 2**30, 2),
        "peak_reserved_gib": round(peaks[1] / 2**30, 2),
        "device": torch.cuda.get_device_name(),
        "versions": f"torch {torch.__version__} transformers {transformers.__version__}",
    }


def write_profile(run: Any, path: Path, num_steps: int = 1) -> None:
    """Write device time by kernel and number of launches per step, and a trace of host and device.

    Args:
        run: Function that runs the steps.
        path: Text file of the table; the trace is beside it.
        num_steps: Steps that `run` runs.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    path.parent.mkdir(parents=True, exist_ok=True)

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        run()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path.with_suffix(".json.gz")))
    averages = profiler.key_averages()
    kernels = sorted(
        (e for e in averages if e.device_type.name == "CUDA"),
        key=lambda e: -e.self_device_time_total,
    )
    total = sum(e.self_device_time_total for e in kernels) / num_steps
    count = sum(e.count for e in kernels) // num_steps
    lines = [f"device busy {total / 1e3:.1f} ms, {count} kernels"]
    lines += [
        f"{e.self_device_time_total / num_steps / 1e3:9.2f} ms {e.count // num_steps:6} x "
        f"{e.key[:110]}"
        for e in kernels[:60]
    ]
    path.write_text("\n".join(lines) + "\n")


def set_mode(model: Any, engine: str, mode: str) -> None:
    """Set what the engine recomputes."""
    if engine.startswith("tuneline"):
        from tuneline.kernels.patching import check_layers_once, patch

        budget = "auto" if mode == "free" else "lean"
        fp8, host = engine == "tuneline-fp8", mode == "lean"
        report = patch(model, budget=budget, fp8=fp8, tables_on_host=host)
        assert not report.unfused, str(report)
        # As the train step does: nothing changes the layers between the steps.
        check_layers_once(model)
    elif engine == "unsloth":
        pass  # It was built for its mode.
    elif mode == "lean":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    else:
        model.gradient_checkpointing_disable()
    model.train()


def base_model(shape: str) -> Any:
    """Build the bf16 model on the device with seeded random weights."""
    import torch
    import transformers

    family, sizes = SHAPES[shape]
    config = getattr(transformers, f"{family}Config")(**sizes, dtype="bfloat16")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    torch.set_default_dtype(torch.float32)
    return model


def quantize(model: Any) -> None:
    """Replace every linear but the head by NF4 with double quantisation."""
    import bitsandbytes as bnb
    import torch

    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if not isinstance(linear, torch.nn.Linear) or name == "lm_head":
                continue
            with torch.device("meta"):
                quantised = bnb.nn.Linear4bit(
                    linear.in_features,
                    linear.out_features,
                    bias=linear.bias is not None,
                    compute_dtype=torch.bfloat16,
                    compress_statistics=True,
                    quant_type="nf4",
                )
            weight = linear.weight.data
            quantised.weight = bnb.nn.Params4bit(
                weight, requires_grad=False, compress_statistics=True, quant_type="nf4"
            ).to("cuda")
            quantised.bias = linear.bias
            linear.weight = None
            setattr(parent, name, quantised)
    model.is_loaded_in_4bit = True


def peft_model(shape: str, engine: str, *, wide_adapters: bool) -> Any:
    """Build the model with LoRA, in bf16 as TRL trains it or float32, and Liger's kernels."""
    from peft import LoraConfig, get_peft_model

    if engine == "liger":
        import liger_kernel.transformers as liger

        family = SHAPES[shape][0].lower()
        getattr(liger, f"apply_liger_kernel_to_{family}")()
    model = base_model(shape)
    quantize(model)
    model.requires_grad_(False)
    config = LoraConfig(
        r=16,
        lora_alpha=16,
        target_modules=PHI_TARGETS if "phi" in shape else TARGETS,
        task_type="CAUSAL_LM",
    )
    # tuneline's FlatAdamW needs float32 adapters; the others get TRL's bf16, which is faster there.
    return get_peft_model(model, config, autocast_adapter_dtype=wide_adapters)


def unsloth_model(shape: str, case: str, checkpoint: Path) -> Any:
    """Load the same weights through Unsloth, from a checkpoint that its first process writes."""
    import unsloth  # noqa: F401, I001  (before transformers, as it asks)
    import torch

    if not (checkpoint / "config.json").exists():
        peers.write_checkpoint(base_model(shape), checkpoint)
        torch.cuda.empty_cache()
    return peers.unsloth_model(checkpoint, case, PHI_TARGETS if "phi" in shape else TARGETS)


if __name__ == "__main__":
    main()
