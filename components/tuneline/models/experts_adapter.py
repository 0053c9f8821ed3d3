"""LoRA on experts in NF4, in the layout that peft's `target_parameters` has.

peft adapts a parameter by replacing it with W + s B A during the forward pass, which needs W as one
tensor in 16 bits. Here the module of experts gets A and B instead, and `experts_forward` adds the
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
from peft.tuners.lora import layer as peft_layer

from tuneline.kernels.ops.experts_stack import LoraPair
from tuneline.models.experts import expert_modules


class ParamWrapper(peft_layer.ParamWrapper):  # type: ignore[misc]
    """peft's wrapper of one parameter, for a stack in NF4.

    It has the name of peft's class because peft recognises nested wrappers by this name.
    """

    def _get_in_out_features(self, module: torch.nn.Module) -> tuple[int, int]:
        stack = self.get_base_layer().nf4_stacks[self.parameter_name]
        self.num_experts, self._param_ndim = stack.num_experts, 3
        return stack.rows, stack.columns

    @contextlib.contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        names = [name for name in active_adapters if name in self.lora_A]
        assert len(names) <= 1, "experts in NF4 have at most one active adapter"
        updates = self.get_base_layer().nf4_lora
        for name in names:
            updates[self.parameter_name] = self._update(name)
        try:
            yield
        finally:
            updates.pop(self.parameter_name, None)

    def _update(self, name: str) -> LoraPair:
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return LoraPair(
            a=a.reshape(self.num_experts, -1, a.shape[1]),
            b=b.reshape(b.shape[0], -1, self.num_experts).permute(2, 0, 1),
            scaling=self.scaling[name],
        )


def adapt_experts_in_nf4(config: peft.LoraConfig, model: Any) -> None:
    """Make peft use `ParamWrapper` for the experts in NF4 of a model; call it before peft does.

    Args:
        config: settings of an adapter that is to be added to the model.
        model: the model, as `nf4.load_base` returned it.
    """
    for module in expert_modules(model).values():
        if getattr(module, "nf4_stacks", None):
            config._register_custom_module({type(module): ParamWrapper})
