"""A group's frozen weights and adapters as GEMM operands, in bf16 or fp8.

All kinds of operands compute the equations of lora.py. *Wide* and *fp8* operands are created in
each forward and in each backward, and then freed.

*Stored*: the weights themselves, for a group with neither NF4 weights, adapters nor biases.
*Wide*: one tensor [N + P, K + P] in the model's dtype (the arena) holds W, dequantised once, and
the adapters: [W | sB ; A | unused]. Where memory is free (budget.py), the arena is kept, and each
forward writes only the adapters again.
*Fp8*: [W | sB] as e4m3 rows for the forward, [W^T | A^T] as e4m3 rows for the input gradient, each
computed when it is first used. X and dY are quantised row by row, together with the adapter columns
(X A^T or G). X A^T, G and the adapters' gradients are computed by bf16 GEMMs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tuneline.kernels.ops.copy_rows import copy_rows
from tuneline.kernels.ops.fp8 import nf4_to_fp8, quantize_rows, scaled_mm
from tuneline.kernels.ops.lora import LoraGroup, pack
from tuneline.kernels.ops.nf4 import NF4Weight, dequantize_nf4


def group_operands(group: LoraGroup, like: Tensor, *, packs: bool = True) -> Operands:
    """Return the group's operands in the dtype and on the device of `like`.

    Args:
        group: The linears.
        like: A tensor of the dtype and on the device of the activations.
        packs: Write the adapters into a kept arena. False in a backward, because its forward wrote
            them and they have not changed since.
    """
    if group.largest is not None:
        return Fp8Operands(group, like)
    weights = [linear.weight for linear in group.linears]
    stored = [w for w in weights if isinstance(w, Tensor) and w.dtype == like.dtype]
    if group.num_columns == 0 and len(stored) == len(weights):
        return StoredOperands(stored)
    return WideOperands(group, like, packs=packs)


def augmented_input(num_tokens: int, group: LoraGroup, like: Tensor) -> Tensor:
    """Allocate X' [T, K + P]; the op that computes X writes X into the first K columns."""
    return like.new_empty(num_tokens, group.num_in + group.num_columns)


