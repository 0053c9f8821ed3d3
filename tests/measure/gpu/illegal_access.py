"""A Triton kernel that writes to an address that is not mapped; see restart_on_gpu.py."""

import triton
import triton.language as tl


@triton.jit
def _write(address):  # type: ignore[no-untyped-def]  # Triton reads annotations as types
    tl.store(address.to(tl.int64).to(tl.pointer_type(tl.float32)), 1.0)


def write_to(address: int) -> None:
    """Write to an address of the current GPU."""
    _write[(1,)](address)
