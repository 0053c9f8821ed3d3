"""The metric of heldout_perplexity.yaml, which names these functions."""


def of_sample(doc: dict, results: list[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
    """Return the negative log likelihood of the answer in nats, and its number of tokens."""
    ((log_likelihood, _is_greedy),) = results
    return {"log_perplexity": (-log_likelihood, doc["num_tokens"])}


def of_all(items: list[tuple[float, int]]) -> float:
    """Return the nats a token over all answers."""
    return sum(nats for nats, _ in items) / sum(num_tokens for _, num_tokens in items)
