"""Compare the merged model with base plus adapter, on real prompts.

Legend: T positions of a row, V vocabulary.
"""

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tuneline.errors import ProofError
from tuneline.merge.config import MergeConfig
from tuneline.models.heldout_rows import Row
from tuneline.models.nf4 import load_base

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answers:
    """What one model says to the rows."""

    greedy_ids: list[int]
    """What follows the first row's prompt."""
    greedy_logits: torch.Tensor
    """What each of them was chosen from, [num_tokens, V]."""
    loss: float
    """Nats a token, over the tokens that the rows' losses count."""


@dataclass(frozen=True)
class Distance:
    """How far two models' predictions are apart, over all positions of all rows."""

    max_logit_difference: float
    mean_kl: float
    """Nats a token, of the first against the second."""
    top1_agreement: float


class Comparison:
    """How far a second model's logits are from those of a first, a row at a time.

    The first one's are kept and the second one's are not: of 32 rows and a vocabulary of 128,000
    they are 4 GB.
    """

    def __init__(self, first: list[torch.Tensor]) -> None:
        """Take the first model's logits, a row's [T, V]."""
        self._rows = iter(first)
        self._worst, self._kl, self._agreed, self._total = 0.0, 0.0, 0, 0

    def add(self, other_TV: torch.Tensor) -> None:
        """Compare the next row; a value that is not finite counts as far."""
        one_TV = next(self._rows)
        p_TV, q_TV = one_TV.log_softmax(-1), other_TV.log_softmax(-1)
        self._kl += (p_TV.exp() * (p_TV - q_TV)).sum().item()
        self._agreed += int((one_TV.argmax(-1) == other_TV.argmax(-1)).sum())
        difference = (one_TV - other_TV).abs().max().item()
        self._worst = difference if not difference <= self._worst else self._worst
        self._total += len(one_TV)

    def distance(self) -> Distance:
        """Return what it came to over all positions."""
        # Rounding makes the KL of equal distributions a little negative.
        mean_kl = self._kl / self._total
        mean_kl = max(mean_kl, 0.0) if mean_kl == mean_kl else mean_kl
        return Distance(self._worst, mean_kl, self._agreed / self._total)


Sink = Callable[[torch.Tensor], None]
"""Takes a row's logits, [T, V] in fp32 on the CPU."""


def ask_trained(
    rows: list[Row],
    sink: Sink,
    *,
    num_greedy_tokens: int,
    base_model_dir: Path,
    adapter_dir: Path,
    dtype: torch.dtype,
    quantized: bool,
    device: str,
) -> Answers:
    """Ask the base with the adapter beside it, as it was trained."""
    from peft import PeftModel

    base = load_base(base_model_dir, dtype=dtype, device=device, quantized=quantized)
    model = PeftModel.from_pretrained(base, str(adapter_dir))
    answers = ask(model, rows, sink, num_greedy_tokens=num_greedy_tokens)
    del model, base
    _free(device)
    return answers


def ask_merged(
    rows: list[Row],
    sink: Sink,
    *,
    num_greedy_tokens: int,
    merged_dir: Path,
    dtype: torch.dtype,
    device: str,
) -> Answers:
    """Ask a merged model."""
    model = load_base(merged_dir, dtype=dtype, device=device, quantized=False)
    answers = ask(model, rows, sink, num_greedy_tokens=num_greedy_tokens)
    del model
    _free(device)
    return answers


def ask(model: Any, rows: list[Row], sink: Sink, *, num_greedy_tokens: int) -> Answers:
    """Compute logits of all rows, and a greedy answer to the first one's prompt."""
    device = next(model.parameters()).device
    model.eval()
    prompt = torch.tensor([rows[0].ids[: max(rows[0].start, 1)]], device=device)
    loss, counted = 0.0, 0
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([row.ids], device=device)
            row_TV = model(input_ids=ids).logits[0].float().cpu()
            row_loss, row_count = answer_loss(row, row_TV)
            loss, counted = loss + row_loss, counted + row_count
            sink(row_TV)
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=num_greedy_tokens,
            # Nothing is padded; without one, a line is logged.
            pad_token_id=model.generation_config.pad_token_id or 0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return Answers(
        greedy_ids=output.sequences[0, prompt.shape[1] :].tolist(),
        greedy_logits=torch.cat(output.logits).float().cpu(),
        loss=loss / counted,
    )


def answer_loss(row: Row, row_TV: torch.Tensor) -> tuple[float, int]:
    """Return nats and tokens from the row's `start` on."""
    first = max(row.start, 1)
    targets = torch.tensor(row.ids[first:])
    logits = row_TV[first - 1 : len(row.ids) - 1]
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item(), len(targets)


def greedy_gap(trained: Answers, merged: Answers) -> float | None:
    """Return by how much the trained model prefers its own token where the answers part.

    After that token the two continue different texts, which says nothing more. None: they are one.
    """
    for index, (ours, theirs) in enumerate(
        zip(merged.greedy_ids, trained.greedy_ids, strict=False)
    ):
        if ours != theirs:
            row = trained.greedy_logits[index]
            return (row[theirs] - row[ours]).item()
    return None


def hold(distance: Distance, gap: float | None, config: MergeConfig, *, num_rows: int) -> None:
    """Check the distance against the recipe's bounds.

    Raises:
        ProofError: it is over one of them; the message has the numbers.
    """
    what = "the merged model"
    if not distance.mean_kl <= config.max_mean_kl:
        raise ProofError(
            f"{what} is {distance.mean_kl:.4g} nats a token (mean KL over {num_rows} prompts) from "
            f"base plus adapter, and merge.max_mean_kl allows {config.max_mean_kl:g}: merge with "
            "dtype float32 or base dequantized, or raise the bound if you accept it"
        )
    if distance.top1_agreement < config.min_top1_agreement:
        raise ProofError(
            f"{what} has the same most likely token as base plus adapter at "
            f"{distance.top1_agreement:.1%} of positions (over {num_rows} prompts), and "
            f"merge.min_top1_agreement asks for {config.min_top1_agreement:.1%}: merge with dtype "
            "float32 or base dequantized, or lower the bound if you accept it"
        )
    if gap is not None and not gap <= config.max_greedy_gap:
        raise ProofError(
            f"{what}'s greedy answer parts from that of base plus adapter at a token which the "
            f"latter's own leads by {gap:.4g} in the logits, and merge.max_greedy_gap allows "
            f"{config.max_greedy_gap:g}: merge with dtype float32, or raise the bound if you "
            "accept it"
        )


def _free(device: str) -> None:
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
