"""AdamW over flat buffers, with the gradient-norm clip, in two launches per parameter group.

    coef = min(1, max_norm / (norm + 1e-6)),  norm = ||g|| over all groups;  g = coef g
    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
    p = p (1 - lr weight_decay) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Parameters and state of a group are slices of flat buffers, each slice padded to a multiple of 256
elements. A step collects the gradients into a temporary flat buffer. With state_bits=8, m and v are
stored in blocks of 256 as bitsandbytes stores them: one byte per element, an index into the levels
of `dynamic_map`, which are multiplied by the largest magnitude of the block. In contrast to
bitsandbytes, a positive v is never rounded to 0: if m is not 0, the update would be as large as
lr m / eps.

Sums have a fixed order, so the same gradients give the same bits.
"""

# Triton's types declare neither a launch's options nor plain values for constexpr parameters.
# pyright: reportCallIssue=false, reportArgumentType=false

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from torch._utils import _flatten_dense_tensors

from tuneline.kernels.ops._dispatch import use_kernel

_QUANT_BLOCK = 256
_NORM_PROGRAMS = 1024
_BLOCK = 2048


@triton.jit
def _norm_kernel(grad_ptr, partial_ptr, n, chunk, BLOCK: tl.constexpr):
    """Sum the squares of one chunk, whose length is a multiple of BLOCK."""
    first = tl.program_id(0).to(tl.int64) * chunk
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, chunk, BLOCK):
        at = first + start + tl.arange(0, BLOCK)
        g = tl.load(grad_ptr + at, mask=at < n, other=0.0).to(tl.float32)
        total += g * g
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def _clip_factor(partial_ptr, max_norm, PARTIALS: tl.constexpr):
    norm = tl.sqrt(tl.sum(tl.load(partial_ptr + tl.arange(0, PARTIALS)), axis=0))
    # Not tl.minimum, because a NaN norm must give a NaN factor, as in torch.
    factor = max_norm / (norm + 1e-6)
    return tl.where(factor > 1.0, 1.0, factor)


@triton.jit
def _scale_kernel(grad_ptr, partial_ptr, n, max_norm, PARTIALS: tl.constexpr, BLOCK: tl.constexpr):
    factor = _clip_factor(partial_ptr, max_norm, PARTIALS)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(grad_ptr + at, mask=at < n, other=0.0).to(tl.float32) * factor
    tl.store(grad_ptr + at, g.to(grad_ptr.dtype.element_ty), mask=at < n)


@triton.jit
def _nearest(x, middles_ptr):
    """Return the index of the level nearest to x.

    It is the number of midpoints below x. The 255 sorted midpoints lie between adjacent levels.
    """
    index = tl.zeros_like(x).to(tl.int32)
    for bit in tl.static_range(8):
        below = tl.load(middles_ptr + index + ((128 >> bit) - 1)) < x
        index += tl.where(below, 128 >> bit, 0)
    return index


