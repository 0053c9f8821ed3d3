"""How far an export's predictions are from the merged model's, on the same rows.

Legend: T positions of a row, V vocabulary.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tuneline.errors import ProofError
from tuneline.models.heldout_rows import Row
from tuneline.quantize.formats import Bound

if TYPE_CHECKING:
    import torch


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
