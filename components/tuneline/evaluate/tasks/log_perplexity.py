"""The metric of the task heldout_perplexity; heldout_perplexity.yaml refers to these functions."""

from typing import Any


def of_sample(
    doc: dict[str, Any], results: list[tuple[float, bool]]
) -> dict[str, tuple[float, int]]:
    """Return the negative log likelihood of the answer, in nats, and its number of tokens."""
    ((log_likelihood, _is_greedy),) = results
    return {"log_perplexity": (-log_likelihood, doc["num_tokens"])}


def of_all(items: list[tuple[float, int]]) -> float:
    """Return the mean over all answers, in nats per token."""
    return sum(nats for nats, _ in items) / sum(num_tokens for _, num_tokens in items)
