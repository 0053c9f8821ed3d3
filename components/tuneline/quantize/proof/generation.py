"""What a model generated; importable without torch, as chat needs it."""

from dataclasses import dataclass

import numpy
import numpy.typing


@dataclass(frozen=True)
class Generation:
    """Greedy continuation of a prompt; if the model stopped, the last token is a stop token."""

    prompt_ids: list[int]
    ids: list[int]
    text: str
    logits: numpy.typing.NDArray[numpy.float32] | None = None
    """Logits from which each token was chosen, [num_ids, V] in fp32; None if llama.cpp generated
    the tokens."""
