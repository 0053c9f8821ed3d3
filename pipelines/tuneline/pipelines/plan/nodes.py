"""Check that the cluster has nodes which are large enough for the steps."""

from collections.abc import Iterator
from typing import Any

from tuneline.gpu_profiles import SMALL
from tuneline.pipelines.kube import Kube
from tuneline.pipelines.needs import needs_of
from tuneline.pipelines.plan.check import Check
from tuneline.placement import quantity_value
from tuneline.pods import product_label
from tuneline.recipe import Recipe
from tuneline.steps import STEPS


def check_nodes(recipe: Recipe, kube: Kube) -> Iterator[Check]:
    """Check which nodes could run the steps if no other pods were on them."""
    nodes = kube.nodes()
    if recipe.placement.num_accelerators:
        yield _for_accelerators(recipe, nodes)
    else:
        yield _for_cpus(recipe, nodes)


def _for_cpus(recipe: Recipe, nodes: list[Any]) -> Check:
    steps = [name for name in STEPS if name != "train-on-nodes" or recipe.placement.num_nodes > 1]
    for name in steps:
        why = [(node.metadata.name, _shortage(name, recipe, node)) for node in nodes]
        if all(reason for _, reason in why):
            reasons = "; ".join(f"{node} {reason}" for node, reason in why[:5])
            words = f"no node fits {name}: {reasons or 'there are no nodes'}"
            advice = f"lower placement.steps.{name}'s requests, or add a larger node"
            if recipe.placement.profile != SMALL:
                advice = f"set placement.profile to {SMALL}, or add a larger node"
            # Only a warning, because a cluster autoscaler may add the nodes.
            return Check("nodes", "warn", words, advice)
    return Check("nodes", "ok", f"each step fits one of {len(nodes)} nodes")


def _for_accelerators(recipe: Recipe, nodes: list[Any]) -> Check:
    placement = recipe.placement
    fits, why = [], []
    for node in nodes:
        reason = _refusal(recipe, node)
        if reason:
            why.append(f"{node.metadata.name} {reason}")
        else:
            fits.append(node.metadata.name)
    wanted = f"{placement.num_accelerators} {placement.accelerator}"
    if len(fits) >= placement.num_nodes:
        return Check("nodes", "ok", f"{len(fits)} of {len(nodes)} nodes fit {wanted}: {fits[0]}")
    count = "no node fits"
    if fits:
        count = f"training needs {placement.num_nodes} nodes but only {len(fits)} fit"
    none = "there are no other nodes" if fits else "there are no nodes"
    words = f"{count} {wanted}: {'; '.join(why[:5]) or none}"
    advice = "choose another placement.profile, or a node pool that scales up from zero"
    # Only a warning, because a cluster autoscaler may add the nodes.
    return Check("nodes", "warn", words, advice)


def _refusal(recipe: Recipe, node: Any) -> str | None:
    """Return why train's pod cannot run on the node even if the node is empty, or None."""
    placement = recipe.placement
    labels, capacity = node.metadata.labels or {}, node.status.allocatable or {}
    count = float(capacity.get(placement.accelerator, 0))
    if count < placement.num_accelerators:
        return f"has {count:g} {placement.accelerator}"
    label = product_label(placement.accelerator)
    product = labels.get(label)
    if placement.accelerator_products and product not in placement.accelerator_products:
        return f"has {product or 'no label ' + label}"
    for key, value in placement.node_selector.items():
        if labels.get(key) != value:
            return f"has {key}={labels.get(key)}"
    shortage = _shortage("train", recipe, node)
    if shortage:
        return shortage
    for taint in node.spec.taints or []:
        tolerated = any(
            toleration.key == taint.key
            and toleration.effect in (None, taint.effect)
            and (toleration.operator == "Exists" or toleration.value == taint.value)
            for toleration in placement.tolerations
        )
        if taint.effect != "PreferNoSchedule" and not tolerated:
            return f"has the taint {taint.key}"
    return None


def _shortage(name: str, recipe: Recipe, node: Any) -> str | None:
    """Return which resource of a node is less than the step requests, or None."""
    needs, capacity = needs_of(name, recipe.placement), node.status.allocatable or {}
    for resource in ("cpu", "memory"):
        request = getattr(needs, f"{resource}_request")
        if quantity_value(capacity.get(resource, "0")) < quantity_value(request):
            return f"has {capacity.get(resource)} {resource}, less than {request}"
    return None
