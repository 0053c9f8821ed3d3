"""Our kernels inside a trainer: fused layers, the model's own fused loss, a flat optimizer."""

import logging
from typing import Any

import torch

from tuneline.errors import RecipeError
from tuneline.kernels import FlatAdamW, patch
from tuneline.kernels.decoder.budget import Budget
from tuneline.kernels.limits import FP8_CAPABILITY, MIN_CAPABILITY

logger = logging.getLogger(__name__)

STATE_BITS = {"adamw_8bit": 8, "adamw_bnb_8bit": 8, "adamw_torch": 32, "adamw_torch_fused": 32}
"""Optimizers, as transformers names them, that `FlatAdamW` computes too."""


def can_fuse(mode: str, device: str) -> bool:
    """Tell whether kernels are wanted and can run; a reason against it is logged.

    Raises:
        RecipeError: 8-bit products are asked for where there are none.
    """
    if mode == "off":
        return False
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    if mode == "fp8" and (capability is None or capability < FP8_CAPABILITY):
        found = device if capability is None else torch.cuda.get_device_name()
        raise RecipeError(
            f"train.kernels: fp8 needs a GPU of compute capability {FP8_CAPABILITY} (Hopper) or "
            f"higher, and this is {found}: take auto"
        )
    if capability is None:
        return False
    if capability < MIN_CAPABILITY:
        logger.info(
            "kernels are off: %s has compute capability %d.%d, and they need %d.%d",
            torch.cuda.get_device_name(),
            *capability,
            *MIN_CAPABILITY,
        )
        return False
    return True


def fuse_model(model: torch.nn.Module) -> None:
    """Put fused layers and loss into a base model, which is frozen; before the trainer is made.

    TRL lays a function of its own over the model's forward, and calls the one that it found
    wherever its own has nothing to do: it has to find the fused one.
    """
    model.requires_grad_(False)
    patch(model)


def fuse_trainer(trainer: Any, *, mode: str = "auto", kept_gib: float | None = None) -> str:
    """Let a trainer of a fused model take the model's loss and a flat optimizer.

    Args:
        trainer: Its model has its adapters by now.
        mode: The recipe's `train.kernels`.
        kept_gib: What layers may keep; None is what is free.

    Returns:
        What was fused, in a sentence.
    """
    # Once more: the adapters came with the trainer, and decide which layers can be fused.
    budget: Budget = "auto" if kept_gib is None else kept_gib
    report = patch(trainer.model, budget=budget, fp8=mode == "fp8")
    trainer.takes_model_loss = report.loss == "fused"
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
            # Its norm is two launches; accelerate's clip looks at every parameter of the model,
            # 25 ms of an 8B model's step. In float16 it also undoes the loss scaling.
            trainer.own_grad_norm = trainer.optimizer.grad_norm
    return str(report)
