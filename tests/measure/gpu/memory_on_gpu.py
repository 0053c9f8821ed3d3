"""Compare the peak memory of training runs with the estimate made before the model is loaded.

    python tests/measure/gpu/memory_on_gpu.py --out-dir DIR     seventeen settings, three shapes
    python tests/measure/gpu/memory_on_gpu.py --only 0 3        some of the settings
    python tests/measure/gpu/memory_on_gpu.py --tiny            all settings, tiny, as a trial

Every setting calls the train step's own `run`, with random weights in the shape of a real model,
which are created on the device. Without a GPU, three small settings run instead, each in a process
of its own, because the resident memory of a process does not shrink.
"""

import argparse
import csv
import dataclasses
import gc
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from gpu_inputs import (
    GIB,
    SMALL_GPU_GIB,
    check_packages,
    gsm8k_lengths,
    say,
    write_base,
    write_dataset,
)

NUM_STEPS = 3
PHI_TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """Settings of one training run."""

    shape: str
    """Name of the model's shape, a key of gpu_inputs.SHAPES."""
    rows: int
    """Examples, or packs, per micro-batch."""
    length: int
    """Tokens per example or pack."""
    recompute: bool = True
    packing: bool = True
    kernels: Literal["off", "lean", "free", "host"] = "off"
    """off: no fused kernels; lean: fused, with no memory for activations; free: with all memory;
    host: with SMALL_GPU_GIB, in which the run fits only with its tables in host memory. torch then
    refuses more memory, and a step has two micro-batches."""
    method: str = "sft"
    in_4bit: bool = True
    r: int = 16
    optim: str = "adamw_8bit"

    def __str__(self) -> str:
        words = [
            f"{self.shape:12} {self.method} {self.rows}x{self.length}",
            "packed" if self.packing and self.method != "dpo" else "padded",
            "nf4" if self.in_4bit else "16 bit",
            ("recompute" if self.recompute else "keep")
            if self.kernels == "off"
            else f"kernels {self.kernels}",
            f"r={self.r} {self.optim}" if (self.r, self.optim) != (16, "adamw_8bit") else "",
        ]
        return " ".join(filter(None, words))


ON_GPU = [
    Setting("Llama-3.1-8B", 4, 2048),
    Setting("Llama-3.1-8B", 1, 2048, recompute=False, packing=False),
    Setting("Llama-3.1-8B", 1, 8192, kernels="lean"),
    Setting("Llama-3.1-8B", 1, 8192, kernels="free"),
    Setting("Llama-3.1-8B", 2, 512, kernels="free", method="dpo"),
    Setting("Qwen2.5-7B", 2, 4096, packing=False),
    Setting("Qwen2.5-7B", 4, 2048, kernels="lean"),
    Setting("Qwen2.5-7B", 2, 1024, method="dpo"),
    Setting("Phi-3.5-mini", 2, 2048, recompute=False, packing=False),
    Setting("Phi-3.5-mini", 4, 2048, in_4bit=False, r=64, optim="adamw_torch"),
    Setting("Phi-3.5-mini", 4, 2048, kernels="free"),
    Setting("Llama-3.1-8B", 1, 4096, r=256, optim="adamw_torch"),
    # The settings of the guide's tables: batches of 8 and of 2, and LoRA on 16-bit weights.
    Setting("Llama-3.1-8B", 8, 2048),
    Setting("Llama-3.1-8B", 2, 2048),
    Setting("Llama-3.1-8B", 2, 2048, in_4bit=False),
    Setting("Llama-3.1-8B", 1, 2048, kernels="host"),
    Setting("Llama-3.1-8B", 1, 1024, kernels="host", method="dpo"),
]
ON_CPU = [
    Setting("small", 4, 256),
    Setting("small", 2, 512, recompute=False),
    Setting("small", 2, 256, method="dpo", in_4bit=False, r=32, optim="adamw_torch"),
]


