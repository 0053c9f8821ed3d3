"""A group's frozen weights and adapters as GEMM operands, in bf16 or fp8.

All kinds of operands compute the equations of lora.py. *Wide* and *fp8* operands are created in
each forward and in each backward, and then freed unless they are kept.

*Stored*: the weights themselves, for a group with neither NF4 weights, adapters nor biases.
*Wide*: one tensor [N + P, K + P] in the model's dtype (the arena) holds W, dequantised once, and
the adapters: [W | sB ; A | unused]. Where memory is free (budget.py), the arena is kept, and each
forward writes only the adapters again.
*Fp8*: [W | sB] as e4m3 rows for the forward, [W^T | A^T] as e4m3 rows for the input gradient, each
computed when it is first used. Where memory is free, both are kept, and each forward writes only
the adapters again. X and dY are quantised row by row, together with the adapter columns (X A^T or
G). X A^T, G and the adapters' gradients are computed by bf16 GEMMs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tuneline.kernels.ops.copy_rows import copy_rows
from tuneline.kernels.ops.fp8 import (
    LARGEST,
    Side,
    nf4_to_fp8,
    quantize_rows,
    quantize_side,
    scaled_mm,
)
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
        return Fp8Operands(group, like, packs=packs)
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
        self._arena = kept if isinstance(kept, Tensor) else self._dequantised(like)
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


class Fp8Arena:
    """A group's weights and adapters for Fp8Operands; V8 and W8 are written when first asked for.

    They have one scale, which the adapters do not change. So a kept arena is converted once, and
    then only the columns of the adapters are written again.
    """

    def __init__(self, group: LoraGroup, like: Tensor) -> None:
        """Allocate the adapters in the dtype of `like`."""
        assert group.largest is not None
        self._group, self._largest = group, group.largest
        self.sb_NP = like.new_empty(group.num_out, group.num_columns)
        self.a_PK = like.new_empty(group.num_columns, group.num_in)
        num_rows = max(group.num_out, group.num_in)
        self._scales = (self._largest / LARGEST).expand(num_rows).contiguous()
        self._peaks = torch.zeros(2, dtype=torch.float32, device=like.device)
        self._w8: Tensor | None = None
        self._v8: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes on the device, without the scales and peaks."""
        parts = (self.sb_NP, self.a_PK, self._w8, self._v8)
        return sum(part.nbytes for part in parts if part is not None)

    def pack(self) -> None:
        """Write the adapters, also beside the weights that are there."""
        self._peaks.zero_()
        pack(self._group, self.sb_NP, self.a_PK, self._peaks)
        if self._w8 is not None:
            self._write_side(self._w8)
        if self._v8 is not None:
            self._write_side(self._v8, transposed=True)

    def input_side(self, xa_TP: Tensor) -> Side:
        """Return X A^T as the columns beside X."""
        return Side(xa_TP, self._peaks[0], self._largest)

    def gradient_side(self, g_TP: Tensor) -> Side:
        """Return G as the columns beside dY."""
        return Side(g_TP, self._peaks[1], self._largest)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return W8 with its adapters [N, K + P], and the scale of each row."""
        if self._w8 is None:
            self._w8 = self._converted(transposed=False)
        return self._w8, self._scales[: self._group.num_out]

    def columns(self) -> tuple[Tensor, Tensor]:
        """Return V8 with its adapters [K, N + P], and the scale of each row."""
        if self._v8 is None:
            self._v8 = self._converted(transposed=True)
        return self._v8, self._scales[: self._group.num_in]

    def _converted(self, *, transposed: bool) -> Tensor:
        group = self._group
        sides = (group.num_in, group.num_out) if transposed else (group.num_out, group.num_in)
        size = sides[0], sides[1] + group.num_columns
        operand = self.sb_NP.new_empty(size, dtype=torch.float8_e4m3fn)
        start = 0
        for linear in group.linears:
            assert isinstance(linear.weight, NF4Weight)
            part = slice(start, start + linear.num_out)
            out = operand[:, part] if transposed else operand[part, : group.num_in]
            nf4_to_fp8(linear.weight, self._largest, out=out, transposed=transposed)
            start += linear.num_out
        self._write_side(operand, transposed=transposed)
        return operand

    def _write_side(self, operand: Tensor, *, transposed: bool = False) -> None:
        side, peak = (self.a_PK.t(), 1) if transposed else (self.sb_NP, 0)
        out = operand[:, -self._group.num_columns :]
        quantize_side(side, peak=self._peaks[peak], largest=self._largest, out=out)


class Fp8Operands:
    """Operands in e4m3; every group of this kind has NF4 weights, an adapter and no bias."""

    def __init__(self, group: LoraGroup, like: Tensor, *, packs: bool) -> None:
        """Pack the adapters; the weights are converted to e4m3 when they are first used."""
        self._num_in = group.num_in
        kept = group.place.arena
        self._arena = kept if isinstance(kept, Fp8Arena) else Fp8Arena(group, like)
        if packs or kept is None:
            self._arena.pack()
        if group.place.is_kept and kept is None:
            # Now, because a backward may be captured in a graph, whose memory is not kept; and
            # before the arena is kept, because memory may run out here.
            self._arena.rows(), self._arena.columns()
            group.place.arena = self._arena

    def write_lora_columns(self, x_TKP: Tensor) -> None:
        """Fill the last P columns of X' with X A^T."""
        torch.mm(x_TKP[:, : self._num_in], self._arena.a_PK.t(), out=x_TKP[:, self._num_in :])

    def forward(
        self,
        x_TKP: Tensor,
        *,
        residual_TN: Tensor | None = None,
        scale: float = 1.0,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return Y = X' W'^T [T, N], or residual + scale * Y; `out` may be the residual."""
        w8, w_scale_N = self._arena.rows()
        side = self._arena.input_side(x_TKP[:, self._num_in :])
        x8, scale_T = quantize_rows(x_TKP[:, : self._num_in], side)
        if residual_TN is None:
            return scaled_mm(x8, scale_T, w8, w_scale_N, dtype=x_TKP.dtype, out=out)
        y_TN = scaled_mm(x8, scale_T, w8, w_scale_N, dtype=x_TKP.dtype)
        return torch.add(residual_TN, y_TN, alpha=scale, out=y_TN if out is None else out)

    def input_gradient(
        self, dy_TN: Tensor, room_TNP: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return dX [T, K] and G = dY (sB) [T, P]; `room_TNP` is unused, as dY is quantised."""
        v8, v_scale_K = self._arena.columns()
        g_TP = self.lora_gradient(dy_TN)
        dy8, scale_T = quantize_rows(dy_TN, self._arena.gradient_side(g_TP))
        return scaled_mm(dy8, scale_T, v8, v_scale_K, dtype=dy_TN.dtype), g_TP

    def lora_gradient(self, dy_TN: Tensor) -> Tensor:
        """Return G without dX."""
        return torch.mm(dy_TN, self._arena.sb_NP)


Operands = StoredOperands | WideOperands | Fp8Operands
