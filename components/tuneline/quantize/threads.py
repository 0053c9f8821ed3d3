"""How many threads a check computes on."""

import contextlib
import os
from collections.abc import Iterator


def num_threads() -> int:
    """Return half of the CPUs.

    Threads of ggml and of OpenMP spin until the last one is done, so one that waits for a busy
    core holds up all, and a local run checks two exports at a time. SmolLM2 on two cores with
    other work: in f16 45 tokens/s on one thread and 5 on two; logits of 540 tokens in fp32 4.5 s
    on one thread and 54 s on two.
    """
    return max(1, len(os.sched_getaffinity(0)) // 2)


@contextlib.contextmanager
def few_threads() -> Iterator[None]:
    """Let torch compute on `num_threads()` within the body."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)
