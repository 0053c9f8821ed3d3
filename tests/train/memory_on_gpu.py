"""Measure the peak memory of training runs against what is estimated before they load a model.

    python tests/train/memory_on_gpu.py                 eight settings, three model shapes, one GPU
    python tests/train/memory_on_gpu.py --only 0 3      some of them

Every setting goes through the train step's own `run`, on random weights in the shape of a real
model, which are made on the device. Without a GPU three small settings run instead, each in a
process of its own, because resident memory does not fall again.
"""

import argparse
import dataclasses
import gc
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "components"), str(ROOT / "kernels")]

GIB = 2**30
NUM_STEPS = 3

LLAMA = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
QWEN = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
PHI = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "pad_token_id": 0,
}
SMALL = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
SHAPES = {
    "Llama-3.1-8B": ("Llama", LLAMA),
    "Qwen2.5-7B": ("Qwen2", QWEN),
    "Phi-3.5-mini": ("Phi3", PHI),
    "small": ("Llama", SMALL),
}
PHI_TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One run."""

    shape: str
    rows: int
    length: int
    recompute: bool = True
    packing: bool = True
    kernels: bool = False
    """Whether our kernels run; then as lean as they can, which is what the estimate is of."""
    method: str = "sft"
    in_4bit: bool = True
    r: int = 16
    optim: str = "adamw_8bit"

    def __str__(self) -> str:
        words = [
            f"{self.shape:12} {self.method} {self.rows}x{self.length}",
            "packed" if self.packing and self.method != "dpo" else "padded",
            "nf4" if self.in_4bit else "16 bit",
            "recompute" if self.recompute else "keep",
            "kernels" if self.kernels else "",
            f"r={self.r} {self.optim}" if (self.r, self.optim) != (16, "adamw_8bit") else "",
        ]
        return " ".join(filter(None, words))


ON_GPU = [
    Setting("Llama-3.1-8B", 4, 2048),
    Setting("Llama-3.1-8B", 1, 2048, recompute=False, packing=False),
    Setting("Llama-3.1-8B", 1, 8192, kernels=True),
    Setting("Qwen2.5-7B", 2, 4096, packing=False),
    Setting("Qwen2.5-7B", 4, 2048, kernels=True),
    Setting("Qwen2.5-7B", 2, 1024, method="dpo"),
    Setting("Phi-3.5-mini", 2, 2048, recompute=False, packing=False),
    Setting("Phi-3.5-mini", 4, 2048, in_4bit=False, r=64, optim="adamw_torch"),
]
ON_CPU = [
    Setting("small", 4, 256),
    Setting("small", 2, 512, recompute=False),
    Setting("small", 2, 256, method="dpo", in_4bit=False, r=32, optim="adamw_torch"),
]


def main() -> None:
    """Print a line a setting, and the largest deviation."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", type=int, metavar="N", help="numbers of settings")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    settings = ON_GPU if has_gpu else ON_CPU
    if args.child is not None:
        print(json.dumps(measure(settings[args.child])))
        return
    began = time.monotonic()
    name = torch.cuda.get_device_name() if has_gpu else "CPU"
    print(f"{name}, torch {torch.__version__}; GiB", flush=True)
    print(f"{'setting':58} {'estimate':>8} {'peak':>7} {'reserved':>8} {'ratio':>6} {'s':>5}")
    ratios = []
    for number, setting in enumerate(settings):
        if args.only and number not in args.only:
            continue
        start = time.monotonic()
        found = measure(setting) if has_gpu else measure_apart(number)
        seconds = time.monotonic() - start
        if "error" in found:
            print(f"{setting!s:58} {found['error'][:300]}", flush=True)
            continue
        ratios.append(found["estimate"] / found["peak"])
        print(
            f"{setting!s:58} {found['estimate'] / GIB:8.2f} {found['peak'] / GIB:7.2f} "
            f"{found['reserved'] / GIB:8.2f} {ratios[-1]:6.3f} {seconds:5.1f}  {found['parts']}",
            flush=True,
        )
    if ratios:
        worst = max(ratios, key=lambda ratio: abs(ratio - 1))
        print(f"furthest from 1: {worst:.3f}; {time.monotonic() - began:.0f} s in all")


