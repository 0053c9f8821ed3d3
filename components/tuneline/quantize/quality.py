"""How far an export's predictions are from the merged model's, on rows that training did not see.

Legend: T positions of a row, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tuneline.artifacts import (
    CHOSEN_IDS,
    EVAL_FILE,
    HELDOUT_FILE,
    INPUT_IDS,
    LOSS_MASK,
    PROMPT_IDS,
    TRAIN_FILE,
    read_jsonl,
)
from tuneline.errors import DataError, ProofError
from tuneline.quantize.formats import Bound

if TYPE_CHECKING:
    import torch

MAX_ROW_TOKENS = 256
"""Of a row: the reference's logits are kept, at the vocabulary's size for each token."""


@dataclass(frozen=True)
class Row:
    """Token ids, and the position of the first that the loss counts."""

    ids: list[int]
    start: int


@dataclass(frozen=True)
class Quality:
    """An export against the merged model, over all positions of all rows."""

    mean_kl: float
    """Nats a token, merged against export."""
    top1_agreement: float
    perplexity: float
    """Of the export, on the tokens from `Row.start` on."""
    reference_perplexity: float
    num_rows: int

    def record(self) -> dict[str, float | int]:
        """Return the fields of a `QuantizedModel`."""
        return {
            "mean_kl": self.mean_kl,
            "top1_agreement": self.top1_agreement,
            "perplexity": self.perplexity,
            "reference_perplexity": self.reference_perplexity,
            "num_prompts": self.num_rows,
        }


def read_rows(dataset_dir: Path, num_rows: int, tokenise: Callable[[str], list[int]]) -> list[Row]:
    """Return held-out rows with their answers, then evaluation rows, then training rows.

    Raises:
        DataError: the data set has no row at all.
    """
    path = dataset_dir / HELDOUT_FILE
    rows = []
    for row in read_jsonl(path)[:num_rows] if path.is_file() else []:
        prompt, ids = tokenise(row["prompt"]), tokenise(row["prompt"] + row["answer"] + row["end"])
        # Where the answer begins; a tokenizer may join the prompt's last letters with its first.
        pairs = enumerate(zip(prompt, ids, strict=False))
        rows.append(_cut(ids, next((n for n, pair in pairs if pair[0] != pair[1]), len(prompt))))
    for name in (EVAL_FILE, TRAIN_FILE):
        if len(rows) < num_rows and (dataset_dir / name).is_file():
            rows += _prepared_rows(dataset_dir / name, num_rows - len(rows))
    rows = [row for row in rows if max(row.start, 1) < len(row.ids)]
    if not rows:
        raise DataError(f"{dataset_dir} has no row to compare an export on: run prepare")
    return rows


def compare(
    rows: list[Row], reference: Iterable["torch.Tensor"], tested: Iterable["torch.Tensor"]
) -> Quality:
    """Hold an export's logits against the merged model's, a row of each at a time, [T, V]."""
    import torch

    kl, agreed, positions = 0.0, 0, 0
    loss, reference_loss, counted = 0.0, 0.0, 0
    for row, p_TV, q_TV in zip(rows, reference, tested, strict=True):
        p_TV, q_TV = p_TV.log_softmax(-1), q_TV.log_softmax(-1)
        kl += (p_TV.exp() * (p_TV - q_TV)).sum().item()
        agreed += int((p_TV.argmax(-1) == q_TV.argmax(-1)).sum())
        positions += len(row.ids)
        first = max(row.start, 1)
        targets_T1 = torch.tensor(row.ids[first:])[:, None]
        for_targets = slice(first - 1, len(row.ids) - 1)
        reference_loss -= p_TV[for_targets].gather(1, targets_T1).sum().item()
        loss -= q_TV[for_targets].gather(1, targets_T1).sum().item()
        counted += len(targets_T1)
    mean_kl = kl / positions
    return Quality(
        # Rounding makes the KL of equal distributions a little negative.
        mean_kl=max(mean_kl, 0.0) if mean_kl == mean_kl else mean_kl,
        top1_agreement=agreed / positions,
        perplexity=math.exp(loss / counted),
        reference_perplexity=math.exp(reference_loss / counted),
        num_rows=len(rows),
    )


def hold(quality: Quality, bound: Bound, format: str) -> None:
    """Check an export against its bound.

    Raises:
        ProofError: it is too far from the merged model; the message has the numbers.
    """
    close = quality.mean_kl <= bound.max_mean_kl
    if close and quality.top1_agreement >= bound.min_top1_agreement:
        return
    raise ProofError(
        f"the export {format} is {quality.mean_kl:.4g} nats a token from the merged model (at most "
        f"{bound.max_mean_kl:g}) and has the same most likely token at "
        f"{quality.top1_agreement:.1%} of positions (at least {bound.min_top1_agreement:.1%}), "
        f"over {quality.num_rows} rows; perplexity {quality.perplexity:.4g} against "
        f"{quality.reference_perplexity:.4g}: take a format with more bits, or set "
        f"quantize.max_mean_kl and quantize.min_top1_agreement for {format} if you accept it"
    )


def _cut(ids: list[int], start: int) -> Row:
    """Keep a row's last tokens: the answer, and what fits of its prompt."""
    left_out = max(0, len(ids) - MAX_ROW_TOKENS)
    return Row(ids[left_out:], max(0, start - left_out))


def _prepared_rows(path: Path, num_rows: int) -> list[Row]:
    import pyarrow.parquet

    batch = next(pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=num_rows), None)
    columns = batch.to_pydict() if batch else {INPUT_IDS: []}
    if INPUT_IDS not in columns:
        pairs = zip(columns[PROMPT_IDS], columns[CHOSEN_IDS], strict=True)
        return [_cut(prompt + chosen, len(prompt)) for prompt, chosen in pairs]
    masks = columns.get(LOSS_MASK) or [[1] * len(ids) for ids in columns[INPUT_IDS]]
    return [
        _cut(ids, mask.index(1) if 1 in mask else 0)
        for ids, mask in zip(columns[INPUT_IDS], masks, strict=True)
    ]
