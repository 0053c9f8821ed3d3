"""Load a model with its linear layers and its experts in NF4.

transformers' quantizer for bitsandbytes leaves experts in 16 bits. This one, registered by
transformers' public functions, quantises a stack as soon as it has been read, on the device that it
was read to. The peak is the quantised model and one layer's experts in the compute type.
"""

from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from tuneline.models.experts.forward import IMPLEMENTATION
from tuneline.models.experts.stacks import (
    buffer_shapes,
    expert_modules,
    quantize_stack,
    quantized_experts,
)

METHOD = "tuneline_nf4"


@register_quantization_config(METHOD)
class ExpertsConfig(BitsAndBytesConfig):
    """The settings of bitsandbytes, under a name that selects the quantizer below."""

    def __init__(self, **settings: Any) -> None:
        # Any: transformers does not annotate it.
        parent: Any = super()
        parent.__init__(**settings)
        method: Any = METHOD
        self.quant_method = method


@register_quantizer(METHOD)
class ExpertsQuantizer(Bnb4BitHfQuantizer):
    """bitsandbytes' quantizer that also quantises experts."""

    def _process_model_before_weight_loading(
        self, model: Any, device_map: Any = None, **kwargs: Any
    ) -> Any:
        super()._process_model_before_weight_loading(model, device_map, **kwargs)
        # The model is bitsandbytes' for transformers, accelerate and TRL, which ask for this name.
        model.quantization_method = QuantizationMethod.BITS_AND_BYTES
        stacks = quantized_experts(model)
        for name, module in expert_modules(model).items():
            module.nf4_stacks = {
                full.rpartition(".")[2]: stack
                for full, stack in stacks.items()
                if full.rpartition(".")[0] == name
            }
            module.nf4_lora, module.nf4_kernels = {}, False
            for projection, stack in module.nf4_stacks.items():
                for what, (shape, dtype) in buffer_shapes(stack).items():
                    empty = torch.empty(shape, dtype=dtype, device="meta")
                    module.register_buffer(f"{projection}_{what}", empty)
        if stacks:
            model.set_experts_implementation(IMPLEMENTATION)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Return whether a parameter is the weight of a linear layer or a stack of experts."""
        return _is_stack(model, param_name) or bool(
            super().param_needs_quantization(model, param_name, **kwargs)
        )

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation that quantises a weight that has been read."""
        parent: Any = super()
        return QuantizeExperts(parent.get_quantize_ops())


class QuantizeExperts(ConversionOps):
    """Quantises stacks of experts, and leaves other weights to bitsandbytes' operation."""

    def __init__(self, others: ConversionOps) -> None:
        self._others = others

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the quantised tensors of one weight, by their full names.

        Args:
            input_dict: The weight, by its full name.
            source_patterns: Names of the tensors in files that it was made of.
            target_patterns: Names of the weights that were made of them.
            kwargs: The model, and what transformers passes to all operations.
        """
        model = kwargs["model"]
        result: dict[str, Any] = {}
        for name, value in input_dict.items():
            if not _is_stack(model, name):
                others: Any = self._others
                patterns = {"source_patterns": source_patterns, "target_patterns": target_patterns}
                result.update(others.convert({name: value}, **patterns, **kwargs))
                continue
            packed, buffers = quantize_stack(value[0] if isinstance(value, list) else value)
            result[name] = torch.nn.Parameter(packed, requires_grad=False)
            result.update({f"{name}_{what}": tensor for what, tensor in buffers.items()})
        return result


def _is_stack(model: Any, name: str) -> bool:
    module_name, _, projection = name.rpartition(".")
    return projection in getattr(model.get_submodule(module_name), "nf4_stacks", {})