@triton.jit
def _step_kernel(
    p_ptr, g_ptr, m_ptr, v_ptr, m_absmax_ptr, v_absmax_ptr, m_code_ptr, v_code_ptr,
    m_middles_ptr, v_middles_ptr, partial_ptr, n, max_norm,
    decay, beta1, beta2, rest1, rest2, step_size, root_correction2, eps,
    CLIP: tl.constexpr, PARTIALS: tl.constexpr, EIGHT_BIT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * COLS + tl.arange(0, COLS)[None, :]
    mask = at < n
    p = tl.load(p_ptr + at, mask=mask, other=0.0)
    g = tl.load(g_ptr + at, mask=mask, other=0.0)
    if CLIP:
        g *= _clip_factor(partial_ptr, max_norm, PARTIALS)
    if EIGHT_BIT:
        has_row = row * COLS < n
        m_index = tl.load(m_ptr + at, mask=mask, other=0).to(tl.int32)
        v_index = tl.load(v_ptr + at, mask=mask, other=0).to(tl.int32)
        m_absmax = tl.load(m_absmax_ptr + row, mask=has_row, other=0.0)
        v_absmax = tl.load(v_absmax_ptr + row, mask=has_row, other=0.0)
        m = tl.load(m_code_ptr + m_index) * m_absmax[:, None]
        v = tl.load(v_code_ptr + v_index) * v_absmax[:, None]
    else:
        m = tl.load(m_ptr + at, mask=mask, other=0.0)
        v = tl.load(v_ptr + at, mask=mask, other=0.0)
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    p = p * decay - step_size * m / (tl.sqrt(v) / root_correction2 + eps)
    tl.store(p_ptr + at, p, mask=mask)
    if EIGHT_BIT:
        m_absmax = tl.max(tl.abs(m), axis=1)
        v_absmax = tl.max(v, axis=1)
        tl.store(m_absmax_ptr + row, m_absmax, mask=has_row)
        tl.store(v_absmax_ptr + row, v_absmax, mask=has_row)
        m_index = _nearest(m / tl.where(m_absmax > 0.0, m_absmax, 1.0)[:, None], m_middles_ptr)
        v_index = _nearest(v / tl.where(v_absmax > 0.0, v_absmax, 1.0)[:, None], v_middles_ptr)
        v_index = tl.where((v_index == 0) & (v > 0.0), 1, v_index)
        tl.store(m_ptr + at, m_index.to(tl.uint8), mask=mask)
        tl.store(v_ptr + at, v_index.to(tl.uint8), mask=mask)
    else:
        tl.store(m_ptr + at, m, mask=mask)
        tl.store(v_ptr + at, v, mask=mask)


def dynamic_map(*, signed: bool) -> torch.Tensor:
    """Return the 256 sorted levels of the dynamic 8-bit type, float32.

    For i = 0..6, the interval from 10^(i - 7) to 10^(i - 6) is divided into 2^i equal parts for
    each sign (2^(i + 1) if unsigned). The levels are the midpoints of the parts, plus 0 and 1, as
    in bitsandbytes.
    """
    levels = [torch.tensor([0.0, 1.0], dtype=torch.float32)]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (i if signed else i + 1) + 1, dtype=torch.float32)
        decade = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        levels += [decade, -decade] if signed else [decade]
    return torch.cat(levels).sort().values


@dataclasses.dataclass
class _EightBit:
    """The largest magnitude of each block, and the levels of `dynamic_map`, for 8-bit m and v."""

    m_absmax: torch.Tensor
    v_absmax: torch.Tensor
    m_code: torch.Tensor
    v_code: torch.Tensor


