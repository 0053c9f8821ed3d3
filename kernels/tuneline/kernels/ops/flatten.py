"""Multiply matrices by factors and lay them out in one flat tensor, in one launch.

    out = [f_1 x_1 | f_2 x_2 | ...]        x_i [R_i, C_i] with any strides, each in row-major order

A captured graph hands out its gradients in this way: those of a layer are slices of wider products
and sums (lora.py), so torch would launch a multiplication per slice and then concatenate the
results.
"""

# Triton's types declare neither a launch's options nor plain values for constexpr parameters.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuneline.kernels.ops._dispatch import use_kernel

_BLOCK = 2048
_FIELDS = tl.constexpr(6)
"""Numbers per matrix: columns, elements, start in the output; address, strides of rows, columns."""


class Scaled(NamedTuple):
    """A matrix that stands for `factor * unscaled`."""

    unscaled: Tensor
    factor: float = 1.0

    def value(self, dtype: torch.dtype) -> Tensor:
        """Return the product in `dtype`; without a factor, the matrix itself if it has the type."""
        product = self.unscaled if self.factor == 1 else self.unscaled * self.factor
        return product.to(dtype)


@triton.jit
def _flatten_kernel(table_ptr, factor_ptr, tile_ptr, out_ptr, BLOCK: tl.constexpr):
    """Write BLOCK elements of one matrix; a tile is the matrix's index and the first element."""
    tile = tl.program_id(0)
    index = tl.load(tile_ptr + 2 * tile)
    at = tl.load(tile_ptr + 2 * tile + 1) + tl.arange(0, BLOCK)
    entry = table_ptr + index * _FIELDS
    columns, size, start = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    x_ptr = tl.load(entry + 3).to(tl.pointer_type(tl.float32))
    mask = at < size
    row = at // columns.to(tl.int32)
    column = at - row * columns.to(tl.int32)
    x = tl.load(x_ptr + row * tl.load(entry + 4) + column * tl.load(entry + 5), mask=mask)
    value = x * tl.load(factor_ptr + index)
    tl.store(out_ptr + start + at, value.to(out_ptr.dtype.element_ty), mask=mask)


class Flattener:
    """Writes float32 matrices into one flat tensor; a captured graph may contain the launch.

    The kernel reads the matrices' addresses from a table on the device. A capture cannot fill the
    table, so `fill` does so after it; the addresses are the same in each replay.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], out: Tensor) -> None:
        """Create the table.

        Args:
            shapes: Rows and columns of each matrix.
            out: Contiguous tensor of as many elements as the matrices have.
        """
        table, tiles, start = [], [], 0
        for index, (rows, columns) in enumerate(shapes):
            table.append([columns, rows * columns, start, 0, 0, 0])
            tiles += [[index, first] for first in range(0, rows * columns, _BLOCK)]
            start += rows * columns
        assert out.shape == (start,) and out.is_contiguous()
        self._out = out
        self._table = torch.tensor(table, dtype=torch.int64, device=out.device)
        self._tiles = torch.tensor(tiles, dtype=torch.int32, device=out.device)
        self._factors = torch.ones(len(shapes), dtype=torch.float32, device=out.device)
        self._sources: list[list[int]] = []
        self._numbers: list[float] = []

    def launch(self, matrices: Sequence[Scaled]) -> None:
        """Write the matrices into the flat tensor; a capture has to be followed by `fill`."""
        if not matrices:
            return
        if not use_kernel(self._out) or any(x.dtype != torch.float32 for x, _ in matrices):
            dtype = self._out.dtype
            torch.cat([m.value(dtype).reshape(-1) for m in matrices], out=self._out)
            return
        self._sources = [[x.data_ptr(), x.stride(0), x.stride(1)] for x, _ in matrices]
        self._numbers = [factor for _, factor in matrices]
        if not (self._out.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.fill()
        _flatten_kernel[(len(self._tiles),)](
            self._table, self._factors, self._tiles, self._out, BLOCK=_BLOCK, num_warps=4
        )

    def fill(self) -> None:
        """Write what the last launch reads into the table."""
        if self._sources:
            self._table[:, 3:] = torch.tensor(self._sources, dtype=torch.int64)
            self._factors.copy_(torch.tensor(self._numbers, dtype=torch.float32))
