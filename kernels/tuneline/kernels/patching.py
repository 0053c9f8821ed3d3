"""Put the fused layers, final norm and loss into a live model, and remove them again.

    report = patch(model, budget="auto")
    ...train...
    unpatch(model)

The class of each patched module is replaced by a subclass of the same name, so state_dict,
isinstance and PEFT's save, load and merge work as before. Other models are not affected, because no
module, class or function of transformers is changed. A subclass runs fused code in training mode
and without a KV cache; every other call runs the *stock* forward, which is that of transformers.
Without gradients, e.g. for the reference of a preference, fused layers store nothing. With
`inference=True` they run in eval mode instead of training mode (see inference.py). A layer that
cannot be fused (see `binding`) also runs its stock forward, even if other layers of the model are
fused.

    causal LM   with labels: computes the loss without logits (loss.py), for every family
    decoder     decides in each forward: the sequences, which layers are fused, what they store
    layer       runs `fused_layer` with the decoder's decisions, which are passed as a keyword
    final norm  runs `rms_norm`
"""

from __future__ import annotations

import functools
import logging
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tuneline.kernels.binding import bind_layer, check_parts
from tuneline.kernels.binding_adapter import Unfusable
from tuneline.kernels.decisions import Engine, ModelCall, decide
from tuneline.kernels.decoder.budget import Budget, check_budget
from tuneline.kernels.decoder.layer import fused_layer
from tuneline.kernels.limits import FP8_CAPABILITY
from tuneline.kernels.loss import probe, run_with_fused_loss
from tuneline.kernels.ops.attention import AttentionPlan
from tuneline.kernels.ops.host_tables import HostEmbedding, HostHead, move_back, move_to_host
from tuneline.kernels.ops.rms_norm import rms_norm
from tuneline.kernels.spec import family_spec

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PatchReport:
    """What `patch` did; `unfused` has the reason for each layer that runs its stock forward."""

    family: str | None
    fused: tuple[int, ...]
    unfused: dict[int, str]
    loss: str
    """"fused", or the reason why the stock loss is computed."""
    num_fp8_groups: int = 0
    """Number of groups of linears that are computed in fp8, at most four per layer."""

    def __str__(self) -> str:
        """Return a summary in one line."""
        text = f"{self.family or 'unknown family'}: {len(self.fused)} layers fused"
        for reason in sorted(set(self.unfused.values())):
            layers = [i for i, r in self.unfused.items() if r == reason]
            text += f"; {len(layers)} not ({reason})"
        if self.num_fp8_groups:
            text += f"; {self.num_fp8_groups} groups of linears in fp8"
        return f"{text}; loss: {self.loss}"