def main() -> None:
    """Print one line per setting, and the largest deviation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", type=int, metavar="N", help="indices of settings")
    parser.add_argument("--out-dir", type=Path, help="for memory.csv")
    parser.add_argument(
        "--deadline", type=float, default=230, help="start no run after this many seconds"
    )
    parser.add_argument("--tiny", action="store_true", help="two small layers and short rows")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        print(json.dumps(measure(ON_CPU[args.child])))
        return
    began = time.monotonic()
    check_packages()
    import torch

    has_gpu = torch.cuda.is_available()
    in_process = has_gpu or args.tiny
    settings = ON_GPU if in_process else ON_CPU
    if args.tiny:
        settings = [
            dataclasses.replace(setting, shape="tiny", length=setting.length // 32)
            for setting in settings
        ]
    say(f"{torch.cuda.get_device_name() if has_gpu else 'CPU'}, torch {torch.__version__}; GiB")
    heads = f"{'estimate':>8} {'peak':>7} {'reserved':>8} {'before':>6} {'ratio':>6} {'s':>5}"
    say(f"{'setting':62} {heads}")
    rows = []
    for number, setting in enumerate(settings):
        if args.only and number not in args.only:
            continue
        if time.monotonic() - began > args.deadline:
            say(f"{setting!s:62} not started: {args.deadline:.0f} s have passed")
            continue
        start = time.monotonic()
        measured = measure(setting) if in_process else measure_apart(number)
        seconds = time.monotonic() - start
        if "error" in measured:
            say(f"{setting!s:62} {measured['error'][:400]}")
            continue
        ratio = measured["estimate"] / measured["peak"]
        say(
            f"{setting!s:62} {measured['estimate'] / GIB:8.2f} {measured['peak'] / GIB:7.2f} "
            f"{measured['reserved'] / GIB:8.2f} {measured['before'] / GIB:6.2f} {ratio:6.3f} "
            f"{seconds:5.1f}  {measured['parts']}"
        )
        rows.append(
            {
                **dataclasses.asdict(setting),
                "estimate_gib": round(measured["estimate"] / GIB, 3),
                "peak_gib": round(measured["peak"] / GIB, 3),
                "reserved_gib": round(measured["reserved"] / GIB, 3),
                "ratio": round(ratio, 4),
                "parts": measured["parts"],
            }
        )
        if args.out_dir:
            write_csv(args.out_dir / "memory.csv", rows)
    if rows:
        worst = max((row["ratio"] for row in rows), key=lambda ratio: abs(ratio - 1))
        within = sum(abs(row["ratio"] - 1) <= 0.1 for row in rows)
        say(f"{within} of {len(rows)} within 10 %, furthest from 1: {worst:.3f}")
    say(f"{time.monotonic() - began:.0f} s in total")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the results so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def measure_apart(number: int) -> dict[str, Any]:
    """Measure one setting in a process of its own."""
    command = [sys.executable, __file__, "--child", str(number)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def measure(setting: Setting) -> dict[str, Any]:
    """Train for a few steps, and return the estimate and the measured peaks in bytes."""
    import torch

    from tuneline.models import nf4
    from tuneline.train import within_memory
    from tuneline.train.config import TrainConfig
    from tuneline.train.run import run as train

    load_base, run_on_ranks = nf4.load_base, within_memory.run_on_ranks
    has_gpu = torch.cuda.is_available()
    before = torch.cuda.memory_allocated() if has_gpu else 0
    estimates = Estimates()
    with tempfile.TemporaryDirectory() as root:
        base = Path(root, "base")
        write_base(base, setting.shape)
        write_rows(Path(root, "dataset"), setting)
        if has_gpu or setting.shape == "tiny":
            nf4.load_base = random_base
            # A rank of its own process would not see the function above.
            within_memory.run_on_ranks = run_here
        else:
            # In a process of its own, so that its memory does not count as the run's.
            code = "import sys, gpu_inputs as g; g.write_weights(g.Path(sys.argv[1]))"
            subprocess.run(
                [sys.executable, "-c", code, str(base)], check=True, cwd=Path(__file__).parent
            )
        logger = logging.getLogger("tuneline.train.memory.plan")
        logger.addHandler(estimates)
        logger.setLevel(logging.INFO)
        if has_gpu:
            total = torch.cuda.mem_get_info()[1]
            limit = SMALL_GPU_GIB * GIB + before if setting.kernels == "host" else total
            torch.cuda.set_per_process_memory_fraction(limit / total)
        try:
            summary = train(
                TrainConfig.parse(train_config(setting)),
                base_model_dir=base,
                dataset_dir=Path(root, "dataset"),
                adapter_dir=Path(root, "adapter"),
                curves_path=Path(root, "curves.html"),
            )
        except Exception as error:
            return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        finally:
            nf4.load_base, within_memory.run_on_ranks = load_base, run_on_ranks
            logger.removeHandler(estimates)
            gc.collect()
            if has_gpu:
                reserved = torch.cuda.max_memory_reserved()
                torch.cuda.empty_cache()
    return {
        "estimate": summary.estimated_peak_bytes,
        # The embedding of an earlier setting stays in this process, which only happens here.
        "peak": summary.peak_memory_bytes - before,
        "reserved": reserved if has_gpu else summary.peak_memory_bytes,
        "before": before,
        "parts": f"{estimates.last} {summary.fitted}".strip(),
    }


def run_here(
    num_ranks: int, function: Callable[..., Any], arguments: dict[str, Any], **unused: Any
) -> Any:
    """Call the function of the only rank in this process."""
    assert num_ranks == 1
    return function(**arguments)


class Estimates(logging.Handler):
    """Keeps the last memory estimate that the step has logged."""

    last = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the estimate of a log record about memory."""
        if record.msg.startswith("memory:"):
            self.last = str(record.args[0])  # type: ignore[index]


