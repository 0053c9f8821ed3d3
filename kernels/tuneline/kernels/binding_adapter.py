"""Read from one of peft's LoRA modules which adapter is active, for linears and for experts."""

from __future__ import annotations

from typing import Any


class Unfusable(ValueError):
    """Raised for a layer that cannot be fused; its message is the reason in the `PatchReport`."""


def active_adapter(module: Any) -> str | None:
    """Return the name of a module's active adapter, or None if no adapter is active.

    Raises:
        Unfusable: More than one adapter is active, or adapters are disabled or merged.
    """
    if module.disable_adapters:
        raise Unfusable("adapters are disabled")
    if module.merged:
        raise Unfusable("an adapter is merged into the base")
    active = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
    if len(active) > 1:
        raise Unfusable(f"several adapters are active: {active}")
    return active[0] if active else None


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
