"""Measure the host memory and the time that the steps of GGUF and FP8 take; run by hand.

    python tests/measure/proof_memory.py --layers 16 --hidden 2048 --directory /tmp/proof

Makes a random bf16 model in the proportions of Llama 3 (32 layers of 4096 are 16 GB) with the
tokenizer of SmolLM2. Then runs each step in its own process, and prints its seconds and two peaks:
anonymous memory, which has to fit into a pod's limit, and mapped files, which the kernel can drop
and read again. The child processes of a step are included.
"""

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "support"))

from random_weights import write_weights  # noqa: E402

STEPS = ("convert", "importance", "f16", "q8_0", "q4_k_m", "fp8")
HEAD_DIM = 128
ROWS = 8


def make(directory: Path, *, num_layers: int, hidden: int, vocab: int, tied: bool) -> None:
    """Write merged/, a tensor at a time, and dataset/."""
    import pyarrow
    import pyarrow.parquet
    from transformers import AutoTokenizer, LlamaConfig

    from tuneline.artifacts import (
        HELDOUT_FILE,
        INPUT_IDS,
        TRAIN_FILE,
        DatasetManifest,
        LengthStatistics,
        MergeProof,
        write_jsonl,
    )
    from tuneline.models.tokenizer.files import copy_tokenizer

    small, merged, dataset = (directory / name for name in ("small", "merged", "dataset"))
    directory.mkdir(parents=True)
    subprocess.run(
        [
            *(sys.executable, "-m", "tuneline.fetch", "--source", "builtin:smollm2-135m"),
            *("--base-model", str(small)),
        ],
        check=True,
    )
    merged.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(small)
    LlamaConfig(
        hidden_size=hidden,
        intermediate_size=7 * hidden // 2,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden // HEAD_DIM,
        num_key_value_heads=max(1, hidden // HEAD_DIM // 4),
        vocab_size=vocab,
        max_position_embeddings=8192,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(merged)
    copy_tokenizer(small, merged)
    write_weights(merged)
    MergeProof(
        base="original",
        dtype="bfloat16",
        num_bytes=sum(path.stat().st_size for path in merged.glob("*.safetensors")),
        num_shards=len(list(merged.glob("*.safetensors"))),
        num_merged_modules=1,
        num_prompts=1,
        max_logit_difference=0.0,
        mean_kl=0.0,
        top1_agreement=1.0,
        max_mean_kl=0.01,
    ).write(merged)
    dataset.mkdir()
    text = "How much memory is that, in Mi, if a pod asks for it in Gi and gets it? " * 12
    rows = tokenizer([f"{number} Gi: {text}" for number in range(ROWS)])["input_ids"]
    column = pyarrow.array(rows, pyarrow.list_(pyarrow.int32()))
    pyarrow.parquet.write_table(pyarrow.table({INPUT_IDS: column}), dataset / TRAIN_FILE)
    heldout = {"prompt": f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"}
    heldout |= {"answer": text, "end": "<|im_end|>\n", "question": text}
    write_jsonl(dataset / HELDOUT_FILE, [heldout] * ROWS)
    DatasetManifest(
        source="rows.jsonl",
        method="sft",
        format="messages",
        template="tokenizer",
        loss_on="answers",
        num_train_rows=ROWS,
        num_eval_rows=0,
        num_heldout_rows=ROWS,
        num_rejected_rows=0,
        num_tokens=1,
        num_loss_tokens=1,
        lengths=LengthStatistics(mean=1, median=1, p95=1, p99=1, max=1),
        max_seq_length=512,
        recommended_max_seq_length=512,
        truncated_token_share=0.0,
        sha256="7" * 64,
    ).write(dataset)


class Peaks(threading.Thread):
    """Records the peaks of this process and its child processes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.anonymous_bytes = self.file_bytes = 0

    def run(self) -> None:
        while True:
            anonymous = file = 0
            for process in (os.getpid(), *_children()):
                status = _status(process)
                anonymous += status.get("RssAnon", 0) + status.get("RssShmem", 0)
                file += status.get("RssFile", 0)
            self.anonymous_bytes = max(self.anonymous_bytes, anonymous)
            self.file_bytes = max(self.file_bytes, file)
            time.sleep(0.02)


def _children() -> list[int]:
    listed = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return [int(number) for number in listed.split()]


def _status(process: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    pairs = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): 1024 * int(value) for name, value, _ in pairs}


def measure(directory: Path, step: str, num_prompts: int) -> None:
    """Run one step in this process and print its seconds and peaks."""
    from tuneline.quantize import QuantizeConfig
    from tuneline.quantize.gguf.importance import measure_importance
    from tuneline.quantize.run import convert, run

    merged, gguf, dataset = (str(directory / name) for name in ("merged", "gguf", "dataset"))
    # The bounds are not meant for a random model.
    lenient = {step: 10.0} if step[0] == "q" or step == "fp8" else {}
    config = QuantizeConfig(
        num_importance_rows=ROWS,
        num_proof_prompts=num_prompts,
        max_mean_kl=lenient,
        min_top1_agreement=dict.fromkeys(lenient, 0.0),
    )
    out = directory / f"out-{step}"
    peaks = Peaks()
    peaks.start()
    began, quality = time.monotonic(), ""
    if step == "convert":
        convert(merged_dir=merged, gguf_dir=gguf)
    elif step == "importance":
        measure_importance(config, gguf_dir=gguf, dataset_dir=dataset, importance_dir=str(out))
    else:
        importance = str(directory / "out-importance")
        record = run(
            config,
            format=step,
            merged_dir=merged,
            gguf_dir=None if step == "fp8" else gguf,
            dataset_dir=dataset,
            importance_dir=importance if Path(importance).is_dir() else None,
            quantized_dir=str(out),
        )
        quality = f", KL {record.mean_kl:.2g}"
    print(
        f"{step}: {time.monotonic() - began:.0f} s, anonymous {peaks.anonymous_bytes / 2**30:.2f} "
        f"GiB, files {peaks.file_bytes / 2**30:.2f} GiB{quality}",
        flush=True,
    )


def main() -> None:
    """Make the model, and run the steps one after another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--prompts", type=int, default=8, help="rows of 256 tokens to compare on")
    parser.add_argument("--child")
    arguments = parser.parse_args()
    directory = arguments.directory
    if arguments.child:
        measure(directory, arguments.child, arguments.prompts)
        return
    if not directory.exists():
        make(
            directory,
            num_layers=arguments.layers,
            hidden=arguments.hidden,
            vocab=arguments.vocab,
            tied=arguments.tied,
        )
    size = sum(path.stat().st_size for path in (directory / "merged").glob("*.safetensors"))
    print(f"{size / 1e9:.2f} GB in bf16:", flush=True)
    for step in arguments.steps:
        command = [sys.executable, str(Path(__file__).resolve()), "--directory", str(directory)]
        command += ["--prompts", str(arguments.prompts), "--child", step]
        done = subprocess.run(command, capture_output=True, text=True)
        print(done.stdout or f"{step}: {done.stderr[-2000:]}", end="", flush=True)
        if step not in ("convert", "importance"):
            shutil.rmtree(directory / f"out-{step}", ignore_errors=True)


if __name__ == "__main__":
    main()