def patch(
    model: nn.Module,
    budget: Budget = "auto",
    *,
    fp8: bool = False,
    inference: bool = False,
    tables_on_host: bool = False,
    host_bytes: int | None = None,
) -> PatchReport:
    """Fuse a model's layers, final norm and loss in place, as far as they can be fused.

    Args:
        model: A transformers causal LM, bare or inside PEFT.
        budget: Memory for stored activations; see `budget.Budget`. To change it, patch again.
        fp8: Use fp8 GEMMs for NF4 weights that have adapters (see operands.py). They are faster
            than bf16 GEMMs, but their results have an error of about 4 %, in addition to the 9 % of
            NF4. Do not use fp8 to compare losses.
        inference: Run the layers fused in eval mode, and not in training mode: in forwards without
            gradients and with use_cache=False. The final norm and the loss then stay stock.
        tables_on_host: Keep the input embedding and the head in pinned host memory (see
            host_tables.py). A table that is trained or not on a GPU is not moved, nor is any table
            of a model without fused layers, and a warning gives the reason.
        host_bytes: Host memory for activations that lean layers offload. What does not fit stays on
            the GPU or is recomputed. None: half of the memory that the machine has free.

    Raises:
        ValueError: The budget is invalid, or the GPU has no fp8 GEMM.
    """
    check_budget(budget)
    if fp8 and torch.cuda.is_available() and torch.cuda.get_device_capability() < FP8_CAPABILITY:
        raise ValueError(
            f"fp8=True needs compute capability {FP8_CAPABILITY} (Hopper), but "
            f"{torch.cuda.get_device_name()} has {torch.cuda.get_device_capability()}: "
            "remove fp8=True"
        )
    unpatch(model)
    causal, decoder = _find_decoder(model)
    specs, unfused, num_fp8_groups = {}, {}, 0
    for index, layer in enumerate(() if decoder is None else decoder.layers):
        spec = family_spec(layer)
        if spec is None:
            unfused[index] = f"{type(layer).__name__} is not in the table of families (spec.py)"
            continue
        try:
            check_parts(layer, spec)
        except Unfusable as reason:
            unfused[index] = str(reason)
            continue
        specs[index] = spec
        try:
            weights = bind_layer(layer, spec, decoder.config, fp8=fp8, inference=inference)
            num_fp8_groups += sum(group.largest is not None for group in weights.groups())
        except Unfusable as reason:
            # The layer's class is replaced anyway: the layer may be fusable in a later forward.
            unfused[index] = str(reason)
    loss_reason = "stock for inference" if inference else _stock_loss_reason(causal)
    loss_reason = loss_reason or probe(causal)
    if specs or loss_reason is None:
        _swap(causal, _CausalMixin)
    if specs:
        decoder._tuneline_engine = Engine(budget, specs, fp8, inference, host_bytes)
        _swap(decoder, _DecoderMixin)
        for index in specs:
            decoder.layers[index]._tuneline_index = index
            _swap(decoder.layers[index], _LayerMixin)
        for why_not in move_to_host(causal) if tables_on_host else ():
            logger.warning("tables_on_host=True: %s", why_not)
        head = causal.get_output_embeddings()
        if isinstance(head, HostHead):
            decoder._tuneline_engine.head = head
        decoder.norm._tuneline_gemma = next(iter(specs.values())).gemma_norm
        _swap(decoder.norm, _NormMixin)
    elif tables_on_host:
        logger.warning("tables_on_host=True: no table moves, because no layer can be fused")
    fused = tuple(index for index in specs if index not in unfused)
    family = next(iter(specs.values())).name if specs else None
    return _logged(PatchReport(family, fused, unfused, loss_reason or "fused", num_fp8_groups))


def unpatch(model: nn.Module) -> None:
    """Restore the class of every patched module; without effect on a model that is not patched."""
    move_back(model)
    for module in model.modules():
        stock = getattr(type(module), "_tuneline_stock_class", None)
        if stock is not None:
            module.__class__ = stock
            for name in ("_tuneline_engine", "_tuneline_index", "_tuneline_gemma"):
                module.__dict__.pop(name, None)


def check_layers_once(model: nn.Module) -> None:
    """Check the layers of a patched model in the next forward, and then not before the next call.

    By default every forward checks whether adapters, dropout or weights have changed, which takes
    1 to 5 ms of the host's time for 32 layers. A caller that knows when they change can call this
    function then. Without effect on a model whose layers are not patched.
    """
    _, decoder = _find_decoder(model)
    engine = getattr(decoder, "_tuneline_engine", None)
    if engine is not None:
        engine.checks_always = engine.is_checked = False


def fuses_every_layer(model: nn.Module, length: int) -> bool:
    """Return whether a forward of sequences of up to `length` tokens runs no stock layer.

    The forward is one for which the model was patched, in the present grad mode.
    """
    _, decoder = _find_decoder(model)
    if getattr(decoder, "_tuneline_engine", None) is None:
        return False
    call = decide(decoder, AttentionPlan(), torch.empty(1, length, device=decoder.device))
    return call is not None and len(call.layers) == len(decoder.layers)


if TYPE_CHECKING:

    class _Stock(nn.Module):
        """The stock class of a mixin, for type checkers; it may have any attribute."""

        def __getattr__(self, name: str) -> Any: ...

else:
    _Stock = object


