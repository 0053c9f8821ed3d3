"""Keep a model's two tables, the input embedding and the head, in pinned host memory.

    y_t = embedding[id_t]        the GPU reads the rows over PCIe
    z = h head^T                 the head is copied to the GPU for each forward, and freed after it
                                 (after its backward, if autograd needs it for dh)

Each table of 128256 x 4096 takes 1.05 GB of GPU memory, but a step of 8192 tokens reads only 67 MB
of the embedding. One kernel reads those rows directly from host memory (1.2 ms at 55 GB/s). The IDs
are not copied to the host, because the host would have to wait for that copy.

The head is read between the forward and the backward of the last layer, when the temporaries of a
layer's backward, the memory peak of a step, do not exist. Its copy takes 19 ms, and runs beside the
forward of the last layers if `HostHead.begin` is called there.

Shapes: ids [...]; table [V, C]; y [..., C]; h [..., C]; z [..., V].
"""

# Triton's types declare neither a launch's options nor plain values for constexpr parameters.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor, nn


@triton.jit
def _gather_kernel(ids_ptr, table_ptr, out_ptr, C: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    row = tl.load(ids_ptr + token).to(tl.int64)
    y = tl.load(table_ptr + row * C + col, col < C)
    tl.store(out_ptr + token * C + col, y, col < C)


def gather_rows(ids: Tensor, table_VC: Tensor) -> Tensor:
    """Return table[ids] on the device of `ids`; the table is on that device or in pinned memory."""
    C = table_VC.shape[1]
    out = torch.empty(*ids.shape, C, dtype=table_VC.dtype, device=ids.device)
    block = triton.next_power_of_2(C)
    _gather_kernel[(ids.numel(),)](
        ids.contiguous(), table_VC, out, C=C, BLOCK=block, num_warps=max(1, min(8, block // 512))
    )
    return out


class _HostTable(nn.Module):
    """A module whose weight stays on the host when the model is moved, e.g. by a trainer."""

    _tuneline_device: torch.device
    """Device of the model, where the table's rows or its copy are read."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        dtype = cast(Any, self).weight.dtype
        moved = fn(torch.empty(0, dtype=dtype, device=self._tuneline_device))
        if moved.dtype != dtype:
            raise ValueError(
                f"a table in host memory stays in {dtype}: to convert the model to {moved.dtype}, "
                "first unpatch it, or patch it without tables_on_host"
            )
        self._tuneline_device = moved.device
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        table = cast(Any, self).weight
        # torch copies a pinned tensor to memory that is not pinned, which no kernel can read.
        if self._tuneline_device.type == "cuda" and not table.is_pinned():
            table.data = table.data.pin_memory()


class HostEmbedding(_HostTable, nn.Embedding):
    """A frozen embedding whose table is on the host; the result is on the device of the IDs."""

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of the IDs."""
        if ids.device == self.weight.device:
            return super().forward(ids)
        return gather_rows(ids, self.weight)


class HostHead(_HostTable, nn.Linear):
    """A frozen linear layer whose weight is on the host, and on the GPU only while it is read."""

    _tuneline_copy: tuple[Tensor, torch.cuda.Event | None] | None = None
    """The weight on the GPU, and the event of its arrival, from `begin` to the end of `expected`.
    """
    _tuneline_stream: torch.cuda.Stream | None = None
    _tuneline_is_expected = False

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a copy of this module: without what belongs to a forward."""
        own = ("_tuneline_copy", "_tuneline_stream", "_tuneline_is_expected")
        return {name: value for name, value in vars(self).items() if name not in own}

    @contextmanager
    def expected(self, copy: Tensor | None = None) -> Iterator[None]:
        """Let `begin` start a copy in this block; the end of the outermost block forgets the copy.

        Args:
            copy: A copy that an earlier block has made, to be read again instead of a new one.
        """
        if self._tuneline_is_expected:
            yield
            return
        self._tuneline_is_expected = True
        if copy is not None:
            self._tuneline_copy = copy, None
        try:
            yield
        finally:
            if self._tuneline_copy is not None:
                # Even if nothing has read the copy: its memory may be used again only then.
                _wait(*self._tuneline_copy)
            self._tuneline_is_expected, self._tuneline_copy = False, None

    def begin(self) -> None:
        """Queue the copy of the weight to the GPU, which runs beside the work queued next.

        Without effect outside of `expected` and if the copy is queued already.
        """
        if not self._tuneline_is_expected or self._tuneline_copy is not None:
            return
        device = self._tuneline_device
        if device.type != "cuda":
            self._tuneline_copy = self.weight.to(device), None
            return
        if self._tuneline_stream is None:
            self._tuneline_stream = torch.cuda.Stream(device)
        # Allocated for the main stream, which also frees it: the copy waits until the work that is
        # queued now no longer uses the memory.
        copy = torch.empty(self.weight.shape, dtype=self.weight.dtype, device=device)
        self._tuneline_stream.wait_stream(torch.cuda.current_stream(device))
        arrived = torch.cuda.Event()
        with torch.cuda.stream(self._tuneline_stream):
            copy.copy_(self.weight, non_blocking=True)
            arrived.record(self._tuneline_stream)
        self._tuneline_copy = copy, arrived

    def on_device(self) -> Tensor:
        """Return the weight on the GPU; the work that is queued next waits for its copy."""
        with self.expected():
            self.begin()
            assert self._tuneline_copy is not None
            copy, arrived = self._tuneline_copy
            _wait(copy, arrived)
        return copy

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the logits."""
        if hidden.device == self.weight.device:
            return super().forward(hidden)
        return nn.functional.linear(hidden, self.on_device(), self.bias)


def _wait(copy: Tensor, arrived: torch.cuda.Event | None) -> None:
    """Make the work that is queued next wait for a copy."""
    if arrived is not None:
        torch.cuda.current_stream(copy.device).wait_event(arrived)


def head_weight(head: Any) -> Tensor:
    """Return the weight of a head on the device where it computes."""
    weight: Tensor = head.on_device() if isinstance(head, HostHead) else head.weight
    return weight


def move_to_host(causal: Any) -> list[str]:
    """Move a causal LM's input embedding and head to the host.

    Returns:
        The reason of each table that was not moved.
    """
    embedding, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    others = {
        weight: name
        for name, module in causal.named_modules()
        if module not in (embedding, head)
        for weight in module.parameters(recurse=False)
    }
    reasons = {
        "input embedding": _reason(embedding, nn.Embedding, others),
        "head": _reason(head, nn.Linear, others),
    }
    if head is not None and head.weight is embedding.weight:
        # One table cannot be in two places.
        reasons = dict.fromkeys(reasons, next(filter(None, reasons.values()), None))
    moved: dict[int, torch.device] = {}
    for module, kind, reason in zip(
        (embedding, head), (HostEmbedding, HostHead), reasons.values(), strict=True
    ):
        if reason is not None:
            continue
        table = module.weight
        if id(table) not in moved:
            moved[id(table)] = table.device
            pinned = torch.empty_like(table.data, device="cpu", pin_memory=True)
            table.data = pinned.copy_(table.data)
        module.__class__ = kind
        cast(_HostTable, module)._tuneline_device = moved[id(table)]
    return [f"the {name} {reason}" for name, reason in reasons.items() if reason is not None]


def _reason(module: Any, kind: type[nn.Module], others: dict[Tensor, str]) -> str | None:
    """Return why a table cannot move to the host, or None if it can.

    Args:
        module: The module that holds the table, if there is one.
        kind: The class that the module has to have.
        others: The weights of all other modules, with the name of their module.
    """
    if module is None:
        return "does not exist"
    if type(module) is not kind:
        return f"is a {type(module).__name__}, not an nn.{kind.__name__}"
    if module.weight.requires_grad:
        return "is trained"
    if getattr(module, "bias", None) is not None:
        return "has a bias"
    other = others.get(cast(Tensor, module.weight))
    if other is not None:
        return f"is also the weight of {other}"
    if not module.weight.is_cuda:
        return f"is on {module.weight.device}, not on a GPU"
    return None


def move_back(model: nn.Module) -> None:
    """Undo `move_to_host`: move the tables back to their device."""
    for module in model.modules():
        if isinstance(module, _HostTable):
            table = cast(Any, module).weight
            table.data = table.data.to(module._tuneline_device)
            stock = nn.Embedding if isinstance(module, HostEmbedding) else nn.Linear
            for name in [name for name in vars(module) if name.startswith("_tuneline_")]:
                delattr(module, name)
            cast(nn.Module, module).__class__ = stock
