"""CPU, memory, time and retries of each task: the table of steps, overridden by the recipe.

This module does not import kfp, because `plan` also runs in a pod whose image has only the executor
of kfp.
"""

from tuneline.placement import PlacementConfig, StepPlacement, override
from tuneline.steps import STEPS


def is_accelerated(name: str, config: PlacementConfig) -> bool:
    """Return whether the step `name` gets an accelerator."""
    return STEPS[name].gpu and config.num_accelerators > 0


def needs_of(name: str, config: PlacementConfig) -> StepPlacement:
    """Return the needs of the step `name`; every field is set.

    The values of `placement.steps` come first, then those of `placement.accelerated` if the step
    gets an accelerator, then those of the table of steps. If a recipe overrides only a request or
    only its limit, and the request then exceeds the limit, both get the recipe's value.
    """
    step = STEPS[name]
    values: dict[str, str | float] = {
        "cpu_request": step.cpu[0],
        "cpu_limit": step.cpu[1],
        "memory_request": step.memory[0],
        "memory_limit": step.memory[1],
        "timeout_hours": step.timeout_hours,
        "num_retries": step.num_retries,
    }
    layers = [config.accelerated] if is_accelerated(name, config) else []
    if name in config.steps:
        layers.append(config.steps[name])
    for layer in layers:
        values = override(values, layer.model_dump(exclude_none=True))
    return StepPlacement.parse(values)


def memory_of(name: str, config: PlacementConfig) -> tuple[str, str]:
    """Return the memory request and limit of the step `name`."""
    needs = needs_of(name, config)
    assert needs.memory_request and needs.memory_limit
    return needs.memory_request, needs.memory_limit
