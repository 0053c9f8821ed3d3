"""Read the routed experts of a stock layer: their NF4 stacks, their adapters, and the router.

A module of experts in NF4 has, for each of its projections `gate_up_proj` and `down_proj`,

    nf4_stacks[projection]          num_experts, out_features, in_features, is_transposed
    {projection}                    packed weights, uint8 [E, N K / 2]
    {projection}_absmax             uint8 [E, N K / 64]
    {projection}_nested_absmax, _nested_code, _offset, _code: float32, or int32 of the same bits

and its adapters are peft's `ParamWrapper` modules around it, one for each projection. The package
that loads the model defines these names; this module only reads them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tuneline.kernels.binding_adapter import active_adapter, active_scaling, adapter_state
from tuneline.kernels.decoder.layer_weights import RoutedMlp
from tuneline.kernels.experts.activation import ExpertActivation
from tuneline.kernels.experts.mlp import Experts
from tuneline.kernels.experts.stack import ExpertLora, ExpertStack, LoraPair

PROJECTIONS = "gate_up_proj", "down_proj"


def unwrapped(module: Any) -> tuple[Any, list[Any]]:
    """Return the module of experts, and the wrappers of its adapters."""
    wrappers = []
    while "base_layer" in module._modules:
        wrappers.append(module)
        module = module._modules["base_layer"]
    return module, wrappers


def expert_stack(module: Any, projection: str, dtype: torch.dtype) -> ExpertStack:
    """Return one projection of a module of experts in NF4, sharing its memory.

    Raises:
        ValueError: The kernels cannot read a stack of this size.
    """
    stack = module.nf4_stacks[projection]

    def floats(what: str) -> Tensor:
        values: Tensor = getattr(module, f"{projection}_{what}")
        return values.view(torch.float32)

    bias = getattr(module, f"{projection}_bias", None)
    return ExpertStack(
        packed=getattr(module, projection).data,
        absmax=getattr(module, f"{projection}_absmax"),
        code=floats("code"),
        num_out=stack.out_features,
        num_in=stack.in_features,
        dtype=dtype,
        nested_absmax=floats("nested_absmax"),
        nested_code=floats("nested_code"),
        offset=floats("offset"),
        transposed=stack.is_transposed,
        bias=None if bias is None else bias.detach(),
    )


def bind_experts(
    module: Any, router: Any, top_k: int, activation: ExpertActivation, dtype: torch.dtype
) -> RoutedMlp:
    """Return the experts and the router that the fused layer computes with.

    Args:
        module: The module of experts, with or without wrappers of adapters.
        router: The module that chooses the experts.
        top_k: Experts per token.
        activation: The activation of the experts.
        dtype: Dtype of the layer.

    Raises:
        ValueError: The fused layer does not support a feature; the message is the reason.
    """
    experts, wrappers = unwrapped(module)
    if not getattr(experts, "nf4_stacks", None):
        raise ValueError("the experts are not in NF4")
    gate = getattr(type(experts), "_apply_gate", None)
    if gate is not None and gate.__module__ != "transformers.integrations.moe":
        raise ValueError(f"{type(experts).__name__} has a gate of its own")
    if any(parameter.requires_grad for parameter in router.parameters()) or any(
        "base_layer" in child._modules for child in router.modules()
    ):
        raise ValueError("the router is trained: only frozen routers are fused")
    pairs: dict[str, LoraPair] = {}
    for wrapper in wrappers:
        pair = _pair(wrapper)
        if pair is not None:
            pairs[wrapper.parameter_name] = pair
    gate_up, down = (expert_stack(experts, name, dtype) for name in PROJECTIONS)
    lora = ExpertLora(*(pairs.get(name) for name in PROJECTIONS))
    return RoutedMlp(Experts(gate_up, down, activation, lora), router, top_k)


def experts_state(module: Any) -> list[Any]:
    """Return the state of the experts that `bind_experts` reads, for the layer's fingerprint."""
    experts, wrappers = unwrapped(module)
    parts: list[Any] = [id(experts)]
    for name in PROJECTIONS:
        weight = experts._parameters.get(name)
        parts.append(None if weight is None else weight.data_ptr())
    for wrapper in wrappers:
        parts += adapter_state(wrapper)
        for name in ("lora_A", "lora_B"):
            for linear in wrapper._modules[name]._modules.values():
                weight = linear.weight
                parts += [id(weight), weight.data_ptr(), weight.requires_grad]
    return parts


def _pair(wrapper: Any) -> LoraPair | None:
    """Return the active adapter of one projection, in peft's layout, or None."""
    if type(wrapper).__name__ != "ParamWrapper":
        raise ValueError(f"the experts are wrapped by a {type(wrapper).__name__}")
    adapter = active_adapter(wrapper)
    if adapter is None:
        return None
    a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    num_experts = wrapper.num_experts
    return LoraPair(
        a.view(num_experts, -1, a.shape[1]),
        b.view(b.shape[0], -1, num_experts).permute(2, 0, 1),
        active_scaling(wrapper, adapter),
    )
