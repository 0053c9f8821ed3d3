"""Cross entropy and log-probabilities of tokens, without storing the logits of all tokens at once.

    z = softcap * tanh(hidden W^T / softcap)    (z = hidden W^T without softcap)
    logp[t] = z[t, y] - logsumexp(z[t]),  y = labels[t];  0 where labels[t] is ignore_index
    d logp[t] / d hidden[t] = ((onehot(y) - softmax(z[t])) * (1 - tanh^2)) W

Row t of the gradient of hidden depends on the upstream gradient only through the factor g[t]. The
forward therefore computes d logp / d hidden while it has the logits of a chunk, and the backward
only multiplies row t by g[t]. This serves both the loss (g[t] = -1 / num_items) and DPO (any g).
Nothing here makes the host wait for the device.

`label_log_probs` takes logits that exist already, e.g. those of a model's own forward.

Shapes: hidden [..., K], weight [V, K], labels [...]; T tokens in total, C tokens per chunk.
"""

# Triton's types declare neither a launch's options nor plain values for constexpr parameters.
# pyright: reportCallIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch.utils.checkpoint import checkpoint

from tuneline.kernels.ops._dispatch import rows, use_kernel

_CHUNK_BYTES = 256 * 2**20
"""Size of the logits that exist at once: 1024 tokens of Llama 3's vocabulary in bfloat16, which is
enough for a GEMM to fill the GPU."""
_BLOCK = 8192
_NUM_WARPS = 16
_NO_LABEL = -(2**31)
"""The `ignore_index` of calls that ignore no label."""


