"""Our kernels inside a trainer: fused layers, the model's own fused loss, a flat optimizer."""

import logging
from typing import Any

import torch

from tuneline.kernels import FlatAdamW, patch

logger = logging.getLogger(__name__)

MIN_CAPABILITY = (8, 0)
"""Ampere: older cards have neither bfloat16 nor the attention that the layers call."""

STATE_BITS = {"adamw_8bit": 8, "adamw_bnb_8bit": 8, "adamw_torch": 32, "adamw_torch_fused": 32}
"""Optimizers, as transformers names them, that `FlatAdamW` computes too."""


def can_fuse(mode: str, device: str) -> bool:
    """Tell whether kernels are wanted and can run; a reason against it is logged."""
    if mode == "off" or device != "cuda":
        return False
    capability = torch.cuda.get_device_capability()
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
    """Put fused layers and loss into a base model; before the trainer is made.

    TRL lays a function of its own over the model's forward, and calls the one that it found
    wherever its own has nothing to do: it has to find the fused one.
    """
    patch(model)


def fuse_trainer(trainer: Any) -> str:
    """Let a trainer of a fused model take the model's loss and a flat optimizer.

    Returns:
        What was fused, in a sentence.
    """
    # Once more: the adapters came with the trainer, and decide which layers can be fused.
    report = patch(trainer.model)
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
