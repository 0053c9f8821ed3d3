"""Base models of random weights and datasets of random tokens, for the scripts in this directory.

The files are those that fetch and prepare write, so the train step runs unchanged.
"""

import contextlib
import importlib.util
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
SOURCES = ("components", "kernels", "kernels/benchmarks", "tests/support")
sys.path[:0] = [str(ROOT / source) for source in SOURCES]

import train_step  # noqa: E402
from packed import row_length  # noqa: E402
from random_weights import GPT_OSS_20B, write_weights  # noqa: E402, F401

GIB = 2**30
SMALL_GPU_GIB = 7.1
"""Memory that a step may take on a GPU with 8 GB: the driver takes 0.4 GiB, and CUDA's context 0.5
GiB."""

LLAMA_8B = train_step.SHAPES["llama-3.1-8b"][1]
LLAMA_1B = {
    **LLAMA_8B,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
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
TINY = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
DEEPSEEK_V2_LITE = {
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3.1-8B": train_step.SHAPES["llama-3.1-8b"],
    "Llama-3.2-1B": ("Llama", LLAMA_1B),
    "Qwen2.5-7B": train_step.SHAPES["qwen2.5-7b"],
    "Phi-3.5-mini": train_step.SHAPES["phi-3.5-mini"],
    "DeepSeek-V2-Lite": ("DeepseekV2", DEEPSEEK_V2_LITE),
    "gpt-oss-20b": ("GptOss", GPT_OSS_20B),
    "small": ("Llama", SMALL),
    "tiny": ("Llama", TINY),
}

NEEDED = (
    *("torch", "transformers", "accelerate", "peft", "trl", "datasets", "bitsandbytes"),
    *("pyarrow", "pydantic", "yaml", "rich", "psutil", "safetensors"),
)


def check_packages(*more: str) -> None:
    """Exit with a message if a package that the train step needs is not installed."""
    missing = [name for name in (*NEEDED, *more) if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"these packages are needed but not installed: {', '.join(missing)}")
    if importlib.util.find_spec("pynvml") is None:
        say("nvidia-ml-py is not installed: GPU utilisation and energy are not measured")


def say(text: str) -> None:
    """Print a line and flush."""
    print(text, flush=True)


def roomy_directory(num_bytes: int) -> Path:
    """Create a directory, in memory if that has twice `num_bytes` free, otherwise on the disk."""
    memory = Path("/dev/shm")
    if memory.is_dir() and shutil.disk_usage(memory).free > 2 * num_bytes:
        return Path(tempfile.mkdtemp(dir=memory))
    return Path(tempfile.mkdtemp())


def write_base(directory: Path, shape: str) -> None:
    """Write the files of a base model that the train step reads, except the weights."""
    import transformers
    from tokenizers import Tokenizer, models

    from tuneline.artifacts import ModelOrigin

    family, sizes = SHAPES[shape]
    config = getattr(transformers, f"{family}Config")(
        **{**sizes, "max_position_embeddings": 16384}, dtype="bfloat16"
    )
    config.architectures = [f"{family}ForCausalLM"]
    config.save_pretrained(directory)
    # The rows are token IDs already, so the tokenizer only needs its special tokens.
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    ).save_pretrained(directory)
    ModelOrigin(
        source=shape,
        architecture=f"{family}ForCausalLM",
        num_parameters=0,
        num_bytes=0,
        sha256="0" * 64,
    ).write(directory)


def write_weights_by_library(directory: Path) -> int:
    """Write what `write_weights` writes under the names that transformers gives published files.

    The whole model is built on the GPU, if there is one.
    """
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(directory, max_shard_size="2GB")
    size = sum(2 * tensor.numel() for tensor in model.parameters())
    del model
    torch.cuda.empty_cache()
    return size


@contextlib.contextmanager
def capped(num_bytes: float) -> Iterator[None]:
    """Let torch refuse more GPU memory in processes that are started meanwhile, as a smaller GPU.

    Args:
        num_bytes: Memory that a process may take; without a GPU it has no effect.
    """
    import torch

    name = "PYTORCH_CUDA_ALLOC_CONF"
    if torch.cuda.is_available():
        share = num_bytes / torch.cuda.mem_get_info()[1]
        os.environ[name] = f"per_process_memory_fraction:{share:.4f}"
    try:
        yield
    finally:
        os.environ.pop(name, None)


