"""What a model generated, and when two generations count as one."""

from dataclasses import dataclass

from tuneline.errors import ProofError

NEAR_TIE = 0.1
"""Logits: f16 against fp32 differ by some hundredths, so a token this close to the best may win."""


@dataclass(frozen=True)
class Generation:
    """What a model generated from a prompt, greedily; an end-of-text token is the last one."""

    prompt_ids: list[int]
    ids: list[int]
    text: str
    logits: object | None = None
    """numpy (num_ids, vocabulary), float32: what each id was chosen from; transformers only."""


def hold_against(tested: Generation, reference: Generation) -> str | None:
    """Check that two greedy generations from one prompt are one, but for a near tie; note that tie.

    From the first token that differs on, the two continue different texts, so only that token
    says anything: the reference's logit for it may lie below the best by NEAR_TIE at most.

    Raises:
        ProofError: the models disagree.
    """
    for index, (ours, theirs) in enumerate(zip(tested.ids, reference.ids, strict=False)):
        if ours == theirs:
            continue
        row = reference.logits[index]  # type: ignore[index]
        gap = float(row[theirs] - row[ours])
        if gap > NEAR_TIE:
            raise ProofError(
                f"the GGUF file in f16 and the merged model part at token {index} of a greedy "
                f"answer, by {gap:.3f} in the logits where at most {NEAR_TIE} is rounding: "
                f"{tested.text[:60]!r} against {reference.text[:60]!r}"
            )
        return f"parts from the merged model at token {index}, a near tie ({gap:.4f} in the logits)"
    return None
