"""LoRA on experts in NF4, in the layout that peft's `target_parameters` has.

peft adapts a parameter by replacing it with W + s B A during the forward pass, which needs W as one
tensor in 16 bits. Here the module of experts gets A and B instead, and `forward` adds the
update of each expert to the product with the expert's weight. The adapter's tensors have peft's
names and shapes, so that peft loads them on the model in 16 bits:

    experts.base_layer.lora_A.weight   [E r, inputs]    of gate_up_proj
    experts.base_layer.lora_B.weight   [outputs, r E]
    experts.lora_A.weight, lora_B.weight                of down_proj
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import peft
import torch
from bitsandbytes.nn.modules import Linear4bit
from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora.bnb import dispatch_bnb_4bit

from tuneline.kernels.experts.stack import LoraPair
from tuneline.models.experts.stacks import expert_modules


class ParamWrapper(peft_layer.ParamWrapper):
    """peft's wrapper of one parameter, for a stack in NF4.

    It has the name of peft's class because peft recognises nested wrappers by this name.
    """

    def _get_in_out_features(self, module: torch.nn.Module) -> tuple[int, int]:
        experts: Any = self.get_base_layer()
        stack = experts.nf4_stacks[self.parameter_name]
        self.num_experts, self._param_ndim = stack.num_experts, 3
        return stack.rows, stack.columns

    @contextlib.contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        names = [name for name in active_adapters if name in self.lora_A]
        assert len(names) <= 1, "experts in NF4 have at most one active adapter"
        experts: Any = self.get_base_layer()
        updates = experts.nf4_lora
        for name in names:
            updates[self.parameter_name] = self._update(name)
        try:
            yield
        finally:
            updates.pop(self.parameter_name, None)

    def _update(self, name: str) -> LoraPair:
        down: Any = self.lora_A[name]
        up: Any = self.lora_B[name]
        a, b = down.weight, up.weight
        return LoraPair(
            a=a.reshape(self.num_experts, -1, a.shape[1]),
            b=b.reshape(b.shape[0], -1, self.num_experts).permute(2, 0, 1),
            scaling=self.scaling[name],
        )


def adapt_experts_in_nf4(config: peft.LoraConfig, model: Any) -> None:
    """Make peft adapt the parameters in NF4 of a model of experts; call it before peft does.

    Experts get a `ParamWrapper`. A linear layer whose weight is one of `target_parameters`, as are
    those of shared experts, gets the adapter of a linear layer, which has the same tensors.

    Args:
        config: settings of an adapter that is to be added to the model.
        model: the model, as `nf4.load_base` returned it.
    """
    for module in expert_modules(model).values():
        if getattr(module, "nf4_stacks", None):
            config._register_custom_module({type(module): ParamWrapper})
    by_weight: Any = {Linear4bit: _adapted_by_its_weight}
    config._register_custom_module(by_weight)


def _adapted_by_its_weight(
    target: Any, name: str, config: Any, parameter_name: str | None = None, **options: Any
) -> torch.nn.Module | None:
    """Return the adapter of a linear layer in 4 bits; None leaves it to peft to make one."""
    if parameter_name is None:
        return None
    adapted: torch.nn.Module | None = dispatch_bnb_4bit(target, name, config=config, **options)
    return adapted