def train_config(setting: Setting) -> dict[str, Any]:
    """Return the TrainConfig of a setting, as a dictionary."""
    return {
        "lora": {
            "r": setting.r,
            "target_modules": PHI_TARGETS if "Phi" in setting.shape else "all-linear",
        },
        "load_in_4bit": setting.in_4bit,
        "max_steps": NUM_STEPS,
        "warmup_steps": 0,
        "global_batch_size": setting.rows * (2 if setting.kernels == "host" else 1),
        "micro_batch_size": setting.rows,
        "packing": setting.packing,
        "optim": setting.optim,
        "gradient_checkpointing": setting.recompute,
        "kernels": "off" if setting.kernels == "off" else "auto",
        # Too little memory to keep any activations.
        "memory_gib": {"lean": 0.1, "host": SMALL_GPU_GIB}.get(setting.kernels),
        "fit": "auto" if setting.kernels == "host" else "off",
        "num_ranks": 1,
    }


def write_rows(directory: Path, setting: Setting) -> None:
    """Write rows that fill every micro-batch; packed ones have lengths like GSM8K's."""
    num_rows = NUM_STEPS * train_config(setting)["global_batch_size"]
    lengths = [setting.length] * num_rows
    if setting.packing and setting.method != "dpo":
        lengths = gsm8k_lengths(num_rows * setting.length, min(1.0, setting.length / 2048))
    write_dataset(
        directory,
        lengths,
        max_seq_length=setting.length,
        method=setting.method,
        max_token=500 if setting.shape == "tiny" else 30000,
    )


def random_base(base_model_dir: Any, *, dtype: Any, device: str, quantized: bool) -> Any:
    """Create a random model on the device with the shape of a directory's config.

    It has the layers and types of a model that `nf4.load_base` loads.

    Args:
        base_model_dir: Directory with the model's config.
        dtype: Type of the weights that are not quantised.
        device: Device of the model.
        quantized: Whether to quantise the linear layers to NF4.
    """
    import bitsandbytes
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    from tuneline.models import nf4

    nf4.keep_plain_layout_on_cpu()
    packed = nf4.quantized_modules(nf4.empty_model(base_model_dir)) if quantized else set()
    # Buffers are computed on creation; weights are made one by one, as a loader does, because all
    # of them in 16 bits would not fit into a small GPU.
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base_model_dir))
    for name, parameter in list(model.named_parameters()):
        owner, _, field = name.rpartition(".")
        weight = torch.ones(parameter.shape, dtype=dtype, device=device)
        if weight.ndim > 1:
            weight.normal_(std=0.02)
        module = model.get_submodule(owner)
        if owner in packed and field == "weight":
            module = nf4_layer(module, dtype)
            module.weight = bitsandbytes.nn.Params4bit(
                weight, requires_grad=False, compress_statistics=True, quant_type="nf4"
            ).to(device)
            model.set_submodule(owner, module)
        else:
            setattr(module, field, torch.nn.Parameter(weight, requires_grad=False))
    model.tie_weights()
    model.to(device)
    model.is_loaded_in_4bit = quantized
    return model


def nf4_layer(linear: Any, dtype: Any) -> Any:
    """Return a 4-bit layer without weights in the shape of a linear layer, with its bias."""
    import bitsandbytes
    import torch

    with torch.device("meta"):
        layer = bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=dtype,
            compress_statistics=True,
            quant_type="nf4",
        )
    layer.bias = linear.bias
    return layer


if __name__ == "__main__":
    main()
