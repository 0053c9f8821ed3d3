"""Compute the loss of a stock causal LM without its logits, whatever its family.

The stock forward runs with two parts exchanged: `lm_head` passes the hidden states through, and
`loss_function` computes `linear_cross_entropy` of them and the head's weight. So whatever the stock
forward adds to the loss stays (the auxiliary loss of a router), and a linear scale of the logits
(Granite's `logits_scaling`, Cohere's `logit_scale`) scales the hidden states, which is the same.

A forward that does anything else to its logits, such as to cap them, gives another loss then.
`probe` finds that out: it computes both losses of the stock forward around a decoder that returns
given hidden states, whose logits are large enough for a cap to show. The cap of
`config.final_logit_softcapping` (Gemma) is computed by `linear_cross_entropy`, and is off in the
stock forward meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tuneline.kernels.ops.cross_entropy import linear_cross_entropy
from tuneline.kernels.ops.host_tables import head_weight

_PROBE_TOKENS = 16
_PROBE_LOGIT = 12.0
"""Standard deviation of the logits of a probe."""

_TOLERANCE = 0.01


class _Replaced(nn.Module):
    """A decoder that returns given hidden states."""

    def __init__(self, hidden_states: Tensor) -> None:
        super().__init__()
        self.hidden_states = hidden_states

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=self.hidden_states)


@contextmanager
def _exchanged(owner: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    """Exchange an entry of a dictionary of attributes, or add it, until the block ends."""
    was_there, stock = name in owner, owner.get(name)
    owner[name] = value
    try:
        yield
    finally:
        if was_there:
            owner[name] = stock
        else:
            del owner[name]


def run_with_fused_loss(
    causal: Any,
    forward: Callable[..., Any],
    labels: Tensor,
    num_labels: int | None = None,
    **kwargs: Any,
) -> Any:
    """Return the output of a stock forward whose loss was computed without logits.

    Args:
        causal: The causal LM; its `lm_head` is a linear layer without bias.
        forward: Its stock forward.
        labels: Labels [B, L].
        num_labels: Number of labels that count, if the caller knows it.
        **kwargs: The other arguments of the forward.
    """
    head, config = causal.lm_head, causal.config.__dict__
    softcap = config.get("final_logit_softcapping")

    def loss_function(
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(logits.device)
        weight = head_weight(head)
        return linear_cross_entropy(
            logits.to(weight.dtype),
            weight,
            shift_labels.to(logits.device),
            ignore_index=ignore_index,
            softcap=softcap,
            num_items=num_items_in_batch,
            num_labels=num_labels,
        )

    with ExitStack() as exchanges:
        # transformers' property `loss_function` returns `_loss_function` if it is set.
        exchanges.enter_context(_exchanged(causal.__dict__, "_loss_function", loss_function))
        exchanges.enter_context(_exchanged(causal._modules, "lm_head", nn.Identity()))
        if softcap is not None:
            exchanges.enter_context(_exchanged(config, "final_logit_softcapping", None))
        outputs = forward(labels=labels, **kwargs)
    # They are hidden states.
    outputs.logits = None
    return outputs


def probe(causal: Any) -> str | None:
    """Return the reason why the loss of a causal LM cannot be fused, or None if it can."""
    weight = causal.lm_head.weight
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, _PROBE_TOKENS, weight.shape[1], generator=generator)
    size = weight[:1024].float().norm(dim=1).mean().item() or 1.0
    scaled = (hidden * (_PROBE_LOGIT / size)).to(weight.device, weight.dtype)
    labels = torch.randint(0, weight.shape[0], (1, _PROBE_TOKENS), generator=generator)
    labels = labels.to(weight.device)
    options: dict[str, Any] = {"input_ids": labels}
    if hasattr(causal.config, "output_router_logits"):
        options["output_router_logits"] = False
    try:
        decoder = _exchanged(causal._modules, causal.base_model_prefix, _Replaced(scaled))
        with torch.no_grad(), decoder:
            stock = causal.forward(labels=labels, **options).loss.item()
            fused = run_with_fused_loss(causal, causal.forward, labels, **options).loss.item()
    except Exception as error:  # The stock forward may ask for anything.
        return f"its forward cannot be checked ({type(error).__name__}: {error})"
    if not abs(fused - stock) <= _TOLERANCE * abs(stock):
        return (
            f"{type(causal).__name__} changes its logits before the loss (a probe gave {fused:.4g} "
            f"without logits and {stock:.4g} with them)"
        )
    return None
