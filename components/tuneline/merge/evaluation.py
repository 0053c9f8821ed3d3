"""Compute the loss of the merged model on the rows of training's evaluation loss."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch

from tuneline.artifacts import EVAL_FILE, INPUT_IDS, LOSS_MASK, TrainingSummary

logger = logging.getLogger(__name__)

MAX_TOKENS = 500_000
"""Number of tokens of all rows above which the loss is not computed, because it would take long."""
CHUNK_POSITIONS = 512
"""Positions whose logits are in memory at the same time: 0.26 GB in fp32 for a vocabulary of
128,000."""


@dataclass(frozen=True)
class EvaluationRows:
    """The rows, as training saw them."""

    rows: list[tuple[list[int], list[int]]]
    """Token IDs of each row, and the positions of the tokens that the loss counts."""

    @property
    def num_targets(self) -> int:
        """Number of tokens that the loss counts."""
        return sum(len(positions) for _, positions in self.rows)


def read_evaluation_rows(
    dataset_dir: Path, training: TrainingSummary, *, max_seq_length: int
) -> EvaluationRows | None:
    """Return the evaluation rows of supervised fine-tuning; None if the losses cannot be compared.

    Preferences have another loss. Training splits texts that are longer than a pack, and with FP8
    kernels it computes other losses than a model in 16 bits.

    Args:
        dataset_dir: directory that prepare made.
        training: record of the adapter.
        max_seq_length: longest row of the dataset, in tokens.
    """
    path = dataset_dir / EVAL_FILE
    unlike = training.settings.get("kernels") == "fp8" or "max_seq_length" in training.fitted
    if training.method != "sft" or training.final_eval_loss is None or unlike:
        return None
    if not path.is_file():
        return None
    columns = pyarrow.parquet.read_table(path, columns=[INPUT_IDS, LOSS_MASK]).to_pydict()
    rows = [
        # The first token of a row is never predicted.
        (ids, [position for position, counts in enumerate(mask) if counts and position])
        for ids, mask in zip(columns[INPUT_IDS], columns[LOSS_MASK], strict=True)
    ]
    rows = [(ids, positions) for ids, positions in rows if positions]
    num_tokens = sum(len(ids) for ids, _ in rows)
    if num_tokens > MAX_TOKENS:
        logger.info(
            "the loss of the merged model is not compared with training's evaluation loss: the "
            "evaluation rows have %d tokens, and more than %d would take long",
            *(num_tokens, MAX_TOKENS),
        )
        return None
    if not rows or max(len(ids) for ids, _ in rows) > max_seq_length:
        return None
    return EvaluationRows(rows)


@torch.inference_mode()
def evaluation_loss(model: Any, evaluation: EvaluationRows) -> float:
    """Return the mean loss over all tokens that count, in nats per token."""
    device = next(model.parameters()).device
    total = 0.0
    for ids, positions in evaluation.rows:
        input_ids = torch.tensor([ids], device=device)
        for start in range(0, len(positions), CHUNK_POSITIONS):
            targets = torch.tensor(positions[start : start + CHUNK_POSITIONS], device=device)
            logits = model(input_ids=input_ids, logits_to_keep=targets - 1).logits[0].float()
            total += torch.nn.functional.cross_entropy(
                logits, input_ids[0, targets], reduction="sum"
            ).item()
    return total / evaluation.num_targets