class _LayerMixin(_Stock):
    """A decoder layer that runs fused if it is in the decoder's `ModelCall`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # This skips the gradient checkpointing that some versions of transformers do in __call__.
        return nn.Module.__call__(self, *args, **kwargs)

    def forward(
        self, hidden_states: Tensor, *args: Any, tuneline: ModelCall | None = None, **kwargs: Any
    ) -> Tensor:
        if tuneline is not None and self._tuneline_index in tuneline.layers:
            weights, call = tuneline.layers[self._tuneline_index]
            if tuneline.head is not None and self._tuneline_index == tuneline.head_at:
                tuneline.head.begin()
            cos, sin = kwargs["position_embeddings"]
            if tuneline.done:
                return hidden_states
            with torch.autocast(hidden_states.device.type, enabled=False):
                if self._tuneline_index == 0:
                    stack = tuneline.graphed_stack(hidden_states, cos, sin)
                    if stack is not None:
                        tuneline.done.append(True)
                        return stack(hidden_states, cos, sin, call.plan)
                output, routing = fused_layer(hidden_states, cos, sin, weights, call)
                if weights.routed is not None:
                    # The hooks of a router record its logits for the auxiliary loss.
                    router = weights.routed.module
                    for hook in router._forward_hooks.values():
                        hook(router, (hidden_states,), routing)
                return output
        stock = partial(super().forward, **kwargs)
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(stock, hidden_states, *args)
        return stock(hidden_states, *args)


class _NormMixin(_Stock):
    """The final norm, whose weight may be trained."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not self.training:
            return super().forward(hidden_states)
        eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
        return rms_norm(hidden_states, self.weight, eps, gemma=self._tuneline_gemma)


class _DecoderMixin(_Stock):
    """The stack of layers: decides how they run, and passes the decisions to the stock forward.

    A caller that wants the hidden states of some tokens of one row only can pass their indices as
    `selected`.
    """

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        sequence_starts: list[int] | None = None,
        selected: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        arguments = {"input_ids": input_ids, "position_ids": position_ids, **kwargs}
        call = None
        if _is_plain(self, kwargs):
            tokens = input_ids if input_ids is not None else kwargs["inputs_embeds"]
            if sequence_starts is None:
                sequence_starts = find_sequences(tokens, attention_mask, position_ids)
            plan = _attention_plan(sequence_starts, tokens)
            call = None if plan is None else decide(self, plan, tokens, selected)
        if call is not None and call.layers:
            if len(call.layers) == len(self.layers):
                # No fused layer reads a mask. transformers would build a full one, but passes on a
                # 4-D mask unchanged.
                attention_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device)
            arguments |= {"use_cache": False, "tuneline": call}
        output = super().forward(attention_mask=attention_mask, **arguments)
        if selected is not None and not (call is not None and call.selects):
            output.last_hidden_state = output.last_hidden_state[:, selected]
        return output


class _CausalMixin(_Stock):
    """The model with its head, which computes the loss without the logits.

    A caller that knows how many labels count can pass `num_labels` (see `linear_cross_entropy`),
    and one that has called `find_sequences` while the batch was on the host `sequence_starts`.
    """

    @property
    def device(self) -> torch.device:
        """The device that computes, even if the first parameter is a table in host memory."""
        for module in (self.get_input_embeddings(), self.get_output_embeddings()):
            if isinstance(module, HostEmbedding | HostHead):
                return module._tuneline_device
        stock: Any = super()
        device: torch.device = stock.device
        return device

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        fuse = (
            not args
            and self.training
            and torch.is_grad_enabled()
            and kwargs.get("logits_to_keep", 0) == 0
            and kwargs.get("return_dict") is not False
            and not kwargs.get("fused_lm_head")
            and _stock_loss_reason(self) is None
        )
        head = getattr(self, "lm_head", None)
        with head.expected() if isinstance(head, HostHead) else nullcontext():
            if labels is None or not fuse:
                kwargs.pop("num_labels", None)
                return super().forward(*args, labels=labels, **kwargs)
            return run_with_fused_loss(self, super().forward, labels, **kwargs)


