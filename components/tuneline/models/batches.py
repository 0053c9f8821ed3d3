"""Batches of sequences that fill the free memory, and become smaller when it runs out."""

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from tuneline.errors import ModelError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Device:
    """How large batches are on a kind of device."""

    max_tokens: int
    """Largest number of tokens of a batch, with padding."""
    enough_tokens: int
    """Number of tokens from which more of them at a time are computed hardly faster."""


_GPU = _Device(max_tokens=2**16, enough_tokens=2**14)
_CPU = _Device(max_tokens=2**12, enough_tokens=2**9)
_SIMILAR = 0.8
"""A batch that has enough tokens takes no further item whose length is less than this fraction of
the longest one's, because it would be mostly padding; unless no item of the batch is padded."""
_USED_FRACTION = 0.6
"""Fraction of the free memory that a batch is meant to need; the estimate per token is rough."""
_RESERVED_BYTES = 1 << 30
"""Memory for the logits, of which a part is computed at a time, and for the library's buffers."""
_SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Size:
    """Size of an item of a batch; no sequence takes more room than the longest one of the batch."""

    num_rows: int
    """Number of sequences."""
    num_tokens: int
    """Tokens of the longest sequence."""
    is_padded: bool = True
    """Whether the sequences are padded to the longest one of the batch. Others can share a batch
    with sequences of any length."""


class Batches:
    """Divides items into batches, and computes one batch after another."""

    def __init__(
        self,
        *,
        max_tokens: int | None = None,
        max_items: int | None = None,
        enough_tokens: int | None = None,
    ) -> None:
        """Set the limits; an item that is larger than they allow is a batch of its own.

        Args:
            max_tokens: Tokens per batch, with padding. None: no limit.
            max_items: Items per batch. None: no limit.
            enough_tokens: Tokens from which a batch has only items of similar length, if one of
                them is padded. None: a batch takes items of any length.
        """
        self.max_tokens = max_tokens
        self._max_items = max_items
        self._enough_tokens = enough_tokens

    @classmethod
    def that_fit(cls, model: Any) -> "Batches":
        """Return batches that fill the free memory of a model's device."""
        if model.device.type != "cuda":
            return cls(max_tokens=_CPU.max_tokens, enough_tokens=_CPU.enough_tokens)
        free = torch.cuda.mem_get_info(model.device)[0]
        # Memory that torch holds without using it is free too.
        free += torch.cuda.memory_reserved(model.device)
        free -= torch.cuda.memory_allocated(model.device)
        usable = max(0.0, free - _RESERVED_BYTES) * _USED_FRACTION
        room = int(usable / _bytes_per_token(model))
        return cls(max_tokens=min(_GPU.max_tokens, room), enough_tokens=_GPU.enough_tokens)

    def __str__(self) -> str:
        """Return the limits in words."""
        limits = {"tokens": self.max_tokens, "sequences": self._max_items}
        return " and ".join(f"{limit:,} {name}" for name, limit in limits.items() if limit)

    def run(
        self,
        items: Sequence[Item],
        size_of: Callable[[Item], Size],
        compute: Callable[[list[Item]], Sequence[Result]],
        *,
        called: str,
    ) -> list[Result]:
        """Compute a result for each item, and return the results in the order of the items.

        Padded items of similar length are in the same batch, and the longest ones come first. If
        memory runs out, this batch is divided, and further batches have half of its tokens at most.

        Args:
            items: The items.
            size_of: Function that returns the size of an item.
            compute: Function that returns one result per item of a batch.
            called: What the items are, for the log: "prompts".

        Raises:
            ModelError: memory ran out on a single item.
        """
        sizes = [size_of(item) for item in items]
        order = sorted(range(len(items)), key=lambda index: -sizes[index].num_tokens)
        results: dict[int, Result] = {}
        began = last_line = time.monotonic()
        while (done := len(results)) < len(items):
            next_sizes = (sizes[order[place]] for place in range(done, len(order)))
            indices = order[done : done + self._length_of_batch(next_sizes)]
            computed = _unless_out_of_memory(compute, [items[index] for index in indices])
            if computed is None:
                self._halve([sizes[index] for index in indices])
                continue
            results.update(zip(indices, computed, strict=True))
            now = time.monotonic()
            if now - last_line >= _SECONDS_BETWEEN_LINES:
                last_line = now
                rate = len(results) / (now - began)
                logger.info("%d of %d %s, %.1f per second", len(results), len(items), called, rate)
        return [results[index] for index in range(len(items))]

    def _length_of_batch(self, sizes: Iterable[Size]) -> int:
        """Return how many of the next items, of which the first is the longest, form a batch."""
        count = num_rows = longest = 0
        any_padded = False
        enough = math.inf if self._enough_tokens is None else self._enough_tokens
        most = math.inf if self.max_tokens is None else self.max_tokens
        for size in itertools.islice(sizes, self._max_items):
            longest = longest or size.num_tokens
            any_padded |= size.is_padded
            is_similar = size.num_tokens >= _SIMILAR * longest
            wastes = any_padded and not is_similar and num_rows * longest >= enough
            num_rows += size.num_rows
            if count and (wastes or num_rows * longest > most):
                break
            count += 1
        return count

    def _halve(self, sizes: list[Size]) -> None:
        num_tokens = sum(size.num_rows for size in sizes) * sizes[0].num_tokens
        if len(sizes) == 1:
            raise ModelError(
                f"memory ran out on a batch of {sizes[0].num_rows} x {sizes[0].num_tokens} tokens, "
                "which cannot be divided: shorten the prompts, or give the step a GPU with more "
                "memory"
            )
        self.max_tokens = num_tokens // 2
        logger.warning(
            "memory ran out on a batch of %d tokens: further batches have at most %d",
            num_tokens,
            self.max_tokens,
        )


def _unless_out_of_memory(
    compute: Callable[[list[Item]], Sequence[Result]], batch: list[Item]
) -> Sequence[Result] | None:
    """Return the results of a batch, or None if memory ran out."""
    try:
        return compute(batch)
    except torch.OutOfMemoryError:
        pass
    # Only here, because the exception held the tensors of the batch.
    torch.cuda.empty_cache()
    return None


def _bytes_per_token(model: Any) -> int:
    """Return the memory that a token needs at most, in the cache of all layers and in one layer."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * heads * head_dim
    # Of a mixture of experts, each token is in the MLPs of several experts.
    mlp = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    mlp *= getattr(config, "num_experts_per_tok", None) or 1
    one_layer = 12 * config.hidden_size + 4 * mlp
    return int((cached + one_layer) * model.dtype.itemsize)