def gsm8k_lengths(num_tokens: int, scale: float = 1.0) -> list[int]:
    """Draw row lengths with GSM8K's distribution until they add up to a number of tokens.

    Args:
        num_tokens: Smallest sum of the lengths.
        scale: Factor of each length.
    """
    draw = random.Random(0)
    lengths: list[int] = []
    total = 0
    while total < num_tokens:
        lengths.append(max(4, round(scale * row_length(draw.random() * 10))))
        total += lengths[-1]
    return lengths


def write_dataset(
    directory: Path,
    lengths: list[int],
    *,
    max_seq_length: int,
    method: str = "sft",
    num_eval_rows: int = 0,
    max_token: int = 30000,
) -> Any:
    """Write rows of random tokens. Small token IDs are likelier, so that the loss can fall.

    Args:
        directory: New directory.
        lengths: Tokens per row; for dpo, the tokens of the prompt with either answer.
        max_seq_length: Tokens per pack.
        method: sft, dpo or kto.
        num_eval_rows: Number of evaluation rows, which have the first lengths.
        max_token: Upper bound of the token IDs, exclusive.
    """
    import pyarrow
    import pyarrow.parquet

    from tuneline.artifacts import EVAL_FILE, TRAIN_FILE, DatasetManifest, LengthStatistics

    directory.mkdir(parents=True)
    draw = random.Random(1)

    def tokens(count: int) -> list[int]:
        return [10 + int((max_token - 10) * draw.random() ** 4) for _ in range(count)]

    def row(length: int) -> dict[str, Any]:
        half = length // 2
        if method == "dpo":
            names = ("chosen_ids", "rejected_ids")
            return {"prompt_ids": tokens(length - half)} | {name: tokens(half) for name in names}
        if method == "kto":
            is_good = draw.random() < 0.5
            prompt, answer = tokens(length - half), tokens(half)
            return {"prompt_ids": prompt, "completion_ids": answer, "label": is_good}
        return {"input_ids": tokens(length), "loss_mask": [0] * half + [1] * (length - half)}

    for name, some in ((TRAIN_FILE, lengths), (EVAL_FILE, lengths[:num_eval_rows])):
        if some:
            table = pyarrow.Table.from_pylist([row(length) for length in some])
            pyarrow.parquet.write_table(table, directory / name)
    in_order = sorted(lengths)
    manifest = DatasetManifest(
        source="random",
        method=method,
        format="text",
        template="none",
        loss_on="answers",
        num_train_rows=len(lengths),
        num_eval_rows=num_eval_rows,
        num_heldout_rows=0,
        num_rejected_rows=0,
        num_tokens=sum(lengths),
        num_loss_tokens=0,
        lengths=LengthStatistics(
            mean=sum(lengths) / len(lengths),
            median=in_order[len(lengths) // 2],
            p95=in_order[int(len(lengths) * 0.95)],
            p99=in_order[int(len(lengths) * 0.99)],
            max=in_order[-1],
        ),
        max_seq_length=max_seq_length,
        recommended_max_seq_length=max_seq_length,
        truncated_token_share=0.0,
        sha256=f"{len(lengths):064}",
    )
    manifest.write(directory)
    return manifest


@dataclass
class Run:
    """Results of a train step that ran in a process of its own."""

    name: str
    """Name of the run."""
    code: int
    """Exit code of the process."""
    seconds: float
    """Wall-clock time of the process."""
    summary: dict[str, Any]
    """Content of training.json; empty if the step did not write it."""
    points: list[dict[str, Any]]
    """Lines of progress.jsonl."""
    log: list[str]
    """Lines of the log."""

    @property
    def losses(self) -> dict[int, float]:
        """Training losses by step."""
        return {p["step"]: p["loss"] for p in self.points if p.get("loss") is not None}

    def tokens_per_second(self, first_step: int) -> float:
        """Return the median speed from a step on, in wall-clock time with loading and logging."""
        first_lines = {point["step"]: point for point in reversed(self.points)}
        rates = []
        for step, point in first_lines.items():
            before = first_lines.get(step - 1)
            if before is not None and step >= first_step:
                tokens = point["num_tokens"] - before["num_tokens"]
                rates.append(tokens / (point["time"] - before["time"]))
        return statistics.median(rates) if rates else float("nan")

    def show(self, first_step: int) -> str:
        """Return the results as one line."""
        if not self.summary:
            return f"{self.name}: exit code {self.code} after {self.seconds:.0f} s: {self.log_tail}"
        summary = self.summary
        uses = [point["gpu_use"] for point in self.points if point["gpu_use"] is not None]
        energy = summary["energy_kwh"]
        return (
            f"{self.name}: {self.tokens_per_second(first_step):.0f} tok/s on "
            f"{summary['num_ranks']} rank(s), peak {summary['peak_memory_bytes'] / GIB:.2f} GiB of "
            f"{(summary['estimated_peak_bytes'] or 0) / GIB:.2f} estimated, loss "
            f"{self.losses.get(1, float('nan')):.4f} -> {summary['final_loss']:.4f}, eval "
            f"{summary['first_eval_loss']} -> {summary['final_eval_loss']}, GPU utilisation "
            f"{statistics.mean(uses) if uses else float('nan'):.2f}, "
            f"{'no energy' if energy is None else f'{1000 * energy:.2f} Wh'}, "
            f"{summary['num_resumptions']} resumed, {summary['num_out_of_memory']} out of memory"
            f"{', fitted: ' + summary['fitted'] if summary['fitted'] else ''}; kernels "
            f"{summary['kernels']}; {self.seconds:.0f} s in total"
        )

    @property
    def log_tail(self) -> str:
        """The last lines of the log."""
        return " | ".join(line for line in self.log[-12:] if line.strip())


def train(
    name: str,
    config: dict[str, Any],
    *,
    base: Path,
    dataset: Path,
    work: Path,
    stop_at: int | None = None,
    timeout: float = 150,
    on_log: tuple[str, Callable[[], None]] | None = None,
    program: Sequence[str] = ("-m", "tuneline.train"),
    every_poll: Callable[[], None] = lambda: None,
) -> Run:
    """Run `python -m tuneline.train`.

    Args:
        name: Name of the run; a run resumes from the checkpoints of the same name.
        config: Fields of TrainConfig.
        base: Directory of the base model.
        dataset: Directory of the dataset.
        work: Directory for the files of the run.
        stop_at: Send SIGTERM when progress.jsonl has this step; None lets the run end.
        timeout: Kill the process after this many seconds.
        on_log: A text and a function, which is called once when the text is in the log.
        program: Arguments of Python that start the step, before the step's own arguments.
        every_poll: Function that is called ten times per second while the process runs.
    """
    adapter = work / name / "adapter"
    adapter.parent.mkdir(parents=True, exist_ok=True)
    config_path = work / name / "config.json"
    config_path.write_text(json.dumps(config))
    log_path = work / name / "log.txt"
    command = [sys.executable, *program, "--config", str(config_path)]
    command += ["--base-model", str(base), "--dataset", str(dataset), "--adapter", str(adapter)]
    command += ["--curves", str(work / name / "curves.html")]
    began = time.monotonic()
    sources = [str(ROOT / "components"), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sources))}
    with open(log_path, "w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment
        )
    is_stopped = False
    while process.poll() is None:
        time.sleep(0.1)
        every_poll()
        if time.monotonic() - began > timeout:
            process.kill()
            say(f"{name}: killed after {timeout:.0f} s")
        progress = next(adapter.parent.glob(".checkpoints/*/progress.jsonl"), None)
        if stop_at is not None and not is_stopped and progress and _last_step(progress) >= stop_at:
            process.send_signal(signal.SIGTERM)
            is_stopped = True
        if on_log is not None and on_log[0] in log_path.read_text(errors="replace"):
            on_log[1]()
            on_log = None
    progress_path = adapter / "progress.jsonl"
    if not progress_path.exists():
        kept = adapter.parent.glob(".checkpoints/*/progress.jsonl")
        progress_path = next(kept, progress_path)
    summary = adapter / "training.json"
    return Run(
        name=name,
        code=process.returncode,
        seconds=time.monotonic() - began,
        summary=json.loads(summary.read_text()) if summary.exists() else {},
        points=_lines(progress_path),
        log=log_path.read_text(errors="replace").splitlines(),
    )


def largest_difference(one: dict[int, float], other: dict[int, float], steps: range) -> float:
    """Return the largest difference of two losses of the same step; -1 if they share no step.

    Args:
        one: Losses by step.
        other: Losses by step.
        steps: Steps to compare.
    """
    return max((abs(one[s] - other[s]) for s in steps if s in one and s in other), default=-1.0)


def _last_step(path: Path) -> int:
    points = _lines(path)
    return points[-1]["step"] if points else 0


def _lines(path: Path) -> list[dict[str, Any]]:
    points = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            points.append(json.loads(line))
        except ValueError:
            break  # The process is still writing the line.
    return points
