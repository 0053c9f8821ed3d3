"""Compare the merged model with base plus adapter, on real prompts."""

import gc
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from tuneline.artifacts import (
    CHOSEN_IDS,
    EVAL_FILE,
    HELDOUT_FILE,
    INPUT_IDS,
    PROMPT_IDS,
    TRAIN_FILE,
    read_jsonl,
)
from tuneline.errors import DataError
from tuneline.nf4 import load_base

logger = logging.getLogger(__name__)

MAX_PROOF_TOKENS = 512
"""Of a row: the logits of all of them are kept, at the vocabulary's size each."""


@dataclass(frozen=True)
class Distance:
    """How far two models' predictions are apart, over all positions of all prompts."""

    max_logit_difference: float
    mean_kl: float
    """Nats a token, of the first against the second."""
    top1_agreement: float


def proof_rows(dataset_dir: Path, tokenizer: Any, num_prompts: int) -> list[list[int]]:
    """Return token ids of rows that training did not see, where there are any.

    Held-out rows first, then evaluation rows, then training rows.

    Raises:
        DataError: the data set has no row at all.
    """
    path = dataset_dir / HELDOUT_FILE
    rows: list[list[int]] = []
    if path.is_file():
        for row in read_jsonl(path)[:num_prompts]:
            text = row["prompt"] + row["answer"]
            rows.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    for name in (EVAL_FILE, TRAIN_FILE):
        if len(rows) < num_prompts and (dataset_dir / name).is_file():
            rows += _first_rows(dataset_dir / name, num_prompts - len(rows))
    rows = [row[:MAX_PROOF_TOKENS] for row in rows if row]
    if not rows:
        raise DataError(f"{dataset_dir} has no row to compare the merged model on")
    return rows


def logits_of(model: torch.nn.Module, rows: list[list[int]]) -> list[torch.Tensor]:
    """Return the logits of every position, [tokens, vocabulary] in fp32 on the CPU, a row."""
    device = next(model.parameters()).device
    model.eval()
    with torch.inference_mode():
        return [
            model(input_ids=torch.tensor([row], device=device)).logits[0].float().cpu()
            for row in rows
        ]


def trained_logits(
    rows: list[list[int]],
    *,
    base_model_dir: Path,
    adapter_dir: Path,
    dtype: torch.dtype,
    quantized: bool,
    device: str,
) -> list[torch.Tensor]:
    """Return the logits of the base with the adapter beside it, as it was trained."""
    from peft import PeftModel

    base = load_base(base_model_dir, dtype=dtype, device=device, quantized=quantized)
    model = PeftModel.from_pretrained(base, str(adapter_dir))
    found = logits_of(model, rows)
    del model, base
    _free(device)
    return found


def merged_logits(
    rows: list[list[int]], *, merged_dir: Path, dtype: torch.dtype, device: str
) -> list[torch.Tensor]:
    """Return the logits of a merged model."""
    model = load_base(merged_dir, dtype=dtype, device=device, quantized=False)
    found = logits_of(model, rows)
    del model
    _free(device)
    return found


def compare(first: list[torch.Tensor], second: list[torch.Tensor]) -> Distance:
    """Return how far two models' logits are apart; a value that is not finite counts as far."""
    worst, kl, agreed, total = 0.0, 0.0, 0, 0
    for one_TV, other_TV in zip(first, second, strict=True):
        p_TV, q_TV = one_TV.log_softmax(-1), other_TV.log_softmax(-1)
        kl += (p_TV.exp() * (p_TV - q_TV)).sum().item()
        agreed += int((one_TV.argmax(-1) == other_TV.argmax(-1)).sum())
        difference = (one_TV - other_TV).abs().max().item()
        worst = difference if not difference <= worst else worst
        total += len(one_TV)
    # Rounding makes the KL of equal distributions a little negative.
    mean_kl = kl / total
    return Distance(worst, max(mean_kl, 0.0) if mean_kl == mean_kl else mean_kl, agreed / total)


def _first_rows(path: Path, num_rows: int) -> list[list[int]]:
    batch = next(pq.ParquetFile(path).iter_batches(batch_size=num_rows), None)
    if batch is None:
        return []
    columns = batch.to_pydict()
    if INPUT_IDS in columns:
        return columns[INPUT_IDS]
    return [a + b for a, b in zip(columns[PROMPT_IDS], columns[CHOSEN_IDS], strict=True)]


def _free(device: str) -> None:
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