@dataclasses.dataclass
class _Flat:
    """The buffers of one parameter group."""

    p: torch.Tensor
    m: torch.Tensor
    v: torch.Tensor
    starts: list[int]
    eight_bit: _EightBit | None = None
    addresses: list[int] = dataclasses.field(default_factory=list)
    num_steps: int = 0

    @classmethod
    def of(cls, params: list[torch.Tensor], state_bits: int) -> "_Flat":
        """Copy the parameters into one buffer and turn each into a slice of that buffer."""
        starts, n = [], 0
        for param in params:
            starts.append(n)
            n += -(-param.numel() // _QUANT_BLOCK) * _QUANT_BLOCK
        device = params[0].device
        p = torch.zeros(n, device=device)
        if state_bits == 8:
            m = torch.full((n,), 127, dtype=torch.uint8, device=device)  # The index of level 0.
            v = torch.zeros(n, dtype=torch.uint8, device=device)
            m_absmax, v_absmax = torch.zeros(2, n // _QUANT_BLOCK, device=device)
            codes = [dynamic_map(signed=signed).to(device) for signed in (True, False)]
            flat = cls(p, m, v, starts, _EightBit(m_absmax, v_absmax, *codes))
        else:
            m, v = torch.zeros(n, device=device), torch.zeros(n, device=device)
            flat = cls(p, m, v, starts)
        for param, view in zip(params, flat.views(flat.p, params), strict=True):
            view.copy_(param.detach())
            param.data = view
            flat.addresses.append(param.data_ptr())
        return flat

    def check_in_place(self, params: list[torch.Tensor]) -> None:
        """Raise RuntimeError if a parameter is no longer a slice of the buffer.

        The first step checks all parameters; each later step checks one, in turn. One is enough,
        because moving a model moves all parameters. Checking the 448 tensors of an 8B model's
        adapters in each step would take 70 us.
        """
        every = range(len(params))
        for i in every if self.num_steps == 0 else [self.num_steps % len(params)]:
            if params[i].data_ptr() != self.addresses[i]:
                raise RuntimeError(
                    f"the parameter of shape {tuple(params[i].shape)} is no longer a slice of "
                    "FlatAdamW's buffer. The model was moved (model.to, model.half, a trainer's "
                    "placement) after the optimizer was created, so steps would not change it. "
                    "Create the optimizer after the last move"
                )
        self.num_steps += 1

    def collect(self, params: list[torch.Tensor]) -> torch.Tensor:
        """Return the gradients in the parameters' layout; a missing gradient becomes zeros."""
        pieces: list[torch.Tensor] = []
        for param in params:
            grad = param.grad
            pieces.append(torch.zeros_like(param) if grad is None else grad)
            if padding := -param.numel() % _QUANT_BLOCK:
                pieces.append(param.new_zeros(padding))
        return _flatten_dense_tensors(pieces)

    def views(self, buffer: torch.Tensor, params: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the slices of the buffer in the shapes of the parameters."""
        return [
            buffer[start : start + p.numel()].view(p.shape)
            for start, p in zip(self.starts, params, strict=True)
        ]

    def state(self, params: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Return the slices of the state as one dict per parameter."""
        named = {"exp_avg": self.views(self.m, params), "exp_avg_sq": self.views(self.v, params)}
        bits, absmaxes = self.eight_bit, {}
        if bits is not None:
            absmaxes = {"exp_avg_absmax": bits.m_absmax, "exp_avg_sq_absmax": bits.v_absmax}
        for name, absmax in absmaxes.items():
            named[name] = [
                absmax[start // _QUANT_BLOCK :][: -(-p.numel() // _QUANT_BLOCK)]
                for start, p in zip(self.starts, params, strict=True)
            ]
        columns = zip(*named.values(), strict=True)
        return [dict(zip(named, slices, strict=True)) for slices in columns]


def _partial_squares(grads: list[torch.Tensor]) -> torch.Tensor:
    """Return partial sums of squares, which add up to the squared norm of all gradients."""
    groups = triton.next_power_of_2(len(grads))
    partial = torch.zeros(groups * _NORM_PROGRAMS, device=grads[0].device)
    for i, grad in enumerate(grads):
        mine = partial[i * _NORM_PROGRAMS : (i + 1) * _NORM_PROGRAMS]
        if not use_kernel(grad):
            mine[0] = grad.float().square().sum()
            continue
        n = grad.numel()
        chunk = triton.cdiv(triton.cdiv(n, _NORM_PROGRAMS), _BLOCK) * _BLOCK
        _norm_kernel[(triton.cdiv(n, chunk),)](grad, mine, n, chunk, BLOCK=_BLOCK, num_warps=4)
    return partial


def clip_grad_norm_flat_(flat_grad: torch.Tensor, max_norm: float) -> torch.Tensor:
    """Scale a flat gradient [n] in place to a norm of at most `max_norm`.

    This takes two launches and does not wait for the device.

    Returns:
        The norm before the clip, a 0-dimensional float32 tensor.
    """
    if flat_grad.dim() != 1 or not flat_grad.is_contiguous():
        raise ValueError(
            f"flat_grad {tuple(flat_grad.shape)}: must be contiguous and 1-dimensional"
        )
    partial = _partial_squares([flat_grad])
    norm = partial.sum().sqrt()
    if use_kernel(flat_grad):
        n = flat_grad.numel()
        _scale_kernel[(triton.cdiv(n, _BLOCK),)](
            flat_grad, partial, n, max_norm, PARTIALS=partial.numel(), BLOCK=_BLOCK, num_warps=4
        )
    else:
        flat_grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _quantize_reference(x: torch.Tensor, code: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    scaled = x.view(-1, _QUANT_BLOCK) / torch.where(absmax > 0, absmax, 1.0)[:, None]
    index = torch.bucketize(scaled, (code[1:] + code[:-1]) / 2)
    if code[0] == 0:
        index = torch.where((index == 0) & (scaled > 0), 1, index)
    return index.to(torch.uint8).view(-1)


def _any_gradient(params: list[torch.Tensor]) -> bool:
    return any(param.grad is not None for param in params)


@dataclasses.dataclass(frozen=True)
class _Collected:
    """Each group's flat gradient, or None if it has no gradient, and partial sums of squares."""

    grads: list[torch.Tensor | None]
    partial: torch.Tensor | None
    state: tuple[tuple[int, int], ...]

    @staticmethod
    def state_of(groups: list[list[torch.Tensor]]) -> tuple[tuple[int, int], ...]:
        """Return a key of the gradients: identity and version of each group's first gradient."""
        grads = [next((p.grad for p in params if p.grad is not None), None) for params in groups]
        return tuple((0, 0) if grad is None else (id(grad), grad._version) for grad in grads)


def _step_reference(
    flat: _Flat, grad: torch.Tensor, factor: torch.Tensor | float, **h: float
) -> None:
    m, v, bits = flat.m, flat.v, flat.eight_bit
    if bits is not None:
        m = bits.m_code[m.int()] * bits.m_absmax.repeat_interleave(_QUANT_BLOCK)
        v = bits.v_code[v.int()] * bits.v_absmax.repeat_interleave(_QUANT_BLOCK)
    g = grad * factor
    m = h["beta1"] * m + h["rest1"] * g
    v = h["beta2"] * v + h["rest2"] * g * g
    denominator = v.sqrt() / h["root_correction2"] + h["eps"]
    flat.p.copy_(flat.p * h["decay"] - h["step_size"] * m / denominator)
    if bits is not None:
        bits.m_absmax.copy_(m.view(-1, _QUANT_BLOCK).abs().amax(1))
        bits.v_absmax.copy_(v.view(-1, _QUANT_BLOCK).amax(1))
        m = _quantize_reference(m, bits.m_code, bits.m_absmax)
        v = _quantize_reference(v, bits.v_code, bits.v_absmax)
    flat.m.copy_(m)
    flat.v.copy_(v)


class FlatAdamW(torch.optim.Optimizer):
    """AdamW whose parameters become slices of one flat float32 buffer per group.

    Create the optimizer after the model is on its device and before DistributedDataParallel wraps
    the model, because the optimizer moves each parameter's data into the flat buffer. As in torch's
    AdamW, a group in which no parameter has a gradient is skipped. If only some parameters of a
    group have a gradient, the others are updated with a gradient of zero.

    Args:
        params: Float32 parameters on one device, or groups of them.
        lr: Learning rate.
        betas: Decay rates of the mean and of the mean square.
        eps: Added to the root of the mean square.
        weight_decay: Decoupled weight decay, as a multiple of the learning rate.
        state_bits: 32, or 8 for blockwise 8-bit state (a quarter of the memory).
        max_grad_norm: Norm to which the step clips the gradients; None for no clipping.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        state_bits: int = 32,
        max_grad_norm: float | None = None,
    ):
        if state_bits not in (8, 32):
            raise ValueError(f"state_bits={state_bits}: must be 8 or 32")
        self.state_bits, self.max_grad_norm = state_bits, max_grad_norm
        self._flats: list[_Flat] = []
        self._collected: _Collected | None = None
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=0)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group and move its parameters into a flat buffer."""
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        kinds = {(p.dtype, p.device) for p in params}
        if len(kinds) != 1 or params[0].dtype != torch.float32:
            raise ValueError(
                "the parameters of a group must be float32 on one device, but these are "
                f"{sorted(map(str, kinds))}; PEFT keeps LoRA in float32 by default "
                "(autocast_adapter_dtype)"
            )
        flat = _Flat.of(params, self.state_bits)
        self._flats.append(flat)
        self.state.update(zip(params, flat.state(params), strict=True))

    @torch.no_grad()
    def grad_norm(self) -> torch.Tensor:
        """Return the norm of all gradients before the clip, as a tensor on the device.

        The gradients collected here are stored until the next step, which does not collect them
        again unless they have changed.
        """
        self._collected = self._collect(with_norm=True)
        partial = self._collected.partial
        if partial is None:
            return torch.zeros((), device=self._flats[0].p.device)
        return partial.sum().sqrt()

    def _collect(self, *, with_norm: bool) -> "_Collected":
        groups = [group["params"] for group in self.param_groups]
        grads = [
            flat.collect(params) if _any_gradient(params) else None
            for params, flat in zip(groups, self._flats, strict=True)
        ]
        present = [grad for grad in grads if grad is not None]
        partial = _partial_squares(present) if present and with_norm else None
        return _Collected(grads, partial, _Collected.state_of(groups))

    # torch's stub declares a float, but torch's optimizers return the closure's result, too.
    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], torch.Tensor] | None = None
    ) -> torch.Tensor | None:
        """Clip and update all parameters.

        Raises:
            RuntimeError: The model was moved after the optimizer was created.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [group["params"] for group in self.param_groups]
        collected, self._collected = self._collected, None
        if collected is None or collected.state != _Collected.state_of(groups):
            collected = self._collect(with_norm=self.max_grad_norm is not None)
        for group, flat, grad in zip(self.param_groups, self._flats, collected.grads, strict=True):
            if grad is not None:
                flat.check_in_place(group["params"])
                group["step"] += 1
                partial = None if self.max_grad_norm is None else collected.partial
                self._step_group(group, flat, grad, partial)
                torch.autograd.graph.increment_version(group["params"])
        return loss

    def _step_group(
        self,
        group: dict[str, Any],
        flat: _Flat,
        grad: torch.Tensor,
        partial: torch.Tensor | None,
    ) -> None:
        (beta1, beta2), step = group["betas"], group["step"]
        h = dict(
            decay=1.0 - group["lr"] * group["weight_decay"],
            beta1=beta1,
            beta2=beta2,
            rest1=1.0 - beta1,
            rest2=1.0 - beta2,
            step_size=group["lr"] / (1.0 - beta1**step),
            root_correction2=(1.0 - beta2**step) ** 0.5,
            eps=group["eps"],
        )
        if not use_kernel(flat.p):
            factor: torch.Tensor | float = 1.0
            if partial is not None and self.max_grad_norm is not None:
                factor = (self.max_grad_norm / (partial.sum().sqrt() + 1e-6)).clamp(max=1.0)
            return _step_reference(flat, grad, factor, **h)
        num_rows, n, unused, bits = 8, flat.p.numel(), flat.p, flat.eight_bit
        pointers = [unused] * 6
        if bits is not None:
            middles = [(code[1:] + code[:-1]) / 2 for code in (bits.m_code, bits.v_code)]
            pointers = [bits.m_absmax, bits.v_absmax, bits.m_code, bits.v_code, *middles]
        _step_kernel[(triton.cdiv(n, num_rows * _QUANT_BLOCK),)](
            flat.p, grad, flat.m, flat.v, *pointers,
            unused if partial is None else partial, n, self.max_grad_norm or 0.0, **h,
            CLIP=partial is not None, PARTIALS=1 if partial is None else partial.numel(),
            EIGHT_BIT=bits is not None, ROWS=num_rows, COLS=_QUANT_BLOCK, num_warps=8,
        )  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that was saved with the same `state_bits` into the flat buffers.

        Raises:
            ValueError: The state was saved with different `state_bits`.
        """
        super().load_state_dict(state_dict)
        for group, flat in zip(self.param_groups, self._flats, strict=True):
            for p, views in zip(group["params"], flat.state(group["params"]), strict=True):
                loaded = self.state[p]
                if set(loaded) != set(views):
                    raise ValueError(
                        f"the state holds {sorted(loaded)}, but state_bits={self.state_bits} "
                        f"needs {sorted(views)}: create the optimizer with the state_bits that "
                        "the state was saved with"
                    )
                for name, view in views.items():
                    view.copy_(loaded[name])
                self.state[p] = views
