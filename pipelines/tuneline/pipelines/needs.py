"""How much CPU, memory and time each task needs, and what a recipe says instead.

Known without kfp: the plan looks at it in a run's first pod, where kfp is its executor only.
"""

from dataclasses import dataclass

from tuneline.placement import PlacementConfig, StepPlacement, quantity_value


@dataclass(frozen=True)
class Needs:
    """What one task needs: CPU cores and memory as Kubernetes quantities."""

    cpu: tuple[str, str]
    """Request and limit."""
    memory: tuple[str, str]
    """Request and limit."""
    timeout_hours: float
    """Far above what the step takes; it ends a pod that hangs."""
    gpu: bool = False
    """Whether it can use an accelerator; only train can use several."""
    hub: bool = False
    """Whether it uses the network: the Hub's token and the cache."""
    tracks: bool = False
    """Whether it may report to trackers: the recipe's own secrets."""
    scratch: bool = True
    """Whether it holds models, and so wants room for temporary files."""
    num_retries: int = 0
    """Where another try can help: the network, or a pod that was taken away."""


NEEDS = {
    # No retry: what it says no to is the same a minute later, and its client waits for an API.
    "plan": Needs(("500m", "1"), ("512Mi", "1Gi"), 1, scratch=False),
    "look-up-model": Needs(("1", "4"), ("1Gi", "4Gi"), 2, hub=True, scratch=False, num_retries=3),
    "look-up-data": Needs(("1", "4"), ("1Gi", "4Gi"), 2, hub=True, scratch=False, num_retries=3),
    "fetch": Needs(("1", "4"), ("4Gi", "16Gi"), 6, hub=True, num_retries=3),
    "prepare": Needs(("2", "8"), ("4Gi", "16Gi"), 12, hub=True, num_retries=2),
    "train": Needs(("4", "16"), ("16Gi", "64Gi"), 96, gpu=True, tracks=True, num_retries=2),
    # It makes and follows a TrainJob, which may wait in a queue for days; the job has the time
    # limit, the GPUs and the memory of `train`. A retry finds the job that is there.
    "train-on-nodes": Needs(("500m", "2"), ("1Gi", "4Gi"), 720, scratch=False, num_retries=3),
    "merge": Needs(("4", "16"), ("16Gi", "64Gi"), 6, gpu=True, num_retries=1),
    # 8 GiB hold what 8B takes of its own, 6; the limit holds its files too (host_memory.py).
    "convert-gguf": Needs(("2", "8"), ("8Gi", "48Gi"), 6, num_retries=1),
    "measure-importance": Needs(("2", "16"), ("8Gi", "48Gi"), 6, num_retries=1),
    "quantize-gguf": Needs(("2", "16"), ("8Gi", "48Gi"), 6, num_retries=1),
    "quantize-gptq": Needs(("4", "16"), ("16Gi", "64Gi"), 24, gpu=True, num_retries=1),
    "evaluate": Needs(("4", "16"), ("16Gi", "64Gi"), 24, gpu=True, hub=True, num_retries=2),
    "gate": Needs(("1", "2"), ("1Gi", "4Gi"), 1, scratch=False),
    "report": Needs(("500m", "1"), ("512Mi", "2Gi"), 1, scratch=False),
    "publish": Needs(("1", "4"), ("2Gi", "8Gi"), 12, hub=True, num_retries=3),
    "diagnose": Needs(("500m", "1"), ("512Mi", "1Gi"), 1, scratch=False),
}


def wanted_of(needs: Needs, name: str, config: PlacementConfig, accelerated: bool) -> StepPlacement:
    """Merge the table, the accelerated steps' values and the step's own; the last one wins.

    Where only one of a request and a limit was given, the other one follows it.
    """
    values: dict[str, str | float] = {
        "cpu_request": needs.cpu[0],
        "cpu_limit": needs.cpu[1],
        "memory_request": needs.memory[0],
        "memory_limit": needs.memory[1],
        "timeout_hours": needs.timeout_hours,
        "num_retries": needs.num_retries,
    }
    layers = [config.accelerated] if accelerated else []
    layers += [found for step, found in config.steps.items() if step == name]
    for layer in layers:
        given = layer.model_dump(exclude_none=True)
        values.update(given)
        for resource in ("cpu", "memory"):
            request, limit = f"{resource}_request", f"{resource}_limit"
            if quantity_value(str(values[request])) > quantity_value(str(values[limit])):
                follower, leader = (limit, request) if request in given else (request, limit)
                values[follower] = values[leader]
    return StepPlacement.parse(values)


def memory_of(name: str, config: PlacementConfig) -> tuple[str, str]:
    """Return request and limit of the memory of the component `name`."""
    needs = NEEDS[name]
    wanted = wanted_of(needs, name, config, needs.gpu and config.num_accelerators > 0)
    assert wanted.memory_request and wanted.memory_limit
    return wanted.memory_request, wanted.memory_limit