class StoredOperands:
    """Weights that are read where they are stored, with one product per linear."""

    def __init__(self, weights: list[Tensor]) -> None:
        """Take the weights [N, K] of the group's linears."""
        self._weights = weights

    def write_lora_columns(self, x_TK: Tensor) -> None:
        """Write nothing: X' has no columns beside X."""

    def forward(
        self,
        x_TK: Tensor,
        *,
        residual_TN: Tensor | None = None,
        scale: float = 1.0,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return Y = X W^T [T, N], or residual + scale * Y; `out` may be the residual."""
        sizes = [weight.shape[0] for weight in self._weights]
        y_TN = x_TK.new_empty(x_TK.shape[0], sum(sizes)) if out is None else out
        residuals = [None] * len(sizes) if residual_TN is None else residual_TN.split(sizes, 1)
        for weight, y_Tn, residual_Tn in zip(
            self._weights, y_TN.split(sizes, 1), residuals, strict=True
        ):
            if residual_Tn is None:
                torch.mm(x_TK, weight.t(), out=y_Tn)
            else:
                torch.addmm(residual_Tn, x_TK, weight.t(), alpha=scale, out=y_Tn)
        return y_TN

    def input_gradient(
        self, dy_TN: Tensor, room_TNP: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return dX [T, K] and None; `room_TNP` is unused, as there is no G."""
        parts = dy_TN.split([weight.shape[0] for weight in self._weights], 1)
        dx_TK = torch.mm(parts[0], self._weights[0])
        for dy_Tn, weight in zip(parts[1:], self._weights[1:], strict=True):
            dx_TK.addmm_(dy_Tn, weight)
        return dx_TK, None

    def lora_gradient(self, dy_TN: Tensor) -> Tensor | None:
        """Return None: there is no adapter."""
        return None


class WideOperands:
    """Operands in the model's dtype: the arena, and the GEMMs that read it."""

    def __init__(self, group: LoraGroup, like: Tensor, *, packs: bool) -> None:
        """Dequantise the weights, unless they are kept, and pack the adapters beside them."""
        num_out, num_in, num_columns = group.num_out, group.num_in, group.num_columns
        self._group = group
        kept = group.place.arena
        self._arena = self._dequantised(like) if kept is None else kept
        if group.place.is_kept:
            group.place.arena = self._arena
        if num_columns and (packs or kept is None):
            pack(group, self._arena[:num_out, num_in:], self._arena[num_out:, :num_in])

    def _dequantised(self, like: Tensor) -> Tensor:
        group = self._group
        rows, columns = group.num_out + group.num_columns, group.num_in + group.num_columns
        arena = like.new_empty(rows, columns)
        row = 0
        for linear in group.linears:
            out = arena[row : row + linear.num_out, : group.num_in]
            if isinstance(linear.weight, NF4Weight):
                dequantize_nf4(linear.weight, out=out)
            else:
                out.copy_(linear.weight)
            row += linear.num_out
        return arena

    def write_lora_columns(self, x_TKP: Tensor) -> None:
        """Fill the last P columns of X' with X A^T, and one column with ones if there is a bias."""
        num_out, num_in = self._group.num_out, self._group.num_in
        if self._group.num_columns == 0:
            return
        if self._group.rank:
            a_PK = self._arena[num_out:, :num_in]
            torch.mm(x_TKP[:, :num_in], a_PK.t(), out=x_TKP[:, num_in:])
        else:
            x_TKP[:, num_in:].zero_()
        if self._group.has_bias:
            x_TKP[:, num_in + self._group.rank] = 1

    def forward(
        self,
        x_TKP: Tensor,
        *,
        residual_TN: Tensor | None = None,
        scale: float = 1.0,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return Y = X' W'^T [T, N], or residual + scale * Y; `out` may be the residual."""
        weight = self._arena[: self._group.num_out].t()
        if residual_TN is None:
            return torch.mm(x_TKP, weight, out=out)
        return torch.addmm(residual_TN, x_TKP, weight, alpha=scale, out=out)

    def input_gradient(
        self, dy_TN: Tensor, room_TNP: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return dX [T, K] and G = dY (sB) [T, P]; G is None if the group has no adapter.

        Args:
            dy_TN: Gradient of the output.
            room_TNP: The rows of dY followed by P columns, into which G is written. If it is None
                and N <= K, dY is copied into newly allocated rows of this form.
        """
        num_out, num_in = self._group.num_out, self._group.num_in
        arena = self._arena
        if self._group.rank == 0:
            return torch.mm(dy_TN, arena[:num_out, :num_in]), None
        if num_out <= num_in:
            if room_TNP is None:
                room_TNP = dy_TN.new_empty(dy_TN.shape[0], num_out + self._group.num_columns)
                copy_rows(dy_TN, room_TNP[:, :num_out])
            g_TP = room_TNP[:, num_out:]
            torch.mm(dy_TN, arena[:num_out, num_in:], out=g_TP)
            return torch.mm(room_TNP, arena[:, :num_in]), g_TP
        dxg = torch.mm(dy_TN, arena[:num_out])
        dx_TK, g_TP = dxg[:, :num_in], dxg[:, num_in:]
        dx_TK.addmm_(g_TP, arena[num_out:, :num_in])
        return dx_TK, g_TP

    def lora_gradient(self, dy_TN: Tensor) -> Tensor | None:
        """Return G without dX; None if the group has no adapter."""
        num_out, num_in = self._group.num_out, self._group.num_in
        return torch.mm(dy_TN, self._arena[:num_out, num_in:]) if self._group.rank else None


class Fp8Operands:
    """Operands in e4m3; every group of this kind has NF4 weights, an adapter and no bias."""

    def __init__(self, group: LoraGroup, like: Tensor) -> None:
        """Pack the adapters; the weights are converted to e4m3 when they are first used."""
        self._group = group
        self._sb_NP = like.new_empty(group.num_out, group.num_columns)
        self._a_PK = like.new_empty(group.num_columns, group.num_in)
        pack(group, self._sb_NP, self._a_PK)
        self._forward: tuple[Tensor, Tensor] | None = None
        self._backward: tuple[Tensor, Tensor] | None = None

    def write_lora_columns(self, x_TKP: Tensor) -> None:
        """Fill the last P columns of X' with X A^T."""
        num_in = self._group.num_in
        torch.mm(x_TKP[:, :num_in], self._a_PK.t(), out=x_TKP[:, num_in:])

    def forward(
        self,
        x_TKP: Tensor,
        *,
        residual_TN: Tensor | None = None,
        scale: float = 1.0,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return Y = X' W'^T [T, N], or residual + scale * Y; `out` may be the residual."""
        if self._forward is None:
            self._forward = self._weight_rows()
        x8, scale_T = quantize_rows(x_TKP)
        if residual_TN is None:
            return scaled_mm(x8, scale_T, *self._forward, dtype=x_TKP.dtype, out=out)
        y_TN = scaled_mm(x8, scale_T, *self._forward, dtype=x_TKP.dtype)
        return torch.add(residual_TN, y_TN, alpha=scale, out=y_TN if out is None else out)

    def input_gradient(
        self, dy_TN: Tensor, room_TNP: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return dX [T, K] and G = dY (sB) [T, P]; `room_TNP` is unused, as dY is quantised."""
        if self._backward is None:
            self._backward = self._weight_columns()
        g_TP = torch.mm(dy_TN, self._sb_NP)
        dy8, scale = quantize_rows(dy_TN, side_TP=g_TP)
        return scaled_mm(dy8, scale, *self._backward, dtype=dy_TN.dtype), g_TP

    def lora_gradient(self, dy_TN: Tensor) -> Tensor:
        """Return G without dX."""
        return torch.mm(dy_TN, self._sb_NP)

    def _weight_rows(self) -> tuple[Tensor, Tensor]:
        group = self._group
        w8 = self._sb_NP.new_empty(
            group.num_out, group.num_in + group.num_columns, dtype=torch.float8_e4m3fn
        )
        _, scale_N = quantize_rows(self._sb_NP, floor=group.largest, out=w8[:, group.num_in :])
        row = 0
        for linear in group.linears:
            rows = slice(row, row + linear.num_out)
            assert isinstance(linear.weight, NF4Weight)
            nf4_to_fp8(linear.weight, scale_N[rows], out=w8[rows, : group.num_in])
            row += linear.num_out
        return w8, scale_N

    def _weight_columns(self) -> tuple[Tensor, Tensor]:
        group = self._group
        v8 = self._sb_NP.new_empty(
            group.num_in, group.num_out + group.num_columns, dtype=torch.float8_e4m3fn
        )
        _, scale_K = quantize_rows(self._a_PK.t(), floor=group.largest, out=v8[:, group.num_out :])
        row = 0
        for linear in group.linears:
            columns = slice(row, row + linear.num_out)
            assert isinstance(linear.weight, NF4Weight)
            nf4_to_fp8(linear.weight, scale_K, out=v8[:, columns], transposed=True)
            row += linear.num_out
        return v8, scale_K


Operands = StoredOperands | WideOperands | Fp8Operands
