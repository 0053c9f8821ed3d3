"""Run the steps of the whole line on an 8B shape with random weights on one GPU, and measure each.

    python tests/measure/gpu/whole_line_on_gpu.py --tokenizer DIR --rows FILE --work-dir DIR
    python tests/measure/gpu/whole_line_on_gpu.py ... --parts gptq gate   go on in the same DIR
    python tests/measure/gpu/whole_line_on_gpu.py ... --shape small --steps 2     a trial on a CPU

DIR holds the files of a tokenizer with a chat template, and FILE rows with `question` and `answer`
as JSON Lines, e.g. those of GSM8K. Each step runs as its container does, in a process of its own.
Prints per step the seconds, the largest memory of the GPU and of the host (resident memory of the
step's processes), how long and how much the GPU was used, and the bytes of the outputs. Writes the
same to results.json and the logs of the steps to `--out-dir`.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_inputs
from gpu_inputs import GIB, ROOT, SHAPES, say

PARTS = (
    *("fetch", "prepare", "base", "train", "merge", "tuned", "gptq", "q4_k_m", "gate"),
    *("report", "publish"),
)
SECONDS_BETWEEN_LOOKS = 0.25
Arguments = dict[str, str | Path | list[Path]]
EXACT, CERTAIN = "heldout_exact", "heldout_perplexity"


def main() -> None:
    """Run the parts one after another until the time is up, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--out-dir", type=Path, default=Path("."))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="Llama-3.1-8B")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--max-rows", type=int, default=None)
    parser.add_argument("--heldout-rows", type=int, default=200)
    parser.add_argument(
        "--deadline", type=float, default=560, help="end every step after that, in s"
    )
    args = parser.parse_args()
    began = time.monotonic()
    gpu_inputs.check_packages()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    source = args.work_dir / "source"
    if not source.exists():
        write_source(source, args.shape, args.tokenizer)
        say(f"random weights written in {time.monotonic() - began:.0f} s")
    results: dict[str, Any] = {}
    for part, (module, config, arguments) in commands(args).items():
        left = args.deadline - (time.monotonic() - began)
        if part not in args.parts or left < 5:
            continue
        results[part] = measure(part, module, config, arguments, args, left)
        (args.out_dir / "results.json").write_text(json.dumps(results, indent=1))
        if results[part]["code"]:
            say((args.out_dir / f"{part}.log").read_text(errors="replace")[-3000:])
    say("step | s | GPU GiB | host GiB | GPU used, % of time (mean use) | output GB | exit code")
    for part, row in results.items():
        say(
            f"{part} | {row['seconds']:.1f} | {row['gpu_gib']:.1f} | {row['host_gib']:.1f} | "
            f"{row['busy_percent']:.0f} ({row['mean_use']:.0f}) | {row['output_gb']:.2f} | "
            f"{row['code']}"
        )


