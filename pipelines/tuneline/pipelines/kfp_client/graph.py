"""Name the steps of a compiled pipeline and the Argo nodes that run them.

KFP 2.17 turns a pipeline into one Argo workflow. The name of a node is the name of the node above
it and the key of its task: `line-x.root.exit-handler-1.train.executor` is the pod of train. A node
with retries has a node per attempt below it, whose name ends in the attempt's number: `train(0)`.
Argo's controller may add retries to every node (KFP's own installation does), so a path lists the
keys alone.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tuneline.runtime.kfp_run import loop_items

EXECUTOR = ".executor"


@dataclass(frozen=True)
class PipelineStep:
    """A step that a pipeline may run; a loop has one for each of its items."""

    name: str
    """Display name, with the item of the loop: train, evaluate base, quantize-gguf q4_k_m."""
    path: tuple[str, ...]
    """Name of the step's node, in parts: (".root", ".exit-handler-1", ".train")."""
    template: str
    """Argo template of the step's pods, which is part of their names."""
    is_conditional: bool = False
    """Whether a condition decides if the step runs."""


@dataclass(frozen=True)
class Driver:
    """A pod of KFP's own, which starts a step or a group of steps."""

    name: str
    """Display name of the step or the group."""
    path: tuple[str, ...]
    """Name of the driver's node, in parts."""
    template: str


@dataclass(frozen=True)
class Graph:
    """The steps of a pipeline, each after the steps that it waits for, and KFP's drivers."""

    steps: tuple[PipelineStep, ...]
    drivers: tuple[Driver, ...]


def graph_of(spec: dict[str, Any], parameters: Mapping[str, Any] | None = None) -> Graph:
    """Return the graph of a compiled pipeline.

    Args:
        spec: the pipeline as KFP's API returns it: the pipeline alone, or with its platforms.
        parameters: parameters that a run was started with, instead of their defaults.
    """
    pipeline = spec.get("pipeline_spec", spec)
    platforms = spec.get("platform_spec", {}).get("platforms", {})
    executors = platforms.get("kubernetes", {}).get("deploymentSpec", {}).get("executors", {})
    declared = pipeline["root"].get("inputDefinitions", {}).get("parameters", {})
    values = {name: each.get("defaultValue") for name, each in declared.items()}
    values |= parameters or {}
    walk = _Walk(pipeline, executors)
    found = list(walk.dag("root", pipeline["root"], (".root",), values))
    drivers = [Driver("root", (".root-driver",), "system-dag-driver")]
    return Graph(
        tuple(node for node in found if isinstance(node, PipelineStep)),
        tuple(drivers + [node for node in found if isinstance(node, Driver)]),
    )


@dataclass(frozen=True)
class _Walk:
    pipeline: dict[str, Any]
    executors: dict[str, Any]
    """Settings of the pods, by the executor's label."""

    def dag(
        self,
        group: str,
        component: dict[str, Any],
        path: tuple[str, ...],
        values: Mapping[str, Any],
        item: str = "",
        is_conditional: bool = False,
    ) -> Iterator[PipelineStep | Driver]:
        for key, task in _ordered(component["dag"]["tasks"]):
            name = task.get("taskInfo", {}).get("name") or key
            inner = self.pipeline["components"][task["componentRef"]["name"]]
            above, trigger = path, task.get("triggerPolicy", {})
            depends = is_conditional or "condition" in trigger
            if trigger.get("strategy") == "ALL_UPSTREAM_TASKS_COMPLETED":
                # An exit handler is a hook of the group of tasks after which it runs.
                above = (*path, f".{task['dependentTasks'][0]}.onExit")
            here = (*above, f".{key}")
            if self._is_importer(inner):
                # KFP's driver does all of its work.
                continue
            if "dag" not in inner:
                step = f"{name} {item}".rstrip()
                yield Driver(step, (*above, f".{key}-driver"), "system-container-driver")
                yield PipelineStep(step, here, self._template(task, inner), depends)
            elif "parameterIterator" in task:
                yield from self._loop(group, task, inner, here, _inputs_of(task, values), depends)
            else:
                yield Driver(name, (*above, f".{key}-driver"), "system-dag-driver")
                yield from self.dag(name, inner, here, _inputs_of(task, values), item, depends)

    def _loop(
        self,
        group: str,
        task: dict[str, Any],
        inner: dict[str, Any],
        path: tuple[str, ...],
        values: Mapping[str, Any],
        is_conditional: bool,
    ) -> Iterator[PipelineStep | Driver]:
        yield Driver(group, (*path, ".iteration-driver"), "system-dag-driver")
        # The items of a loop over another task's output are known only while the run lasts.
        items = loop_items(task, values)
        for number, value in enumerate(items):
            item = value if isinstance(value, str) else json.dumps(value)
            each = (*path, ".iteration-iterations", f"({number}:{number})")
            driver = (*each, ".iteration-item-driver")
            yield Driver(f"{group} {item}", driver, "system-dag-driver")
            inside = (*each, ".iteration-item")
            yield from self.dag(group, inner, inside, values, item, is_conditional)

    def _is_importer(self, component: dict[str, Any]) -> bool:
        executors = self.pipeline.get("deploymentSpec", {}).get("executors", {})
        return "importer" in executors.get(component.get("executorLabel", ""), {})

    def _template(self, task: dict[str, Any], component: dict[str, Any]) -> str:
        metadata = self.executors.get(component.get("executorLabel", ""), {}).get("podMetadata")
        template = "system-container-impl"
        if "retryPolicy" in task:
            template = f"retry-{template}"
        if metadata:
            counts = [len(metadata.get(kind, {})) for kind in ("annotations", "labels")]
            template = f"metadata-{counts[0]}-{counts[1]}-{template}"
        return template


def _inputs_of(task: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a task that are parameters of the DAG around it."""
    given = task.get("inputs", {}).get("parameters", {})
    return {
        name: values[source["componentInputParameter"]]
        for name, source in given.items()
        if source.get("componentInputParameter") in values
    }


def _ordered(tasks: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the tasks of a DAG, each after the tasks that it depends on."""
    left = dict(tasks)
    while left:
        ready = [
            key
            for key, task in left.items()
            if not left.keys() & set(task.get("dependentTasks", []))
        ]
        for key in ready:
            yield key, left.pop(key)
