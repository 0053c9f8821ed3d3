"""Check that the namespace's quotas hold the pods of a run."""

from collections.abc import Iterator
from typing import Any

from tuneline.pipelines.kube import Kube
from tuneline.pipelines.plan.check import Check
from tuneline.pipelines.plan.demand import Unit, total, units_of
from tuneline.placement import quantity_value
from tuneline.recipe import Recipe

_SHORT_NAMES = {"cpu": "requests.cpu", "memory": "requests.memory", "count/pods": "pods"}
"""Other names of a quota's resources."""


def check_quota(recipe: Recipe, kube: Kube) -> Iterator[Check]:
    """Compare the quotas with the run's largest pod, and with all pods that run side by side."""
    quotas = kube.quotas()
    if not quotas:
        return
    groups = units_of(recipe)
    for quota in quotas:
        # A quota with scopes counts only some of the pods.
        if not (quota.spec.scopes or quota.spec.scope_selector):
            yield from _check_one(quota, groups)


def _check_one(quota: Any, groups: list[list[Unit]]) -> Iterator[Check]:
    hard = (quota.status and quota.status.hard) or quota.spec.hard or {}
    used = (quota.status and quota.status.used) or {}
    held = []
    for key, limit in hard.items():
        resource = _SHORT_NAMES.get(key, key)
        largest = max(
            (unit for group in groups for unit in group),
            key=lambda unit: unit.amounts.get(resource, 0.0),
        )
        wanted = largest.amounts.get(resource, 0.0)
        if not wanted:
            continue
        what = resource.removeprefix("requests.") if "/" in resource else resource
        in_use = used.get(key, "0")
        words = f"{quota.metadata.name}: {in_use} of {limit} {what} in use"
        side_by_side = max(
            total(unit.amounts for unit in group).get(resource, 0.0) for group in groups
        )
        if quantity_value(limit) < wanted:
            words += f", but {largest.name} requests {_readable(wanted, resource)}"
            yield Check(
                "quota", "fail", words, "request less in placement, or ask for a higher quota"
            )
        elif quantity_value(limit) - quantity_value(in_use) < wanted:
            words += f", and {largest.name} requests {_readable(wanted, resource)}"
            yield Check("quota", "warn", words, "its pods are created when other pods have ended")
        elif quantity_value(limit) < side_by_side:
            words += (
                f", and steps that can run side by side request {_readable(side_by_side, resource)}"
            )
            yield Check("quota", "warn", words, "some of these steps wait until others have ended")
        else:
            held.append(f"{in_use} of {limit} {what}")
    if held:
        yield Check("quota", "ok", f"{quota.metadata.name}: {', '.join(held)} in use")


def _readable(amount: float, resource: str) -> str:
    if resource.endswith("memory"):
        return f"{amount / 2**30:.4g}Gi"
    return f"{amount:.4g}"
