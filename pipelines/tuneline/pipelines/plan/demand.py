"""What the pods of a run request and may use at most, in the terms of a ResourceQuota.

A quota counts the larger of a pod's init containers and the sum of its other containers. The tests
compare the containers below with pods that KFP 2.17 made.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tuneline.kinds import EXPORT_KINDS
from tuneline.pipelines.needs import is_accelerated, needs_of
from tuneline.placement import PlacementConfig, quantity_value
from tuneline.recipe import Recipe

Amounts = dict[str, float]
"""Amounts by the names of a quota's resources, such as requests.cpu."""

NO_RESOURCES: Mapping[str, str] = {}
"""Resources of a container of Argo's executor, which sets none. If the namespace has a LimitRange,
the container gets its defaults."""
LAUNCHER = {
    "requests.cpu": "100m",
    "requests.memory": "256Mi",
    "limits.cpu": "500m",
    "limits.memory": "256Mi",
}
"""Resources of the init container in which KFP's launcher copies itself into the pod of a step."""
DRIVER = {
    "requests.cpu": "100m",
    "requests.memory": "64Mi",
    "limits.cpu": "500m",
    "limits.memory": "512Mi",
}
"""Resources of the main container of KFP's driver, a pod that runs before each step."""


@dataclass(frozen=True)
class Unit:
    """Pods that exist at the same time or not at all."""

    name: str
    """The step, for messages."""
    amounts: Amounts
    """What the pods need together."""


def units_of(recipe: Recipe, defaults: Mapping[str, str] = NO_RESOURCES) -> list[list[Unit]]:
    """Return the units of a run, in groups that run side by side.

    The groups follow each other, except that the base model's evaluation may last until the tuned
    model is evaluated and exported. The steps before and after need less than these.

    Args:
        recipe: The recipe.
        defaults: What the namespace's LimitRange gives to a container that has no value of its own.
    """
    placement = recipe.placement

    def step(name: str) -> Unit:
        return Unit(name, _step_pod(name, placement, defaults))

    driver = Unit("KFP's driver", _pod([DRIVER, NO_RESOURCES], [NO_RESOURCES], defaults))
    if placement.num_nodes > 1:
        node = _pod([_main("train", placement)], [], defaults)
        job = {key: value * placement.num_nodes for key, value in node.items()}
        train = [Unit(f"train on {placement.num_nodes} nodes", job), step("train-on-nodes")]
    else:
        train = [step("train")]
    exports = [
        step(f"quantize-{kind}") for kind in EXPORT_KINDS for _ in getattr(recipe.quantize, kind)
    ]
    evaluate = step("evaluate")
    return [
        [*train, evaluate, driver],
        [step("merge"), evaluate, driver],
        [evaluate, evaluate, *exports, *[driver] * len(exports)],
    ]


def total(amounts: Iterable[Amounts]) -> Amounts:
    """Return the sum of several amounts."""
    sums: Amounts = {}
    for each in amounts:
        for key, value in each.items():
            sums[key] = sums.get(key, 0.0) + value
    return sums


def _main(name: str, placement: PlacementConfig) -> dict[str, str]:
    needs = needs_of(name, placement)
    main = {
        f"{kind}s.{resource}": getattr(needs, f"{resource}_{kind}")
        for kind in ("request", "limit")
        for resource in ("cpu", "memory")
    }
    if is_accelerated(name, placement):
        count = placement.num_accelerators if name == "train" else 1
        main[f"requests.{placement.accelerator}"] = str(count)
    return main


def _step_pod(name: str, placement: PlacementConfig, defaults: Mapping[str, str]) -> Amounts:
    containers = [_main(name, placement), NO_RESOURCES]
    return _pod(containers, [NO_RESOURCES, LAUNCHER], defaults)


def _pod(
    containers: Iterable[Mapping[str, str]],
    init_containers: Iterable[Mapping[str, str]],
    defaults: Mapping[str, str],
) -> Amounts:
    def amounts(container: Mapping[str, str]) -> Amounts:
        return {key: quantity_value(text) for key, text in {**defaults, **dict(container)}.items()}

    pod = total(amounts(each) for each in containers)
    for each in init_containers:
        for key, value in amounts(each).items():
            pod[key] = max(pod.get(key, 0.0), value)
    return {"pods": 1.0, **pod}
