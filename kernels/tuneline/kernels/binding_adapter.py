"""Read from one of peft's LoRA modules which adapter is active, for linears and for experts."""

from __future__ import annotations

from typing import Any


class Unfusable(ValueError):
    """Raised for a layer that cannot be fused; its message is the reason in the `PatchReport`."""


def active_adapter(module: Any) -> str | None:
    """Return the name of a module's active adapter, or None if no adapter is active.

    An adapter stays active while adapters are disabled; `active_scaling` then returns 0.

    Raises:
        Unfusable: More than one adapter is active, or an adapter is merged.
    """
    if module.merged:
        raise Unfusable("an adapter is merged into the base")
    active = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
    if len(active) > 1:
        raise Unfusable(f"several adapters are active: {active}")
    return active[0] if active else None


def active_scaling(module: Any, adapter: str) -> float:
    """Return the factor of an adapter's output: 0 while the module's adapters are disabled.

    A disabled adapter keeps its columns, which then are zeros. The same kernels therefore run on
    operands of the same sizes, and the outputs are bit for bit those of an adapter whose B is zero.
    """
    return 0.0 if module.disable_adapters else float(module.scaling[adapter])


def adapter_state(module: Any) -> list[Any]:
    """Return which adapters of a module are active, and how they are scaled, for a fingerprint."""
    state = module.__dict__
    active = state.get("_active_adapter")
    return [
        id(module),
        state.get("_disable_adapters"),
        tuple(state.get("merged_adapters", ())),
        tuple(active) if isinstance(active, list) else active,
        tuple(state.get("scaling", {}).values()),
    ]