def measure_apart(number: int) -> dict[str, Any]:
    """Measure one setting in a process of its own."""
    command = [sys.executable, __file__, "--child", str(number)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def measure(setting: Setting) -> dict[str, Any]:
    """Train for a few steps; return the estimate and the peaks in bytes."""
    import torch

    from tuneline import nf4
    from tuneline.train import kernels
    from tuneline.train import run as train
    from tuneline.train.config import TrainConfig
    from tuneline.train.fit import run_settings
    from tuneline.train.memory import estimate_memory, model_shape
    from tuneline.train.precision import choose_device, choose_dtype

    load_base, patch = nf4.load_base, kernels.patch
    has_gpu = torch.cuda.is_available()
    config = train_config(setting, TrainConfig)
    with tempfile.TemporaryDirectory() as root:
        base, dataset = Path(root, "base"), Path(root, "dataset")
        write_base(base, setting)
        manifest = write_dataset(dataset, setting)
        if has_gpu:
            nf4.load_base = random_base
            kernels.patch = lambda model, budget="lean": patch(model, budget=budget)
        else:
            write_weights(base)
        try:
            summary = train(
                config,
                base_model_dir=base,
                dataset_dir=dataset,
                adapter_dir=Path(root, "adapter"),
                curves_path=Path(root, "curves.html"),
            )
        except Exception as error:
            return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        finally:
            nf4.load_base, kernels.patch = load_base, patch
            gc.collect()
        reserved = summary.peak_memory_bytes
        if has_gpu:
            reserved = torch.cuda.max_memory_reserved()
            torch.cuda.empty_cache()
        shape = model_shape(base, config.lora)
        assert shape is not None
        device = choose_device()
        settings = run_settings(
            config,
            manifest,
            itemsize=choose_dtype(config, device).itemsize,
            device=device,
            fused=setting.kernels,
        )
    return {
        "estimate": summary.estimated_peak_bytes,
        "peak": summary.peak_memory_bytes,
        "reserved": reserved,
        "parts": str(estimate_memory(shape, settings)),
    }


def train_config(setting: Setting, model: Any) -> Any:
    """Return the recipe's part."""
    return model.parse(
        {
            "lora": {
                "r": setting.r,
                "target_modules": PHI_TARGETS if "Phi" in setting.shape else "all-linear",
            },
            "load_in_4bit": setting.in_4bit,
            "max_steps": NUM_STEPS,
            "warmup_steps": 0,
            "per_device_train_batch_size": setting.rows,
            "gradient_accumulation_steps": 1,
            "packing": setting.packing,
            "optim": setting.optim,
            "gradient_checkpointing": setting.recompute,
            "kernels": "auto" if setting.kernels else "off",
            "fit": "off",
        }
    )


def write_base(directory: Path, setting: Setting) -> None:
    """Write what a run reads of a base but its weights."""
    import transformers
    from tokenizers import Tokenizer, models

    from tuneline.artifacts import ModelOrigin

    family, sizes = SHAPES[setting.shape]
    config = getattr(transformers, f"{family}Config")(
        **sizes, max_position_embeddings=16384, dtype="bfloat16"
    )
    config.architectures = [f"{family}ForCausalLM"]
    config.save_pretrained(directory)
    # Nobody asks it for a token: the rows are tokens already.
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    ).save_pretrained(directory)
    ModelOrigin(
        source=setting.shape,
        architecture=f"{family}ForCausalLM",
        num_parameters=0,
        num_bytes=0,
        sha256="0" * 64,
    ).write(directory)


def write_dataset(directory: Path, setting: Setting) -> Any:
    """Write random rows that fill every batch of the run."""
    import pyarrow
    import pyarrow.parquet

    from tuneline.artifacts import TRAIN_FILE, DatasetManifest, LengthStatistics

    directory.mkdir()
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(10, 30000) for _ in range(count)]

    length, half = setting.length, setting.length // 2
    num_rows = NUM_STEPS * setting.rows
    if setting.method == "dpo":
        names = ("chosen_ids", "rejected_ids")
        rows = [
            {"prompt_ids": tokens(length - half)} | {name: tokens(half) for name in names}
            for _ in range(num_rows)
        ]
    else:
        if setting.packing:
            # Rows of an eighth of a pack: a batch holds as many tokens, and attention its borders.
            num_rows, length = 8 * num_rows, length // 8
        mask = [0] * (length // 2) + [1] * (length - length // 2)
        rows = [{"input_ids": tokens(length), "loss_mask": mask} for _ in range(num_rows)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), directory / TRAIN_FILE)
    manifest = DatasetManifest(
        source="random",
        method=setting.method,
        format="text",
        template="none",
        loss_on="answers",
        num_train_rows=len(rows),
        num_eval_rows=0,
        num_heldout_rows=0,
        num_rejected_rows=0,
        num_tokens=0,
        num_loss_tokens=0,
        lengths=LengthStatistics(mean=length, median=length, p95=length, p99=length, max=length),
        max_seq_length=setting.length,
        recommended_max_seq_length=setting.length,
        truncated_token_share=0.0,
        sha256="0" * 64,
    )
    manifest.write(directory)
    return manifest


def write_weights(directory: Path) -> None:
    """Write random weights; in a process of its own, so that its memory is none of the run's."""
    code = (
        "import sys, torch; from transformers import AutoConfig, AutoModelForCausalLM as M; "
        "M.from_config(AutoConfig.from_pretrained(sys.argv[1]))"
        ".to(torch.bfloat16).save_pretrained(sys.argv[1])"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(directory)], check=True, stdout=subprocess.DEVNULL
    )


def random_base(base_model_dir: Any, *, dtype: Any, device: str, quantized: bool) -> Any:
    """Make a model of a directory's shape on the GPU, as `nf4.load_base` would load it."""
    import bitsandbytes
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tuneline import nf4

    packed = nf4.quantized_modules(nf4.empty_model(base_model_dir)) if quantized else set()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base_model_dir))
    finally:
        torch.set_default_dtype(torch.float32)
    for name in packed:
        linear = model.get_submodule(name)
        with torch.device("meta"):
            replacement = bitsandbytes.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                compute_dtype=dtype,
                compress_statistics=True,
                quant_type="nf4",
            )
        replacement.weight = bitsandbytes.nn.Params4bit(
            linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
        ).to(device)
        replacement.bias = linear.bias
        linear.weight = None
        model.set_submodule(name, replacement)
    model.requires_grad_(False)
    model.is_loaded_in_4bit = quantized
    gc.collect()
    torch.cuda.empty_cache()
    # The 16-bit weights were there all at once; a loader never has more than one of them.
    torch.cuda.reset_peak_memory_stats()
    return model


if __name__ == "__main__":
    main()
