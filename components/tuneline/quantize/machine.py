"""The machine that a step runs on: how many CPU threads to use, and whether the disk is full."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

FULL_BYTES = 1 << 20
"""A disk with fewer free bytes counts as full."""


def num_threads() -> int:
    """Return the number of threads that a check computes on: half of the CPUs.

    Threads of ggml and of OpenMP spin until the last one is done. One thread that waits for a busy
    core therefore holds up all others, and a local run checks two exports at a time. SmolLM2 on
    two cores with other work: f16 generated 45 tokens per second on one thread and 5 on two;
    logits of 540 tokens in fp32 took 4.5 s on one thread and 54 s on two.
    """
    return max(1, len(os.sched_getaffinity(0)) // 2)


@contextlib.contextmanager
def few_threads() -> Iterator[None]:
    """Let torch compute on `num_threads()` threads within the body."""
    # Processes that only wait for another one import this module, and do without torch.
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def raise_if_full(file: Path) -> None:
    """Raise the error of a full disk if a program failed to write `file` for lack of room.

    The programs do not name the cause: llama.cpp says "basic_ios::clear: iostream error", and its
    converter says how many bytes it wrote.

    Raises:
        OSError: the disk of `file` has no room left.
    """
    if shutil.disk_usage(file.parent).free < FULL_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
