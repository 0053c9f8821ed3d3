"""Properties of this machine: how many CPU threads to use, and whether the disk is full."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

FULL_BYTES = 1 << 20
"""A disk with fewer free bytes than this counts as full."""


def num_threads() -> int:
    """Return the number of threads that a check computes on: half of the CPUs.

    Threads of ggml and of OpenMP wait in a busy loop until the last thread is done. If one thread
    has to wait for a core that another process uses, all others wait too. This is common, because
    a local run checks two exports at the same time. Measured with SmolLM2 on two cores on which
    another process ran: f16 generated 45 tokens per second on one thread and 5 on two; computing
    the logits of 540 tokens in fp32 took 4.5 s on one thread and 54 s on two.
    """
    return max(1, len(os.sched_getaffinity(0)) // 2)


@contextlib.contextmanager
def few_threads() -> Iterator[None]:
    """Let torch compute on `num_threads()` threads within the body."""
    # Imported here, because processes that only wait for a child import this module, without torch.
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def raise_if_full(file: Path) -> None:
    """Raise the error of a full disk if the disk of `file` is full; call it after a failed write.

    The programs that write the file do not name this cause: llama.cpp says "basic_ios::clear:
    iostream error", and llama.cpp's converter only says how many bytes were written.

    Raises:
        OSError: the disk of `file` has fewer than `FULL_BYTES` free bytes.
    """
    if shutil.disk_usage(file.parent).free < FULL_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
