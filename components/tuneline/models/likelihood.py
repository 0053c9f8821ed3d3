"""Log likelihoods of several answers per prompt, where each prompt is computed only once.

Shapes: P prompts, A answers to all prompts, S tokens of the longest prompt, T tokens of the longest
answer, V tokens of the vocabulary.
"""

from collections.abc import Iterable
from typing import Any

import torch

Tokens = tuple[int, ...]
Pair = tuple[Tokens, Tokens]
"""Token IDs of a prompt and of an answer."""


@torch.inference_mode()
def score_answers(
    model: Any, pairs: Iterable[Pair], *, batch_size: int
) -> dict[Pair, tuple[float, bool]]:
    """Return the log likelihood of each answer given its prompt.

    Args:
        model: a causal language model with a key-value cache.
        pairs: (prompt, answer) as token IDs, neither empty.
        batch_size: number of prompts per forward pass.

    Returns:
        A mapping: pair -> (log likelihood of the answer in nats, whether greedy decoding would
        produce the answer).
    """
    answers: dict[Tokens, dict[Tokens, None]] = {}
    for prompt, answer in pairs:
        answers.setdefault(prompt, {})[answer] = None
    # Batch prompts of similar length, so that little padding is needed.
    prompts = sorted(answers, key=lambda prompt: (len(prompt), prompt))
    scores = {}
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        scores.update(_score_batch(model, batch, [list(answers[prompt]) for prompt in batch]))
    return scores


def _score_batch(
    model: Any, prompts: list[Tokens], answers: list[list[Tokens]]
) -> dict[Pair, tuple[float, bool]]:
    device = model.device
    # Prompts are padded on the left, so that all end just before the position where answers begin.
    prompt_ids_PS, prompt_mask_PS = (
        tensor.flip(1) for tensor in _padded([prompt[::-1] for prompt in prompts], device)
    )
    output = model(
        input_ids=prompt_ids_PS,
        attention_mask=prompt_mask_PS,
        position_ids=_positions(prompt_mask_PS),
        use_cache=True,
        logits_to_keep=1,
    )
    owners_A = torch.tensor(
        [number for number, group in enumerate(answers) for _ in group], device=device
    )
    flat = [answer for group in answers for answer in group]
    answer_ids_AT, answer_mask_AT = _padded(flat, device)
    logits_ATV = output.logits[owners_A]
    if answer_ids_AT.shape[1] > 1:
        # The last token of an answer is not an input, because no token after it is predicted.
        cache = output.past_key_values
        cache.batch_select_indices(owners_A)
        mask = torch.cat([prompt_mask_PS[owners_A], answer_mask_AT[:, :-1]], dim=1)
        continuation = model(
            input_ids=answer_ids_AT[:, :-1],
            attention_mask=mask,
            position_ids=_positions(mask)[:, prompt_ids_PS.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        )
        logits_ATV = torch.cat([logits_ATV, continuation.logits], dim=1)
    log_probs_AT = -torch.nn.functional.cross_entropy(
        logits_ATV.float().transpose(1, 2), answer_ids_AT, reduction="none"
    )
    padding_AT = answer_mask_AT == 0
    totals_A = log_probs_AT.masked_fill(padding_AT, 0).sum(1).tolist()
    greedy_A = ((logits_ATV.argmax(-1) == answer_ids_AT) | padding_AT).all(1).tolist()
    return {
        (prompts[owner], answer): (total, greedy)
        for owner, answer, total, greedy in zip(
            owners_A.tolist(), flat, totals_A, greedy_A, strict=True
        )
    }


def _padded(rows: list[Tokens], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows padded on the right with ID 0, and the mask: 1 for tokens, 0 for padding."""
    length = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return ids.to(device), mask.to(device)


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)
