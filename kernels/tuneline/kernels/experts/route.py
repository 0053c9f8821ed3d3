"""Sort the tokens' choices of experts into rows that are contiguous per expert.

A *slot* is one choice: slot t * k + j is the j-th expert of token t. A *row* is a slot's place
after a stable sort by expert. A slot whose expert is not in [0, E) is dropped (expert parallelism
marks the choices of other ranks so). The rows are cut into *tiles* of at most `block` rows, none of
which crosses experts; a grouped product computes one tile after the other. The host reads nothing
back: `tile_starts[E]` on the device ends the work.

Shapes: T tokens, k experts per token, S = T k slots, E experts.
"""

# Triton's types declare neither a launch's options nor plain values for constexpr parameters.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tuneline.kernels.ops._dispatch import use_kernel

_MAX_COUNTS = 16384
"""Most counts, parts times experts, that one program of `_scan_kernel` holds."""

_RANK_BLOCK = 64


@dataclass(frozen=True, slots=True)
class Routing:
    """Rows by expert; every tensor is int32 and on the device.

    Attributes:
        slot_of_row: [S]; rows beyond `starts[E]` are undefined.
        row_of_slot: [S]; -1 for a dropped slot.
        starts: First row of each expert, and the number of rows [E + 1].
        tile_starts: First tile of each expert, and the number of tiles [E + 1].
        expert_of_tile: [max_tiles]; undefined beyond `tile_starts[E]`.
        block: Rows per tile.
        top_k: k.
    """

    slot_of_row: Tensor
    row_of_slot: Tensor
    starts: Tensor
    tile_starts: Tensor
    expert_of_tile: Tensor
    block: int
    top_k: int

    @property
    def num_experts(self) -> int:
        """E: number of experts."""
        return self.starts.shape[0] - 1

    @property
    def num_rows(self) -> int:
        """S: slots, dropped ones included."""
        return self.slot_of_row.shape[0]

    @property
    def max_tiles(self) -> int:
        """Most tiles that S rows of E experts can make."""
        return self.expert_of_tile.shape[0]

    @classmethod
    def of_tensors(cls, tensors: Sequence[Any], block: int, top_k: int) -> Routing:
        """Return the routing whose `tensors` are given."""
        slot_of_row, row_of_slot, starts, tile_starts, expert_of_tile = tensors
        return cls(slot_of_row, row_of_slot, starts, tile_starts, expert_of_tile, block, top_k)

    def spans(self, first: int, last: int) -> list[tuple[int, slice]]:
        """Return each expert and its rows, for the references: the host waits for the device."""
        starts = self.starts.tolist()
        return [(e, slice(starts[e], starts[e + 1])) for e in range(first, last)]

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors, for `save_for_backward`."""
        return (
            self.slot_of_row, self.row_of_slot, self.starts, self.tile_starts, self.expert_of_tile,
        )  # fmt: skip


@triton.jit
def _count_kernel(
    index_ptr, counts_ptr, num_slots, E: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr
):
    """Count each expert's slots in one part of BLOCK slots."""
    part = tl.program_id(0)
    slot = part * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(index_ptr + slot, mask=slot < num_slots, other=-1).to(tl.int32)
    valid = (expert >= 0) & (expert < E)
    count = tl.histogram(tl.where(valid, expert, 0), LANES, mask=valid)
    tl.store(counts_ptr + part * LANES + tl.arange(0, LANES), count)