def write_source(directory: Path, shape: str, tokenizer: Path) -> None:
    """Write what a user downloads: config, random weights, and the tokenizer's files."""
    unfinished = directory.with_name("unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    gpu_inputs.write_base(unfinished, shape)
    for path in unfinished.iterdir():
        if path.name not in ("config.json", "generation_config.json"):
            path.unlink()
    for path in tokenizer.iterdir():
        if path.name.startswith(("tokenizer", "chat_template", "special_tokens")):
            shutil.copyfile(path, unfinished / path.name)
    names = json.loads((tokenizer / "config.json").read_text())
    config = json.loads((unfinished / "config.json").read_text())
    ends = {name: names[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (unfinished / "config.json").write_text(json.dumps({**config, **ends}))
    gpu_inputs.write_weights(unfinished)
    unfinished.rename(directory)


def commands(args: argparse.Namespace) -> dict[str, tuple[str, dict[str, Any], Arguments]]:
    """Return module, section of the recipe and arguments of each part, in the line's order."""
    work = args.work_dir
    base, dataset = work / "base", work / "dataset"
    models = {"base-model": base, "dataset": dataset}
    base_scores, tuned_scores = work / "base-scores", work / "tuned-scores"
    merged, exported = work / "merged", work / "gptq"
    decision, adapter = work / "decision", work / "adapter"
    recipe = {
        "name": "whole-line",
        "base_model": str(work / "source"),
        "dataset": str(args.rows.resolve()),
        "publish_to": f"dir:{work / 'published-model'}",
    }
    tuned = {**models, "adapter": adapter, "merged": merged, "decision": decision}
    exports = [exported, work / "q4_k_m"]
    evaluate = {"tasks": [EXACT, CERTAIN], "max_new_tokens": 128}
    quantize = {"num_benchmark_rows": 0}
    return {
        "fetch": ("fetch", {}, {"source": work / "source", "base-model": base}),
        "prepare": (
            "prepare",
            {
                "columns": {"prompt": "question", "completion": "answer"},
                "max_seq_length": 8192,
                "max_rows": args.max_rows,
                "heldout": {"max_rows": args.heldout_rows},
            },
            {
                "source": args.rows.resolve(),
                **models,
                "statistics": work / "statistics.html",
                "uploads": work / "uploads",
            },
        ),
        "base": (
            "evaluate",
            evaluate,
            {
                "label": "base",
                "model": base,
                "dataset": dataset,
                "scores": work / "base-scores",
            },
        ),
        "train": (
            "train",
            {
                "max_steps": args.steps,
                "global_batch_size": 1,
                "micro_batch_size": 1,
                "eval_steps": args.steps,
                "price_per_hour": 2.5,
            },
            {**models, "adapter": adapter, "curves": work / "curves.html"},
        ),
        "merge": ("merge", {}, {**models, "adapter": adapter, "merged": merged}),
        "tuned": (
            "evaluate",
            evaluate,
            {
                "label": "tuned",
                "model": merged,
                "dataset": dataset,
                "scores": tuned_scores,
            },
        ),
        "gptq": (
            "quantize",
            quantize,
            {
                "format": "gptq-4bit",
                "merged": merged,
                "dataset": dataset,
                "quantized": exported,
            },
        ),
        "q4_k_m": (
            "quantize",
            quantize,
            {
                "format": "q4_k_m",
                "merged": merged,
                "dataset": dataset,
                "quantized": work / "q4_k_m",
            },
        ),
        "gate": (
            "gate",
            {"target_tasks": [CERTAIN]},
            {
                "base-scores": base_scores,
                "tuned-scores": tuned_scores,
                "decision": decision,
                "merged": merged,
            },
        ),
        "report": (
            "report",
            recipe,
            {
                **tuned,
                "base-scores": base_scores,
                "tuned-scores": tuned_scores,
                "exports": exports,
                "page": work / "report.html",
                "summary": work / "summary",
            },
        ),
        "publish": (
            "publish",
            {},
            {
                **tuned,
                "target": recipe["publish_to"],
                "recipe": json.dumps(recipe),
                "exports": exports,
                "published": work / "published",
            },
        ),
    }


def measure(
    part: str,
    module: str,
    config: dict[str, Any],
    arguments: Arguments,
    args: argparse.Namespace,
    limit: float,
) -> dict[str, Any]:
    """Run a step and return what it took."""
    import psutil

    config_path = args.work_dir / f"{part}.json"
    config_path.write_text(json.dumps(config))
    command = [sys.executable, "-m", f"tuneline.{module}", "--config", str(config_path)]
    for name, value in arguments.items():
        # The exports that were made.
        values = [path for path in value if path.exists()] if isinstance(value, list) else [value]
        command += [f"--{name}", *map(str, values)]
    sources = [str(ROOT / "components"), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    began = time.monotonic()
    with (args.out_dir / f"{part}.log").open("w") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sources))},
        )
    watched = psutil.Process(process.pid)
    gpu = Gpu()
    host = 0
    while process.poll() is None:
        time.sleep(SECONDS_BETWEEN_LOOKS)
        gpu.look()
        host = max(host, resident(watched))
        if time.monotonic() - began > limit:
            say(f"{part}: ended after {limit:.0f} s")
            process.terminate()
            process.wait(60)
    paths = [path for path in arguments.values() if isinstance(path, Path)]
    outputs = [path for path in paths if path.parent == args.work_dir]
    written = {"base": "base-scores", "tuned": "tuned-scores"}.get(part, outputs[-1].name)
    return {
        "seconds": time.monotonic() - began,
        "code": process.returncode,
        "gpu_gib": gpu.peak / GIB,
        "host_gib": host / GIB,
        "busy_percent": 100 * statistics.mean(use > 0 for use in gpu.uses or [0]),
        "mean_use": statistics.mean(gpu.uses or [0]),
        "output_gb": size_of(args.work_dir / written) / 1e9,
    }


class Gpu:
    """Memory and use of the first visible GPU, if there is one."""

    def __init__(self) -> None:
        """Open the device."""
        self.peak = 0
        self.uses: list[int] = []
        try:
            import pynvml

            pynvml.nvmlInit()
            first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
            self._handle = pynvml.nvmlDeviceGetHandleByIndex(int(first))
            self._nvml: Any = pynvml
        except Exception:
            self._nvml = None

    def look(self) -> None:
        """Note the memory that is used now, and the use since the last look."""
        if self._nvml is None:
            return
        self.peak = max(self.peak, self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        self.uses.append(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu)


def resident(process: Any) -> int:
    """Return the private resident bytes of a process and its children."""
    import psutil

    total = 0
    try:
        for one in (process, *process.children(recursive=True)):
            memory = one.memory_info()
            total += memory.rss - memory.shared
    except psutil.Error:
        pass
    return total


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files of a directory."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(one.stat().st_size for one in files if one.is_file())


if __name__ == "__main__":
    main()
