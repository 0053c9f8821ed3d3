"""A Triton kernel that writes to an address that is not mapped; see restart_on_gpu.py."""

from typing import Any

import triton
import triton.language as tl


@triton.jit
def _write(address: Any) -> None:
    tl.store(address.to(tl.int64).to(tl.pointer_type(tl.float32)), 1.0)


def write_to(address: int) -> None:
    """Write to an address of the current GPU."""
    _write[(1,)](address)
