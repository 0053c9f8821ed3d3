"""Fine-tune SmolLM2 on GSM8K with every method, on a CPU, and load each adapter in plain PEFT.

    python tests/measure/gsm8k.py DIR --out-dir OUT       DIR has train.jsonl and preferences.jsonl

    sft   questions and answers
    dpo   preferences
    cpt   the questions as raw text

Each method runs the steps fetch, prepare and train as a pipeline calls them. Then PEFT and
transformers alone load the base model in 4 bits and the adapter, and score a few evaluation rows.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

METHODS: dict[str, dict[str, Any]] = {
    "sft": {
        "file": "train.jsonl",
        "prepare": {"columns": {"prompt": "question", "completion": "answer"}},
        "train": {"learning_rate": 4e-4},
    },
    "dpo": {
        "file": "preferences.jsonl",
        # So small a model cannot tell right answers from wrong ones; it can only memorise a few.
        "prepare": {"method": "dpo", "max_rows": 16, "eval_share": 0.25},
        "train": {"learning_rate": 1e-4},
    },
    "cpt": {
        "file": "train.jsonl",
        "prepare": {"method": "cpt", "columns": {"text": "question"}},
        "train": {"learning_rate": 2e-4},
    },
}


def main() -> None:
    """Run the methods, and print one line per method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out-dir", type=Path, required=True)
    args = parser.parse_args()
    from tuneline.fetch import FetchConfig
    from tuneline.fetch.run import run as fetch

    base = args.out_dir / "base"
    if not base.exists():
        fetch(FetchConfig(), source="builtin:smollm2-135m", base_model_dir=str(base))
    for method in args.methods:
        start = time.monotonic()
        summary = tune(method, args.data_dir, base, args.out_dir / method, args.steps)
        losses = [point.loss for point in summary.history if point.loss is not None]
        third = max(1, len(losses) // 3)
        line = (
            f"{method}: loss {sum(losses[:third]) / third:.4f} -> "
            f"{sum(losses[-third:]) / third:.4f} (means of the first and last third), eval "
            f"{summary.first_eval_loss:.4f} -> {summary.final_eval_loss:.4f}"
        )
        margins = [p.reward_margin for p in summary.history if p.reward_margin is not None]
        if margins:
            accuracies = [p.reward_accuracy for p in summary.history if p.reward_accuracy]
            line += f", margin {margins[0]:.4f} -> {margins[-1]:.4f}, accuracy {accuracies[-1]:.2f}"
        rows, mean = score(method, base, args.out_dir / method)
        print(
            f"{line}; {summary.tokens_per_second:.0f} tok/s, {time.monotonic() - start:.0f} s; "
            f"in plain PEFT, {rows} rows: {mean}",
            flush=True,
        )


def tune(method: str, data_dir: Path, base: Path, where: Path, num_steps: int) -> Any:
    """Prepare the dataset of a method and train on it; return the training summary.

    Args:
        method: Name of the method, a key of METHODS.
        data_dir: Directory with the source files.
        base: Directory of the base model.
        where: Directory for the outputs.
        num_steps: Number of optimizer steps.
    """
    from tuneline.prepare import PrepareConfig
    from tuneline.prepare.run import run as prepare
    from tuneline.train import TrainConfig
    from tuneline.train.run import run as train

    settings = METHODS[method]
    rows = {"max_rows": 1000, "max_eval_rows": 8, "heldout": {"max_rows": 0}}
    prepare(
        PrepareConfig.parse({**rows, "max_seq_length": 512, **settings["prepare"]}),
        source=str(data_dir / settings["file"]),
        base_model_dir=str(base),
        dataset_dir=str(where / "dataset"),
        statistics_path=str(where / "statistics.html"),
    )
    config = {
        "max_steps": num_steps,
        "eval_steps": num_steps,
        "global_batch_size": 2,
        "micro_batch_size": 1,
        "gradient_checkpointing": False,
        "warmup_steps": 2,
        "sample_tokens": 48,
    }
    return train(
        TrainConfig.parse({**config, **settings["train"]}),
        base_model_dir=base,
        dataset_dir=where / "dataset",
        adapter_dir=where / "adapter",
        curves_path=where / "curves.html",
    )


def score(method: str, base: Path, where: Path) -> tuple[int, str]:
    """Score the evaluation rows with PEFT alone; return their number and a text with the result."""
    import bitsandbytes.nn.modules
    import pyarrow.parquet
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # As in training: the layout that bitsandbytes uses with AVX512 is not plain NF4.
    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
    dtype = getattr(
        torch, json.loads((where / "adapter/training.json").read_text())["compute_dtype"]
    )
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=quantized)
    tuned = PeftModel.from_pretrained(model, where / "adapter").eval()
    rows = pyarrow.parquet.read_table(where / "dataset/eval.parquet").to_pylist()
    with torch.no_grad():
        with tuned.disable_adapter():
            before = [measure(tuned, method, row) for row in rows]
        after = [measure(tuned, method, row) for row in rows]
    if method == "dpo":
        better = [now - then for then, now in zip(before, after, strict=True)]
        mean = sum(better) / len(rows)
        fraction = sum(value > 0 for value in better) / len(rows)
        return len(rows), (
            f"chosen gains {mean:+.3f} nats over rejected, and gains on {fraction:.0%} of the rows"
        )
    return len(rows), f"loss {sum(before) / len(rows):.4f} -> {sum(after) / len(rows):.4f}"


def measure(model: Any, method: str, row: dict[str, list[int]]) -> float:
    """Return a row's mean loss over its labels, or the log-odds of chosen over rejected for dpo."""
    if method == "dpo":
        prompt = row["prompt_ids"]
        chosen, rejected = (
            log_probs(model, prompt + answer)[len(prompt) - 1 :].sum()
            for answer in (row["chosen_ids"], row["rejected_ids"])
        )
        return float(chosen - rejected)
    counts = torch.tensor(row["loss_mask"][1:], dtype=torch.bool)
    return -float(log_probs(model, row["input_ids"])[counts].mean())


def log_probs(model: Any, ids: list[int]) -> torch.Tensor:
    """Return the log-probability of each token except the first."""
    tokens = torch.tensor([ids])
    logits = model(input_ids=tokens).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]


if __name__ == "__main__":
    main()
