"""The arena: dequantised experts and their adapters as operands of grouped products.

For experts stored as [N, K], as in lora.py:

    arena[e] = [ W_e | s B_e ]      [N + R, K + R]        forward: columns K + R of the first N rows
               [ A_e |       ]                            input gradient: N + R rows of K columns

and for experts stored as [K, N], with the two adapter matrices transposed and exchanged. So both
directions read the same numbers. The rows that a product reads hold x | x A^T in the same way.
Rows of the arena and of the rows end with unused columns up to a multiple of 64: TMA reads
aligned lines.

Shapes: E experts, N outputs, K inputs, r rank, R padded rank, S rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tuneline.kernels.experts.gemm import grouped_mm
from tuneline.kernels.experts.route import Routing
from tuneline.kernels.experts.skinny import project
from tuneline.kernels.experts.stack import ExpertStack, LoraPair, dequantize_experts
from tuneline.kernels.limits import MIN_ADAPTER_COLUMNS

ARENA_BYTES = 2 * 2**30
"""Most bytes of dequantised experts at once; a projection that needs more runs in chunks."""

_MIN_RANK = 16


def padded_rank(pair: LoraPair | None) -> int:
    """Return R: the rank, padded to a power of two of at least 16; 0 without an adapter."""
    return 0 if pair is None else max(_MIN_RANK, 1 << (pair.rank - 1).bit_length())


def new_rows(num_rows: int, num_in: int, rank: int, like: Tensor) -> Tensor:
    """Return rows [S, num_in + rank] whose stride is padded."""
    return like.new_empty(num_rows, num_in + _side_columns(rank))[:, : num_in + rank]


def _side_columns(rank: int) -> int:
    """Return the columns beside a matrix that hold R columns and keep its rows aligned."""
    return -(-rank // MIN_ADAPTER_COLUMNS) * MIN_ADAPTER_COLUMNS


class Arena:
    """One projection's experts, dequantised in as many chunks as `ARENA_BYTES` asks for.

    An arena of one chunk is dequantised once, and lives as long as this object.
    """

    def __init__(
        self, stack: ExpertStack, pair: LoraPair | None, routing: Routing, like: Tensor
    ) -> None:
        """Dequantise nothing yet; `like` has the dtype and device of the products."""
        self._stack, self._pair, self._routing, self._like = stack, pair, routing, like
        self.rank = padded_rank(pair)
        per_expert = stack.num_out * stack.num_in * like.element_size()
        most = max(1, ARENA_BYTES // per_expert)
        self._size = -(-stack.num_experts // -(-stack.num_experts // most))
        self._whole: Tensor | None = None

    def product(
        self, rows: Tensor, *, forward: bool, out: Tensor, tokens: Tensor | None = None
    ) -> Tensor | None:
        """Compute a projection or its input gradient, and return rows A^T or rows (s B) [S, R].

        Args:
            rows: Sorted rows from `new_rows`; the product fills their last R columns.
            forward: Whether to compute the projection; otherwise the gradient of its input.
            out: [S, N] or [S, K], unit stride along the columns.
            tokens: The rows of tokens [T, ...] to gather into `rows` first.

        Returns:
            The adapter's projection of the rows, contiguous; None without an adapter.
        """
        stack, rank, routing = self._stack, self.rank, self._routing
        num_in = rows.shape[1] - rank
        p_SR = rows.new_empty(rows.shape[0], rank) if rank else None
        stored_oi = forward != stack.transposed
        for first, last, weight in self._chunks():
            if rank or tokens is not None:
                project(
                    rows[:, :num_in] if tokens is None else tokens,
                    self._adapter(weight)[0 if forward else 1] if rank else None,
                    routing,
                    p_SR=p_SR,
                    room_SR=rows[:, num_in:] if rank else None,
                    copy_SI=None if tokens is None else rows[:, :num_in],
                    first=first,
                    last=last,
                )
            grouped_mm(
                rows, weight, routing, stored_oi=stored_oi, out=out, first=first, last=last,
                bias_EO=stack.bias if forward else None,
            )  # fmt: skip
            del weight
        return p_SR

    def _adapter(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the places of A [chunk, R, K] and (s B)^T [chunk, R, N] in a chunk of the arena.

        The first projects the rows of the forward, and the second those of the input gradient.
        """
        num_rows, num_columns = self._stack.stored_shape
        below = weight[:, num_rows : num_rows + self.rank, :num_columns]
        beside = weight[:, :num_rows, num_columns : num_columns + self.rank].transpose(1, 2)
        return (beside, below) if self._stack.transposed else (below, beside)

    def _chunks(self) -> Iterator[tuple[int, int, Tensor]]:
        num_experts = self._stack.num_experts
        for first in range(0, num_experts, self._size):
            last = min(first + self._size, num_experts)
            weight = self._fill(first, last) if self._whole is None else self._whole
            if self._size >= num_experts:
                self._whole = weight
            yield first, last, weight
            del weight

    def _fill(self, first: int, last: int) -> Tensor:
        """Return experts `first` to `last` (exclusive) with their adapters."""
        stack, pair = self._stack, self._pair
        num_rows, num_columns = stack.stored_shape
        weight = self._like.new_empty(
            last - first, num_rows + self.rank, num_columns + _side_columns(self.rank)
        )
        dequantize_experts(
            stack, self._routing.starts, first=first, last=last,
            out=weight[:, :num_rows, :num_columns],
        )  # fmt: skip
        if pair is None:
            return weight
        a_room, b_room = self._adapter(weight)
        rank, b = pair.rank, pair.b.detach()[first:last].transpose(1, 2)
        if rank != self.rank:
            a_room[:, rank:], b_room[:, rank:] = 0, 0
        a_room[:, :rank] = pair.a.detach()[first:last]
        torch.mul(b, pair.scaling, out=b_room[:, :rank])
        return weight
