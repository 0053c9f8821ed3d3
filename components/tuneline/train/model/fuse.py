"""Fused kernels in a trainer: fused layers, the model's own fused loss, a flat optimizer."""

import functools
import logging
import weakref
from types import SimpleNamespace
from typing import Any

import torch

from tuneline.errors import RecipeError
from tuneline.kernels import FlatAdamW, patch
from tuneline.kernels.decoder.budget import Budget
from tuneline.kernels.limits import FP8_CAPABILITY, MIN_CAPABILITY
from tuneline.kernels.ops.host_tables import HostHead
from tuneline.kernels.patching import check_layers_once

logger = logging.getLogger(__name__)

STATE_BITS = {"adamw_8bit": 8, "adamw_bnb_8bit": 8, "adamw_torch": 32, "adamw_torch_fused": 32}
"""Bits per value of optimizer state, for each transformers optimizer that `FlatAdamW` replaces."""


def can_fuse(mode: str, device: str) -> bool:
    """Return whether fused kernels are wanted and can run; log if the GPU is too old for them.

    Raises:
        RecipeError: the mode is fp8, but the device has no 8-bit matrix products.
    """
    if mode == "off":
        return False
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    if capability is not None and torch.version.hip:
        # torch calls a GPU of AMD cuda too, and gives it a capability that means something else.
        logger.info("fused kernels are off: they were not tried on ROCm")
        capability = None
    if mode == "fp8" and (capability is None or capability < FP8_CAPABILITY):
        name = device if capability is None else torch.cuda.get_device_name()
        raise RecipeError(
            f"train.kernels: fp8 needs a GPU of compute capability {FP8_CAPABILITY} (Hopper) or "
            f"higher, but this is {name}: set it to auto"
        )
    if capability is None:
        return False
    if capability < MIN_CAPABILITY:
        logger.info(
            "fused kernels are off: %s has compute capability %d.%d but they need %d.%d",
            torch.cuda.get_device_name(),
            *capability,
            *MIN_CAPABILITY,
        )
        return False
    return True


def fuse_model(model: torch.nn.Module) -> None:
    """Freeze a base model and give it fused layers and a fused loss, before the trainer exists.

    TRL replaces the model's forward method by a function that may call the original method.
    Therefore the original method has to be the fused one.
    """
    model.requires_grad_(False)
    patch(model)


def fuse_trainer(
    trainer: Any,
    *,
    mode: str = "auto",
    kept_gib: float | None = None,
    host_bytes: int | None = None,
    tables_on_host: bool = False,
) -> str:
    """Make a trainer of a fused model use the model's loss and a flat optimizer.

    Args:
        trainer: A trainer whose model has its adapters.
        mode: The recipe's `train.kernels`.
        kept_gib: GiB in which layers may keep activations and dequantised weights. None: all memory
            that is free.
        host_bytes: Host memory for offloaded activations; see `patch`.
        tables_on_host: Whether the input embedding and the head are kept in host memory.

    Returns:
        Human-readable description of what was fused.
    """
    # Patch again: the trainer has added adapters, which decide what can be fused in a layer.
    budget: Budget = "auto" if kept_gib is None else kept_gib
    report = patch(
        trainer.model,
        budget=budget,
        fp8=mode == "fp8",
        tables_on_host=tables_on_host,
        host_bytes=host_bytes,
    )
    give_trl_the_copied_head(trainer.model.get_base_model())
    trainer.takes_model_loss = report.loss == "fused"
    trainer.knows_sequences = bool(report.fused)
    # Adapters and weights change neither within a step nor from one step to the next.
    trainer.on_mode_change = functools.partial(check_layers_once, trainer.model)
    arguments = trainer.args
    bits = STATE_BITS.get(arguments.optim)
    if bits is not None and not trainer.is_deepspeed_enabled:
        trainer.optimizer = FlatAdamW(
            [p for p in trainer.model.parameters() if p.requires_grad],
            lr=arguments.learning_rate,
            betas=(arguments.adam_beta1, arguments.adam_beta2),
            eps=arguments.adam_epsilon,
            weight_decay=arguments.weight_decay,
            state_bits=bits,
            max_grad_norm=arguments.max_grad_norm or None,
        )
        if not arguments.fp16:
            # The optimizer computes the norm in two kernel launches. accelerate's clipping visits
            # every parameter, which takes 25 ms per step of an 8B model. float16 needs accelerate's
            # clipping, because it also undoes the loss scaling.
            trainer.own_grad_norm = trainer.optimizer.grad_norm
    return str(report)


def give_trl_the_copied_head(causal: Any) -> None:
    """Make the forward with TRL's loss read the copy of a head in host memory.

    TRL replaces the forward of a causal LM by one that, called with `fused_lm_head`, reads the
    weight of `get_output_embeddings()` and computes on the device of that weight. Evaluations and
    the methods dpo and kto use it. Without effect on a model whose head is on its device.

    The policy's copy exists until its backward pass, so the reference, which runs before that pass,
    reads the same copy.
    """
    head = causal.get_output_embeddings()
    if not isinstance(head, HostHead):
        return
    trl_forward = causal.forward
    last_copy: weakref.ref[torch.Tensor] | None = None

    def copied() -> SimpleNamespace:
        nonlocal last_copy
        weight = head.on_device()
        last_copy = weakref.ref(weight)
        return SimpleNamespace(weight=weight, bias=head.bias)

    @functools.wraps(trl_forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("fused_lm_head") or not isinstance(head, HostHead):
            return trl_forward(*args, **kwargs)
        with head.expected(None if last_copy is None else last_copy()):
            # Fused layers begin the copy; TRL asks for the head after the last layer.
            causal.get_output_embeddings = copied
            try:
                return trl_forward(*args, **kwargs)
            finally:
                del causal.get_output_embeddings

    causal.forward = forward