@triton.jit
def _scan_kernel(
    counts_ptr, starts_ptr, tile_starts_ptr, num_parts,
    E: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Replace the counts of all parts by the first row of each expert in each part."""
    part = tl.arange(0, PARTS)
    lane = tl.arange(0, LANES)
    pointers = counts_ptr + part[:, None] * LANES + lane[None, :]
    count = tl.load(pointers, mask=(part < num_parts)[:, None], other=0)
    total = tl.sum(count, axis=0)
    end = tl.cumsum(total, axis=0)
    tiles = (total + TILE - 1) // TILE
    before = tl.cumsum(count, axis=0) - count + (end - total)[None, :]
    tl.store(pointers, before, mask=(part < num_parts)[:, None])
    tl.store(starts_ptr + lane + 1, end, mask=lane < E)
    tl.store(tile_starts_ptr + lane + 1, tl.cumsum(tiles, axis=0), mask=lane < E)
    tl.store(starts_ptr + lane, end - total, mask=lane == 0)
    tl.store(tile_starts_ptr + lane, lane, mask=lane == 0)


@triton.jit
def _place_kernel(
    index_ptr, before_ptr, slot_of_row_ptr, row_of_slot_ptr, tile_starts_ptr, expert_of_tile_ptr,
    num_slots, num_parts, num_tiles,
    E: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Place the slots of one part; the last programs write the experts of BLOCK tiles each."""
    program = tl.program_id(0)
    if program < num_parts:
        for i in range(BLOCK // STEP):
            slot = program * BLOCK + i * STEP + tl.arange(0, STEP)
            inside = slot < num_slots
            expert = tl.load(index_ptr + slot, mask=inside, other=-1).to(tl.int32)
            valid = (expert >= 0) & (expert < E)
            rank = tl.zeros([STEP], dtype=tl.int32)
            for j in range(BLOCK // STEP):
                other = program * BLOCK + j * STEP + tl.arange(0, STEP)
                theirs = tl.load(index_ptr + other, mask=other < num_slots, other=-1).to(tl.int32)
                same = (expert[:, None] == theirs[None, :]) & (other[None, :] < slot[:, None])
                rank += tl.sum(same.to(tl.int32), axis=1)
            row = tl.load(before_ptr + program * LANES + expert, mask=valid, other=0) + rank
            tl.store(slot_of_row_ptr + row, slot, mask=valid)
            tl.store(row_of_slot_ptr + slot, tl.where(valid, row, -1), mask=inside)
    else:
        for k in range(BLOCK // STEP):
            tile = (program - num_parts) * BLOCK + k * STEP + tl.arange(0, STEP)
            lane = tl.arange(0, LANES)
            end = tl.load(tile_starts_ptr + lane + 1, mask=lane < E, other=2147483647)
            owner = tl.sum((end[None, :] <= tile[:, None]).to(tl.int32), axis=1)
            tl.store(expert_of_tile_ptr + tile, owner, mask=tile < num_tiles)


def max_tiles(num_rows: int, num_experts: int, block: int) -> int:
    """Return the most tiles of `block` rows that `num_rows` rows can make."""
    return num_rows // block + min(num_experts, num_rows)


def route_reference(index: Tensor, num_experts: int, block: int) -> Routing:
    """Compute `route` in plain torch; same arguments."""
    top_k, flat = index.shape[1], index.reshape(-1)
    valid = (flat >= 0) & (flat < num_experts)
    expert = torch.where(valid, flat, num_experts).long()
    counts = torch.bincount(expert, minlength=num_experts + 1)[:num_experts]
    slot_of_row = expert.argsort(stable=True)
    row_of_slot = torch.empty_like(slot_of_row)
    row_of_slot[slot_of_row] = torch.arange(len(flat), device=flat.device)
    tiles = -(-counts // block)
    owner = torch.repeat_interleave(torch.arange(num_experts, device=flat.device), tiles)
    expert_of_tile = owner.new_zeros(max_tiles(len(flat), num_experts, block))
    expert_of_tile[: len(owner)] = owner

    def ends(amounts: Tensor) -> Tensor:
        return torch.nn.functional.pad(amounts.cumsum(0), (1, 0)).int()

    return Routing(
        slot_of_row.int(),
        torch.where(valid, row_of_slot, -1).int(),
        ends(counts),
        ends(tiles),
        expert_of_tile.int(),
        block,
        top_k,
    )


def route(index: Tensor, num_experts: int, block: int) -> Routing:
    """Sort the slots of index [T, k] by expert, in tiles of `block` rows."""
    if not use_kernel(index):
        return route_reference(index, num_experts, block)
    index = index.contiguous()
    num_slots = index.numel()
    lanes = max(16, triton.next_power_of_2(num_experts))
    part = max(256, triton.next_power_of_2(triton.cdiv(num_slots * lanes, _MAX_COUNTS)))
    num_parts = triton.cdiv(num_slots, part)
    num_tiles = max_tiles(num_slots, num_experts, block)

    def empty(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=index.device)

    counts = empty(num_parts * lanes)
    routing = Routing(
        empty(num_slots), empty(num_slots), empty(num_experts + 1), empty(num_experts + 1),
        empty(num_tiles), block, index.shape[1],
    )  # fmt: skip
    _count_kernel[(num_parts,)](index, counts, num_slots, E=num_experts, LANES=lanes, BLOCK=part)
    _scan_kernel[(1,)](
        counts, routing.starts, routing.tile_starts, num_parts,
        E=num_experts, LANES=lanes, PARTS=triton.next_power_of_2(num_parts), TILE=block,
        num_warps=16,
    )  # fmt: skip
    _place_kernel[(num_parts + triton.cdiv(num_tiles, part),)](
        index, counts, routing.slot_of_row, routing.row_of_slot, routing.tile_starts,
        routing.expert_of_tile, num_slots, num_parts, num_tiles,
        E=num_experts, LANES=lanes, BLOCK=part, STEP=_RANK_BLOCK,
    )  # fmt: skip
    return routing