def _is_plain(decoder: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether a forward needs nothing that only the stock forward provides.

    With gradients, `use_cache` is ignored: it is true by default in configs, but no training step
    reads the cache. Without gradients, the caller has to turn it off.
    """
    config = decoder.config
    recorded = any(
        kwargs.get(name, getattr(config, name, False))
        for name in ("output_attentions", "output_hidden_states")
    )
    mode = decoder.training
    if decoder._tuneline_engine.inference:
        mode = not (decoder.training or torch.is_grad_enabled())
    return (
        mode
        and (torch.is_grad_enabled() or kwargs.get("use_cache") is False)
        and not recorded
        and kwargs.get("past_key_values") is None
        and not torch.compiler.is_compiling()
    )


def find_sequences(
    tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> list[int] | None:
    """Return the first token of each sequence in a packed row; [0] if each row is a sequence.

    Padding on the right needs no mask: in causal attention, the tokens before the padding never
    read it, and the outputs of the padding have no label. If a mask or position IDs are on a GPU,
    the host waits once for it.

    Args:
        tokens: Token IDs [B, L] or embeddings [B, L, H].
        attention_mask: The mask of the forward.
        position_ids: The positions of the forward.

    Returns:
        The indices, or None if the attention needs a mask (left padding, 4-D masks).
    """
    batch, length = tokens.shape[:2]
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor) or attention_mask.shape != (batch, length):
            return None
        mask = attention_mask.bool()
        return [0] if bool((mask[:, 1:] <= mask[:, :-1]).all()) else None
    if position_ids is None:
        return [0]
    if position_ids.dim() != 2 or position_ids.shape[1] != length:
        return None
    breaks = (position_ids[:, 1:] - position_ids[:, :-1]) != 1
    if position_ids.shape[0] == 1 and batch == 1:
        return [0, *(breaks[0].nonzero()[:, 0] + 1).tolist()]
    return None if bool(breaks.any()) else [0]


def _attention_plan(starts: list[int] | None, tokens: Tensor) -> AttentionPlan | None:
    if starts is None:
        return None
    if len(starts) == 1:
        return AttentionPlan()
    return AttentionPlan.packed(starts, tokens.shape[1], tokens.device)


def _stock_loss_reason(causal: Any) -> str | None:
    """Return the reason why the loss cannot be fused, or None."""
    head = getattr(causal, "lm_head", None)
    if not (type(head) is nn.Linear or isinstance(head, HostHead)) or head.bias is not None:
        return f"lm_head is a {type(head).__name__}, not an nn.Linear without bias"
    if head.weight.requires_grad:
        return "lm_head is trained"
    if getattr(causal, "loss_type", "ForCausalLM") not in (None, "ForCausalLM"):
        return f"loss_type {causal.loss_type!r}"
    return None


def _find_decoder(model: Any) -> tuple[Any, Any]:
    """Return the causal LM inside any wrapper, and its stack of decoder layers or None."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = getattr(causal, "model", causal)
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not hasattr(decoder, "norm"):
        return causal, None
    return causal, decoder


def _swap(module: Any, mixin: type) -> None:
    module.__class__ = _subclass(module.__class__, mixin)


@functools.cache
def _subclass(stock: Any, mixin: Any) -> type:
    """Return the fused subclass; its name stays, as transformers looks classes up by name."""
    names = {
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "_tuneline_stock_class": stock,
    }
    cls: Any = type(stock.__name__, (mixin, stock), names)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Code that stored this function may call it after `unpatch`, when `self` is stock again.
        chosen = mixin if isinstance(self, cls) else stock
        return chosen.forward(self, *args, **kwargs)

    # Set after the class is created, because transformers wraps the forward of a new layer class in
    # gradient checkpointing. `_LayerMixin` itself does the checkpointing, only for stock forwards.
    # The signature is that of the stock forward, because the Trainer reads column names from it.
    cls.forward = functools.wraps(stock.forward)(forward)
    return cls


def _logged(report: PatchReport) -> PatchReport:
    logger.info("patch: %s", report)
    return report
