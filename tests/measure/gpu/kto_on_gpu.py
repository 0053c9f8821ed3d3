"""Compare KTO of an 8B shape with QLoRA: tuneline's train step beside TRL's KTOTrainer, on one GPU.

    python tests/measure/gpu/kto_on_gpu.py                        both, for 14 steps of 16 rows
    python tests/measure/gpu/kto_on_gpu.py --parts trl --micro 8  TRL, smaller micro-batches
    python tests/measure/gpu/kto_on_gpu.py --tiny                 a trial without a GPU

Both train the same adapter on the same random rows as long as GSM8K's, in NF4 and bfloat16. TRL
keeps all activations (no gradient checkpointing) and uses PyTorch's fused AdamW. Prints tokens per
second by wall-clock time, without the mismatched pairs of the KL term, and the peak of memory.
"""

import argparse
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import gpu_inputs
from gpu_inputs import GIB, say

PARTS = ("tuneline", "trl")
WARM_UP = 4
"""Steps whose speed does not count, because they may compile kernels."""


def main() -> None:
    """Run the parts one after another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--rows", type=int, default=16, help="rows per optimizer step")
    parser.add_argument("--micro", type=int, default=16, help="rows per micro-batch")
    parser.add_argument("--tiny", action="store_true", help="two small layers and short rows")
    args = parser.parse_args()
    gpu_inputs.check_packages()
    work = gpu_inputs.roomy_directory(0 if args.tiny else 17 * 10**9)
    base, dataset = work / "base", work / "dataset"
    try:
        gpu_inputs.write_base(base, "tiny" if args.tiny else "Llama-3.1-8B")
        gpu_inputs.write_weights(base)
        num_rows = args.steps * args.rows
        lengths = gpu_inputs.gsm8k_lengths(1000 * num_rows, scale=0.1 if args.tiny else 1.0)
        gpu_inputs.write_dataset(
            dataset,
            lengths[:num_rows],
            max_seq_length=1024,
            method="kto",
            max_token=500 if args.tiny else 30000,
        )
        for part in args.parts:
            if part == "tuneline":
                ours(args, base, dataset, work)
            else:
                theirs(args, base, dataset, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def ours(args: argparse.Namespace, base: Path, dataset: Path, work: Path) -> None:
    """Run the train step."""
    config = {
        "max_steps": args.steps,
        "warmup_steps": 2,
        "learning_rate": 1e-5,
        "global_batch_size": args.rows,
        "micro_batch_size": args.micro,
        "num_ranks": 1,
        "sample_tokens": 0,
    }
    run = gpu_inputs.train("tuneline", config, base=base, dataset=dataset, work=work)
    say(run.show(WARM_UP))


def theirs(args: argparse.Namespace, base: Path, dataset: Path, work: Path) -> None:
    """Run TRL's trainer on the same rows."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        TrainerCallback,
    )
    from trl import KTOConfig, KTOTrainer

    from tuneline.artifacts import TRAIN_FILE
    from tuneline.train.config import TrainConfig

    has_gpu = torch.cuda.is_available()
    rows = Dataset.from_parquet(str(dataset / TRAIN_FILE))
    rows = rows.map(_with_mismatched, batched=True, batch_size=args.micro)

    class Tokens(KTOTrainer):
        def _prepare_dataset(self, dataset: Any, *rest: Any) -> Any:
            return dataset

    class Clock(TrainerCallback):
        seconds: list[float] = []

        def on_step_begin(self, *unused: Any, **named: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *unused: Any, **named: Any) -> None:
            if has_gpu:
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self.began)

    clock = Clock()
    lora = TrainConfig().lora
    trainer = Tokens(
        model=AutoModelForCausalLM.from_pretrained(
            base,
            dtype=torch.bfloat16,
            device_map={"": 0 if has_gpu else "cpu"},
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            ),
        ),
        args=KTOConfig(
            str(work / "trl"),
            max_steps=args.steps,
            learning_rate=1e-5,
            warmup_steps=2,
            per_device_train_batch_size=args.micro,
            gradient_accumulation_steps=args.rows // args.micro,
            gradient_checkpointing=False,
            optim="adamw_torch_fused",
            bf16=True,
            use_cpu=not has_gpu,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            max_length=1024,
        ),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.r,
            lora_alpha=lora.lora_alpha,
            target_modules="all-linear",
        ),
        callbacks=[clock],
    )
    if has_gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    sizes = [len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows]
    steps = [sizes[n : n + args.rows] for n in range(0, len(sizes), args.rows)]
    pairs = zip(steps[WARM_UP:], clock.seconds[WARM_UP:], strict=False)
    rate = statistics.median(sum(step) / seconds for step, seconds in pairs)
    peak = torch.cuda.max_memory_allocated() / GIB if has_gpu else 0.0
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    say(f"trl: {rate:.0f} tok/s, peak {peak:.2f} GiB, loss {losses[0]:.4f} -> {losses[-1]:.4f}")


def _with_mismatched(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    answers = columns["completion_ids"]
    return {"KL_completion_ids": [answers[-1], *answers[:-1]]}


if __name__ == "__main__":
    main()
