"""The adapter of routed experts: which parameters it is attached to, and whether it is there."""

from typing import Any

import peft
from peft.tuners.lora.layer import ParamWrapper

from tuneline.errors import ModelError, TrainingError
from tuneline.models.experts import quantized_experts
from tuneline.models.experts.adapter import adapt_experts_in_nf4
from tuneline.train.config import LoraConfig


def check_experts(lora: LoraConfig, model: Any) -> None:
    """Check that a model has experts if the recipe asks for an adapter on them.

    Args:
        lora: the recipe's LoRA settings.
        model: the base model, with or without weights.

    Raises:
        ModelError: it has none, or none that can have an adapter.
    """
    if lora.experts and not quantized_experts(model):
        raise ModelError(
            f"lora.experts is true, but {type(model).__name__} has no routed experts that "
            "transformers stores as one parameter per projection: set lora.experts to false"
        )


def target_experts(config: peft.LoraConfig, lora: LoraConfig, model: Any) -> None:
    """Add the experts to peft's settings of an adapter, if the recipe asks for them.

    Args:
        config: peft's settings, which are changed in place.
        lora: the recipe's LoRA settings.
        model: the base model, before it has an adapter.
    """
    if lora.experts:
        names = {_within_layer(name) for name in quantized_experts(model)}
        config.target_parameters = sorted(names)
        adapt_experts_in_nf4(config, model)


def check_adapter_of_experts(lora: LoraConfig, model: peft.PeftModel) -> None:
    """Check that the experts have an adapter if, and only if, the recipe asks for it.

    peft turns names of linear layers into those of experts in some families.

    Raises:
        TrainingError: peft has attached the adapter to other parameters.
    """
    base: Any = model.get_base_model()
    asked = set(quantized_experts(base)) if lora.experts else set()
    found = {
        f"{name.removesuffix('.base_layer')}.{module.parameter_name}"
        for name, module in base.named_modules()
        if isinstance(module, ParamWrapper) and module.num_experts > 1
    }
    if found != asked:
        odd = sorted(found ^ asked)
        raise TrainingError(
            f"peft has attached the adapter to other experts than asked for: {len(odd)} parameters "
            f"differ, first {odd[0]}. Set lora.target_modules to full names of linear layers"
        )


def _within_layer(name: str) -> str:
    """Return the part of a parameter's name that follows the number of its layer."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :] if numbers else parts)
