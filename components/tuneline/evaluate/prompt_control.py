"""The control task prompt_dependence: does the model still read its prompts?

A model that was tuned on answers of other questions gains on every benchmark that rewards the form
of an answer. The control measures what such a model loses: how much likelier an answer is after its
own prompt than after the prompt of another row, in nats per token.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuneline.evaluate.model import TemplatedHFLM

METRIC = "nats per token"
MIN_ROWS = 20
"""Number of rows below which the control says nothing, so it is not measured."""


def measure(
    lm: "TemplatedHFLM", documents: list[dict[str, Any]], *, num_rows: int
) -> list[dict[str, Any]]:
    """Return one sample per document, with the keys of `samples.rows_of`; none if too few rows.

    Args:
        lm: the model.
        documents: the held-out rows, from `heldout.documents`.
        num_rows: largest number of samples.
    """
    exchanged = exchange(documents[:num_rows])
    if len(exchanged) < MIN_ROWS:
        return []
    own = lm.log_likelihoods(
        [(document["prompt"], document["target"]) for document, _ in exchanged]
    )
    other = lm.log_likelihoods([(prompt, document["target"]) for document, prompt in exchanged])
    return [
        {
            "id": document["id"],
            "score": (likelihood - without) / document["num_tokens"],
            "weight": document["num_tokens"],
        }
        for (document, _), likelihood, without in zip(exchanged, own, other, strict=True)
    ]


def exchange(documents: list[dict[str, Any]]) -> list[tuple[dict[str, Any], str]]:
    """Return the documents with the prompt of another row, whose prompt and answer both differ.

    The other row is the next one after half of the documents, so that rows that stand together
    because they resemble each other are not exchanged. A document without such a row is left out.
    """
    size = len(documents)
    pairs = []
    for position, document in enumerate(documents):
        for distance in range(size // 2, size // 2 + size):
            other = documents[(position + distance) % size]
            if other["prompt"] != document["prompt"] and other["target"] != document["target"]:
                pairs.append((document, other["prompt"]))
                break
    return pairs
