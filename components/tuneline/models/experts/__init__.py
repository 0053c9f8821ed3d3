"""Routed experts in NF4: their numbers, how they are loaded, their forward method and adapter."""

from tuneline.models.experts.stacks import (
    Stack,
    buffer_shapes,
    expert_modules,
    projections,
    quantize_stack,
    quantized_experts,
    round_trip_experts,
)

__all__ = [
    "Stack",
    "buffer_shapes",
    "expert_modules",
    "projections",
    "quantize_stack",
    "quantized_experts",
    "round_trip_experts",
]
