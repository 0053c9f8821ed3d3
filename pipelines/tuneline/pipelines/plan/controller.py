"""Check which faults the cluster's workflow controller retries, according to its defaults.

KFP 2.17 writes no retry policy into a workflow, so that of the controller's defaults holds for the
retries of a step (`num_retries`). The defaults also wrap every template around the step, and these
retries multiply: what fails in all tries of the inner template is begun again by the outer one.
"""

from collections.abc import Iterator
from typing import Any

import yaml

from tuneline.bounded_yaml import load_yaml
from tuneline.pipelines.kube import Kube
from tuneline.pipelines.needs import needs_of
from tuneline.pipelines.plan.check import Check
from tuneline.recipe import Recipe

NO_POLICY = "OnFailure"
"""What Argo does if neither the workflow nor the defaults name a policy."""
INSIDE = "tuneline itself retries errors of the network and faults of ranks, inside the step"


def check_retries(recipe: Recipe, kube: Kube) -> Iterator[Check]:
    """Yield who retries which faults, with a warning if the controller retries failed steps."""
    data = kube.controller_settings()
    if data is None:
        yield Check(
            "retries",
            "unknown",
            f"there is no ConfigMap workflow-controller-configmap in {kube.namespace} or kubeflow, "
            "so who retries a pod that disappeared is not known",
        )
        return
    strategy = _retry_strategy(data)
    policy = strategy.get("retryPolicy") or NO_POLICY
    limit = strategy.get("limit")
    num_retries = needs_of("train", recipe.placement).num_retries or 0
    if policy == "OnError":
        words = "KFP makes pods again that disappeared (drained, preempted, node lost), but does "
        yield Check("retries", "ok", f"{words}not run failed steps again (OnError); {INSIDE}")
    elif policy == "Always":
        words = "KFP also runs failed steps again (retryPolicy Always)"
        if strategy:
            per_level = f"({num_retries} + 1) x {_tries(limit)}"
            words += f", and retries multiply: train up to {per_level} times for each DAG around it"
        advice = "ask the owner of the platform for the policy OnError, which KFP 2.17 ships"
        yield Check("retries", "warn", words, advice)
    else:
        words = f"KFP does not make a pod again that disappeared (retryPolicy {policy}); {INSIDE}"
        advice = "ask the owner of the platform for the policy OnError, or use `tuneline resume`"
        yield Check("retries", "warn", words, advice)


def _retry_strategy(settings: dict[str, str]) -> dict[str, Any]:
    """Return the retry strategy that the controller merges into every template; {} without one."""
    try:
        defaults = load_yaml(settings.get("workflowDefaults") or "{}")
        return dict(defaults["spec"]["templateDefaults"]["retryStrategy"])
    except (KeyError, TypeError, ValueError, yaml.YAMLError):
        return {}


def _tries(limit: Any) -> str:
    """Return the number of tries that a limit of retries allows; Argo has none by default."""
    return str(int(limit) + 1) if str(limit).isdigit() else "any number of"