@triton.jit
def _log_probs_kernel(
    logits_ptr, labels_ptr, logp_ptr, first_ptr, logits_stride, V, ignore_index, softcap,
    CAPPED: tl.constexpr, NEED_FIRST: tl.constexpr, NEED_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write logp of one row, and overwrite its logits with d logp / d logits.

    If NEED_FIRST, also write whether the label is the first of the largest logits.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    label = tl.load(labels_ptr + row)
    cols = tl.arange(0, BLOCK)
    if label == ignore_index:
        tl.store(logp_ptr + row, 0.0)
        if NEED_GRAD:
            zero = tl.zeros([BLOCK], dtype=logits_ptr.dtype.element_ty)
            for start in range(0, V, BLOCK):
                tl.store(logits_ptr + start + cols, zero, mask=start + cols < V)
    else:
        # A label outside the vocabulary reads no memory and gives NaN, so that users notice it.
        known = (label >= 0) & (label < V)
        target = tl.load(logits_ptr + label, mask=known, other=float("nan")).to(tl.float32)
        if CAPPED:
            target = softcap * (2.0 * tl.sigmoid(2.0 * target / softcap) - 1.0)
        top = -float("inf")
        total = tl.zeros([BLOCK], dtype=tl.float32)
        preceding = tl.zeros([BLOCK], dtype=tl.int32)
        for start in range(0, V, BLOCK):
            mask = start + cols < V
            z = tl.load(logits_ptr + start + cols, mask=mask, other=-float("inf")).to(tl.float32)
            if CAPPED:
                z = tl.where(mask, softcap * (2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0), z)
            if NEED_FIRST:
                ahead = (z > target) | ((z == target) & (start + cols < label))
                preceding = tl.where(mask & ahead, 1, preceding)
            new_top = tl.maximum(top, tl.max(z, axis=0))
            # -inf - -inf would be NaN.
            shift = tl.where(new_top == -float("inf"), 0.0, new_top)
            total = total * tl.exp(top - shift) + tl.exp(z - shift)
            top = new_top
        lse = top + tl.log(tl.sum(total, axis=0))
        logp = target - lse
        tl.store(logp_ptr + row, logp)
        if NEED_FIRST:
            tl.store(first_ptr + row, (tl.max(preceding, axis=0) == 0) & (logp == logp))
        if NEED_GRAD:
            # All threads must read the target's logit before any thread overwrites it.
            tl.debug_barrier()
            for start in range(0, V, BLOCK):
                mask = start + cols < V
                z = tl.load(logits_ptr + start + cols, mask=mask, other=0.0).to(tl.float32)
                slope = 1.0
                if CAPPED:
                    tanh = 2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0
                    z = softcap * tanh
                    slope = 1.0 - tanh * tanh
                grad = (tl.where(start + cols == label, 1.0, 0.0) - tl.exp(z - lse)) * slope
                grad = grad.to(logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + start + cols, grad, mask=mask)


def _log_probs_(
    logits_CV: torch.Tensor,
    labels_C: torch.Tensor,
    ignore_index: int,
    softcap: float | None,
    need_grad: bool,
) -> torch.Tensor:
    """Return logp [C]; if `need_grad`, also overwrite the logits with d logp / d logits."""
    if use_kernel(logits_CV):
        return _launch(logits_CV, labels_C, ignore_index, softcap, need_grad)
    logp_C, vjp = torch.func.vjp(
        lambda z: _log_probs_reference(z, labels_C, ignore_index, softcap), logits_CV
    )[:2]
    if need_grad:
        logits_CV.copy_(vjp(torch.ones_like(logp_C))[0])
    return logp_C


def _launch(
    logits_CV: torch.Tensor,
    labels_C: torch.Tensor,
    ignore_index: int,
    softcap: float | None,
    need_grad: bool,
    first_C: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run the kernel and return logp [C]; it also writes `first_C` if that is given."""
    C, V = logits_CV.shape
    logp_C = torch.empty(C, dtype=torch.float32, device=logits_CV.device)
    _log_probs_kernel[(C,)](
        logits_CV, labels_C, logp_C, logp_C if first_C is None else first_C, logits_CV.stride(0), V,
        ignore_index, softcap or 1.0, CAPPED=softcap is not None, NEED_FIRST=first_C is not None,
        NEED_GRAD=need_grad, BLOCK=min(_BLOCK, triton.next_power_of_2(V)), num_warps=_NUM_WARPS,
    )  # fmt: skip
    return logp_C


class TokenLogProbsFunction(torch.autograd.Function):
    """Autograd function of logp [T] for a frozen head; it saves d logp / d hidden [T, K]."""

    @staticmethod
    def forward(ctx, hidden_TK, weight, labels_T, ignore_index, softcap, chunk_tokens, need_grad):  # noqa: D102
        T, V = hidden_TK.shape[0], weight.shape[0]
        C = min(T, chunk_tokens)
        logits_CV = torch.empty(C, V, dtype=weight.dtype, device=weight.device)
        unit_TK = torch.empty_like(hidden_TK) if need_grad else None
        logp = []
        for start in range(0, T, max(C, 1)):
            part = slice(start, min(start + C, T))
            logits = torch.mm(hidden_TK[part], weight.T, out=logits_CV[: part.stop - start])
            logp.append(_log_probs_(logits, labels_T[part], ignore_index, softcap, need_grad))
            if unit_TK is not None:
                torch.mm(logits, weight, out=unit_TK[part])
        if unit_TK is not None:
            ctx.save_for_backward(unit_TK)
        wide = torch.promote_types(weight.dtype, torch.float32)
        return torch.cat(logp) if logp else hidden_TK.new_empty(0, dtype=wide)

    @staticmethod
    def backward(ctx, g_T):  # noqa: D102
        (unit_TK,) = ctx.saved_tensors
        grad_TK = torch.mul(unit_TK, g_T[:, None], out=torch.empty_like(unit_TK))
        return grad_TK, None, None, None, None, None, None


class _SelectFunction(torch.autograd.Function):
    """Autograd function of hidden[index]; indices are distinct, so the backward sums nothing."""

    @staticmethod
    def forward(ctx, hidden_TK, index_N):  # noqa: D102
        ctx.save_for_backward(index_N)
        ctx.num_rows = hidden_TK.shape[0]
        return hidden_TK.index_select(0, index_N)

    @staticmethod
    def backward(ctx, grad_NK):  # noqa: D102
        (index_N,) = ctx.saved_tensors
        grad_TK = grad_NK.new_zeros(ctx.num_rows, grad_NK.shape[1])
        return grad_TK.index_copy_(0, index_N, grad_NK), None


def _log_probs_reference(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, softcap: float | None
) -> torch.Tensor:
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    kept = labels != ignore_index
    logp = z.log_softmax(-1).gather(-1, labels.masked_fill(~kept, 0)[..., None])[..., 0]
    return torch.where(kept, logp, 0.0)


def label_log_probs_reference(
    logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `label_log_probs` in plain torch; same arguments."""
    known = (labels >= 0) & (labels < logits.shape[-1])
    labels = labels.masked_fill(~known, 0)
    logp = _log_probs_reference(logits, labels, -1, None).masked_fill(~known, float("nan"))
    is_top = logits == logits.amax(-1, keepdim=True)
    # On a GPU, `logits.argmax` may return any of the largest logits.
    is_first = is_top.int().argmax(-1) == labels
    return logp, is_first & ~logp.isnan()


def token_log_probs_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
) -> torch.Tensor:
    """Compute `token_log_probs` in plain torch; same arguments, but no chunks."""
    return _log_probs_reference(hidden @ weight.T, labels, ignore_index, softcap)


def linear_cross_entropy_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    num_items: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `linear_cross_entropy` in plain torch; same arguments, but no chunks."""
    logp = token_log_probs_reference(
        hidden, weight, labels, ignore_index=ignore_index, softcap=softcap
    )
    if num_items is None:
        num_items = (labels != ignore_index).sum().clamp(min=1)
    return -logp.sum() / num_items


def label_log_probs(
    logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log probability of each label, and whether greedy decoding would choose the label.

    The kernel reads the logits once. There is no gradient.

    Args:
        logits: [T, V], contiguous along V; float32, bfloat16 or float16.
        labels: int64 [T]; a label outside the vocabulary gives NaN and False.

    Returns:
        The log probabilities in float32, [T]; and a bool [T] that is true if the label's logit is
        the largest one and no smaller token ID has the same logit. Where the log probability is
        NaN, it is false.
    """
    if not use_kernel(logits):
        return label_log_probs_reference(logits, labels)
    is_first = torch.empty_like(labels, dtype=torch.bool)
    return _launch(logits, labels, _NO_LABEL, None, False, is_first), is_first


def token_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """Return log p(labels[t] | hidden[t]) in the shape of labels.

    Args:
        hidden: [..., K], differentiable. Position t predicts labels[t], so the labels must be
            shifted by the caller.
        weight: The head [V, K], differentiable. A trained head costs a second pass over the logits.
        labels: int64 [...]; a label outside the vocabulary gives NaN.
        ignore_index: Label of the positions whose result is 0 and which get no gradient.
        softcap: Cap of the logits (Gemma's final_logit_softcapping); None for no cap.
        chunk_tokens: Tokens whose logits exist at once; None takes 256 MiB of logits.
    """
    hidden_TK = rows(hidden).to(weight.dtype)
    labels_T = labels.reshape(-1).contiguous()
    if chunk_tokens is None:
        row_bytes = weight.shape[0] * weight.element_size()
        chunk_tokens = max(_CHUNK_BYTES // row_bytes // 128 * 128, 128)
    if torch.is_grad_enabled() and weight.requires_grad:
        # The head's gradient is a sum over tokens, weighted by g, which the forward does not know.
        # So torch recomputes each chunk in the backward.
        chunks = zip(hidden_TK.split(chunk_tokens), labels_T.split(chunk_tokens), strict=True)
        logp = [
            checkpoint(
                token_log_probs_reference, h, weight, y,
                ignore_index=ignore_index, softcap=softcap, use_reentrant=False,
            )
            for h, y in chunks
        ]  # fmt: skip
        return torch.cat(logp).view(labels.shape)
    need_grad = torch.is_grad_enabled() and hidden.requires_grad
    logp_T = TokenLogProbsFunction.apply(
        hidden_TK, weight, labels_T, ignore_index, softcap, chunk_tokens, need_grad
    )
    return logp_T.view(labels.shape)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    num_items: int | torch.Tensor | None = None,
    num_labels: int | None = None,
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """Return the sum of the labels' cross entropy divided by `num_items`.

    Args:
        hidden: [..., K], differentiable. Position t predicts labels[t], so the labels must be
            shifted by the caller.
        weight: The head [V, K], differentiable. A trained head costs a second pass over the logits.
        labels: int64 [...]; a label outside the vocabulary gives NaN.
        ignore_index: Label of the positions that do not count.
        softcap: Cap of the logits (Gemma's final_logit_softcapping); None for no cap.
        num_items: Divisor of the sum. None takes the number of labels that count, but at least 1,
            so the loss of a batch without labels is 0 (torch's mean would be NaN).
        num_labels: Number of labels that count, if the caller knows it. The head is then computed
            only for the tokens of these labels. This function does not count the labels itself,
            because the host would have to wait for the device.
        chunk_tokens: Tokens whose logits exist at once; None takes 256 MiB of logits.
    """
    if num_labels is not None and num_labels < labels.numel():
        labels_T = labels.reshape(-1)
        # A stable sort puts the labels that count first, in order, without waiting for the device.
        ignored = (labels_T == ignore_index).to(torch.uint8)
        index = torch.sort(ignored, stable=True).indices[:num_labels]
        hidden, labels = _SelectFunction.apply(rows(hidden), index), labels_T[index]
    logp = token_log_probs(
        hidden, weight, labels,
        ignore_index=ignore_index, softcap=softcap, chunk_tokens=chunk_tokens,
    )  # fmt: skip
    if num_items is None:
        num_items = (labels != ignore_index).sum().clamp(min=1)
    return -logp.sum() / num_items
