"""Dequantise bitsandbytes' NF4 weights in one launch, with LoRA columns or rows written beside.

    w[i] = round(code[nibble(i)] * absmax[i // 64])
    absmax[j] = nested_code[u8(j)] * nested_absmax[j // 256] + offset     (double quantisation)

i counts the elements of the [N, K] weight row by row; byte b holds elements 2b (high nibble) and
2b + 1 (low). Products and sums are rounded one by one in float32 (no fused multiply-add), then
once to the output's dtype: bit for bit what bitsandbytes gives.

One launch fills the operand of an augmented matrix product:

    lora_b [N, R]:  out [N, K + P] = [W | 0 .. lora_scale * B .. 0]   B at column K + lora_column
    lora_a [R, K]:  out [N + P, K] = [W ; A ; 0]
"""

import dataclasses
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class NF4Weight:
    """A weight [N, K] as bitsandbytes stores it; the nested fields are None without double quant.

    Attributes:
        packed: uint8, N * K / 2 bytes.
        absmax: One a block of 64: float32, or uint8 when nested.
        code: The 16 levels, float32.
        shape: (N, K).
        dtype: What the weight dequantises to.
        nested_absmax: float32, one per 256 absmax.
        nested_code: float32 [256].
        offset: float32, 0-dimensional, added to every absmax.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    code: torch.Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    nested_absmax: torch.Tensor | None = None
    nested_code: torch.Tensor | None = None
    offset: torch.Tensor | None = None

    @classmethod
    def from_bnb(cls, param: Any) -> "NF4Weight":
        """Wrap a bitsandbytes `Params4bit` (shares its memory).

        Raises:
            ValueError: If it is not NF4 in blocks of 64, nested blocks of 256, K a multiple of 8.
        """
        state = getattr(param, "quant_state", None)
        if state is None:
            raise ValueError("the parameter has no quant_state: move it to its device first")
        nested = state.state2 if state.nested else None
        if state.quant_type != "nf4" or state.blocksize != 64:
            raise ValueError(
                f"quant_type={state.quant_type!r}, blocksize={state.blocksize}: only nf4 in "
                "blocks of 64 is supported; load with bnb_4bit_quant_type='nf4'"
            )
        if nested is not None and nested.blocksize != 256:
            raise ValueError(f"nested blocksize {nested.blocksize}: only 256 is supported")
        if len(state.shape) != 2 or state.shape[1] % 8:
            raise ValueError(f"shape {tuple(state.shape)}: need 2 sizes, the last a multiple of 8")
        return cls(
            packed=param.data.view(torch.uint8).reshape(-1),
            absmax=state.absmax,
            code=state.code,
            shape=(state.shape[0], state.shape[1]),
            dtype=state.dtype,
            nested_absmax=None if nested is None else nested.absmax,
            nested_code=None if nested is None else nested.code,
            offset=None if nested is None else state.offset,
        )


def dequantize_nf4_reference(
    w: NF4Weight,
    *,
    out: torch.Tensor | None = None,
    lora_a: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    lora_scale: float = 1.0,
    lora_column: int = 0,
) -> torch.Tensor:
    """Compute `dequantize_nf4` in plain torch."""
    N, K = w.shape
    out = _output(w, out, lora_a, lora_b, lora_column)
    nibbles = torch.stack([w.packed >> 4, w.packed & 15], dim=-1).reshape(-1, 64)
    absmax = w.absmax
    if w.nested_absmax is not None:
        scale = w.nested_absmax.repeat_interleave(256)[: absmax.numel()]
        absmax = w.nested_code[absmax.int()] * scale + w.offset
    out[:N, :K] = (w.code[nibbles.int()] * absmax[:, None]).view(N, K).to(out.dtype)
    if lora_b is not None:
        out[:, K:] = 0
        scaled = lora_b.float() * lora_scale
        out[:, K + lora_column : K + lora_column + lora_b.shape[1]] = scaled.to(out.dtype)
    if lora_a is not None:
        out[N : N + lora_a.shape[0]] = lora_a.to(out.dtype)
        out[N + lora_a.shape[0] :] = 0
    return out


def _output(
    w: NF4Weight,
    out: torch.Tensor | None,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    lora_column: int,
) -> torch.Tensor:
    """Check or allocate the output; a pad is a multiple of 64, which cuBLAS needs to be fast."""
    N, K = w.shape
    if lora_a is not None and lora_b is not None:
        raise ValueError("lora_a adds rows and lora_b adds columns: pass one of them")
    num_rows = 0 if lora_a is None else lora_a.shape[0]
    num_cols = 0 if lora_b is None else lora_column + lora_b.shape[1]
    if out is None:
        shape = (N + -(-num_rows // 64) * 64, K + -(-num_cols // 64) * 64)
        return torch.empty(shape, dtype=w.dtype, device=w.packed.device)
    exact_rows, exact_cols = lora_a is None, lora_b is None
    if (
        out.shape[0] < N + num_rows
        or (exact_rows and out.shape[0] != N)
        or out.shape[1] < K + num_cols
        or (exact_cols and out.shape[1] != K)
    ):
        raise ValueError(f"out is {tuple(out.shape)}, weight {w.shape}, LoRA pad of {num_cols} columns")
    return out


def dequantize_nf4(
    w: NF4Weight,
    *,
    out: torch.Tensor | None = None,
    lora_a: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    lora_scale: float = 1.0,
    lora_column: int = 0,
) -> torch.Tensor:
    """Return the weight [N, K], with lora_scale * B beside it or A below it when given.

    Args:
        w: The quantised weight.
        out: Where to write, unit stride along K; its pad beyond [N, K] is filled with LoRA, then 0.
        lora_a: [R, K], any float dtype; rows N to N + R of the output.
        lora_b: [N, R], any float dtype; columns K + lora_column on of the output.
        lora_scale: Multiplies lora_b in float32.
        lora_column: Column in the pad, so that stacked weights get a block-diagonal B.
    """
    return dequantize_nf4_reference(
        w, out=out, lora_a=lora_a, lora_b=lora_b, lora_scale=lora_scale, lora_column=lora_column
    )
