"""Measure how far an export's predictions are from the merged model's, and check the bounds.

Legend: T positions of a row, V vocabulary.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from tuneline.errors import ProofError
from tuneline.models.heldout_rows import Row
from tuneline.models.likelihood import NEAR_TIE, num_same_choices
from tuneline.quantize.formats import FORMATS, Bound
from tuneline.quantize.proof.generation import Generation

NUM_SPEED_TOKENS = 16
"""Tokens that are generated to measure the speed of an export."""


@dataclass(frozen=True)
class Quality:
    """Distance of an export from the merged model, over all positions of all rows."""

    mean_kl: float
    """KL divergence of the export from the merged model, in nats per token."""
    top1_agreement: float
    """Fraction of positions with the same most likely token up to a near tie, 0 to 1."""
    perplexity: float
    """Perplexity of the export on the answers, that is, each row's tokens from `Row.start` on."""
    reference_perplexity: float
    """Perplexity of the merged model on the same tokens."""
    num_rows: int
    num_positions: int
    """Positions of all rows."""

    def record(self) -> dict[str, float | int]:
        """Return the measurements as fields of a `QuantizedModel`."""
        return {
            "mean_kl": self.mean_kl,
            "top1_agreement": self.top1_agreement,
            "perplexity": self.perplexity,
            "reference_perplexity": self.reference_perplexity,
            "num_prompts": self.num_rows,
        }


def compare(
    rows: list[Row], reference: Iterable[torch.Tensor], tested: Iterable[torch.Tensor]
) -> Quality:
    """Compare an export's logits with the merged model's; each iterable gives [T, V] per row."""
    kl, agreed, positions = 0.0, 0, 0
    loss, reference_loss, counted = 0.0, 0.0, 0
    for row, p_TV, q_TV in zip(rows, reference, tested, strict=True):
        p_TV, q_TV = p_TV.log_softmax(-1), q_TV.log_softmax(-1)
        kl += (p_TV.exp() * (p_TV - q_TV)).sum().item()
        agreed += num_same_choices(p_TV, q_TV)
        positions += len(row.ids)
        first = max(row.start, 1)
        targets_T1 = torch.tensor(row.ids[first:])[:, None]
        for_targets = slice(first - 1, len(row.ids) - 1)
        reference_loss -= p_TV[for_targets].gather(1, targets_T1).sum().item()
        loss -= q_TV[for_targets].gather(1, targets_T1).sum().item()
        counted += len(targets_T1)
    mean_kl = kl / positions
    return Quality(
        # Rounding makes the KL divergence of equal distributions slightly negative.
        mean_kl=max(mean_kl, 0.0) if mean_kl == mean_kl else mean_kl,
        top1_agreement=agreed / positions,
        perplexity=math.exp(loss / counted),
        reference_perplexity=math.exp(reference_loss / counted),
        num_rows=len(rows),
        num_positions=positions,
    )


_NEAR = 3.0
"""Multiple of a bound up to which the format's rounding can be the cause of its violation."""


def check_bounds(quality: Quality, bound: Bound, format: str) -> None:
    """Check an export against its bound.

    Raises:
        ProofError: the export is too far from the merged model; the message states the measured
            value and the bound.
    """
    close = quality.mean_kl <= bound.max_mean_kl
    if close and quality.top1_agreement >= bound.min_top1_agreement:
        return
    raise ProofError(
        f"the export {format} has a mean KL divergence of {quality.mean_kl:.4g} nats per token "
        f"from the merged model (at most {bound.max_mean_kl:g}) and the same most likely token at "
        f"{quality.top1_agreement:.1%} of positions (at least {bound.min_top1_agreement:.1%}), "
        f"over {quality.num_positions} positions of {quality.num_rows} rows; perplexity "
        f"{quality.perplexity:.4g} against {quality.reference_perplexity:.4g}: "
        f"{_advice(quality, bound, format)}"
    )


def _advice(quality: Quality, bound: Bound, format: str) -> str:
    """Return what to try after a violated bound; only what can help."""
    this = FORMATS[format]
    # A recipe may have tightened the bound.
    most_kl = _NEAR * max(bound.max_mean_kl, this.bound.max_mean_kl)
    least = 1 - _NEAR * (1 - min(bound.min_top1_agreement, this.bound.min_top1_agreement))
    near = quality.mean_kl <= most_kl and quality.top1_agreement >= least
    if not near or this.bits_per_weight >= 16:
        return (
            "that is more than this format loses, so neither more bits nor another bound is the "
            f"remedy. {NOT_ROUNDING}"
        )
    share = bound.min_top1_agreement
    by_chance = 2 * math.sqrt(share * (1 - share) / quality.num_positions)
    few = quality.mean_kl <= bound.max_mean_kl and quality.top1_agreement + by_chance >= share
    rows = (
        "so few positions can differ by this much by chance: raise quantize.num_proof_prompts. If "
        "the export fails again, "
    )
    bits = more_bits(format)
    return (
        f"{rows if few else ''}{f'{bits}, or ' if bits else ''}set quantize.max_mean_kl and "
        f"quantize.min_top1_agreement for {format} if you accept it"
    )


NOT_ROUNDING = (
    "The file does not hold the merged model, or the program computes it differently: run merge "
    "and this step again, and report the model if it recurs"
)
"""Advice if an export fails whose format is too wide for its rounding to be the cause."""


def more_bits(format: str) -> str:
    """Return the advice to use a format with more bits, which it names; "" if there is none."""
    this = FORMATS[format]
    wider = sorted(
        (other.bits_per_weight, name)
        for name, other in FORMATS.items()
        if other.kind == this.kind and other.bits_per_weight > this.bits_per_weight
    )
    names = ", ".join(name for _, name in wider[:3])
    return f"use a format with more bits ({names})" if wider else ""


_WIDE = 8.0
"""Bits per weight from which rounding hardly changes an answer."""


def advice_on_answers(format: str) -> str:
    """Return what to try if an export answers otherwise than the merged model."""
    return NOT_ROUNDING if FORMATS[format].bits_per_weight >= _WIDE else more_bits(format)


def check_generation(tested: Generation, reference: Generation) -> str | None:
    """Check that two greedy generations are equal up to a near tie; return a note on the tie.

    After the first different token the two generations continue different texts, so later tokens
    are not compared. At that token, the reference's logits of the two tokens may differ by at most
    NEAR_TIE.

    Raises:
        ProofError: the first different tokens are not a near tie.
    """
    for index, (ours, theirs) in enumerate(zip(tested.ids, reference.ids, strict=False)):
        if ours == theirs:
            continue
        assert reference.logits is not None
        logits_V = reference.logits[index]
        gap = float(logits_V[theirs] - logits_V[ours])
        if not abs(gap) <= NEAR_TIE:
            raise ProofError(
                f"the GGUF file in f16 and the merged model differ at token {index} of a greedy "
                f"answer by {gap:.3f} logits; at most {NEAR_TIE} can be rounding "
                f"({tested.text[:60]!r} against {reference.text[:60]!r}): do not use this file, "
                "and report the model to llama.cpp"
            )
        return f"differs from the merged model at token {index}, a near tie ({gap:.4f} logits)"
    return None
