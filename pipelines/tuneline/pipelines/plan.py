"""Say no before a GPU is asked for: what a recipe will take, and whether a cluster has it.

Each check has a verdict. `fail` means that the run cannot work as it stands, `warn` that it may
not, `unknown` that the cluster does not let these credentials look.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from tuneline.pipelines.estimate import GPU_BYTES, Estimate, estimate, parameters_in_name
from tuneline.pipelines.kube import Kube, Refused, Right
from tuneline.pipelines.placement import PRODUCT_LABEL
from tuneline.profiles import quantity_value
from tuneline.recipe import Recipe
from tuneline.train.memory import GIB
from tuneline.units import duration, parameters, size

Verdict = Literal["ok", "warn", "fail", "unknown"]

CRDS = {
    "workflows.argoproj.io": "Kubeflow Pipelines (its Argo Workflows) is not installed",
    "scheduledworkflows.kubeflow.org": "Kubeflow Pipelines is not installed whole: `tuneline "
    "schedule` will not work",
}

TRAINER_CRD = "trainjobs.trainer.kubeflow.org"

RIGHTS = (
    Right("get", "pods"),
    Right("list", "pods"),
    Right("get", "pods", subresource="log"),
    Right("list", "events"),
    Right("list", "workflows", "argoproj.io"),
)
"""What `tuneline doctor` reads with the credentials of whoever asks."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    words: str
    advice: str = ""


def plan(
    recipe: Recipe,
    *,
    num_parameters: float | None = None,
    price_per_gpu_hour: float | None = None,
    kube: Kube | None = None,
) -> list[Check]:
    """Check a recipe, by itself and, where one is given, against a cluster.

    Args:
        recipe: with the placement that it will run with.
        num_parameters: of the base model; None reads them off its name.
        price_per_gpu_hour: in any currency.
        kube: the cluster.

    Raises:
        ClusterError: the cluster cannot be reached.
    """
    num_parameters = num_parameters or parameters_in_name(recipe.base_model)
    checks = list(_ranks(recipe))
    if num_parameters is None:
        advice = "give --parameters, e.g. 8e9"
        words = f"the name {recipe.base_model} does not say how many parameters it has"
        checks.append(Check("estimate", "unknown", words, advice))
    else:
        checks += _resources(recipe, estimate(recipe, num_parameters), price_per_gpu_hour)
    if kube is not None:
        checks += _cluster(recipe, kube)
    return checks


def _ranks(recipe: Recipe) -> Iterator[Check]:
    """Look whether the GPUs can share a step: the train step would refuse, hours later."""
    train, placement = recipe.train, recipe.placement
    num_ranks = placement.num_nodes * max(1, placement.num_accelerators)
    if train.num_ranks != "auto":
        num_ranks = train.num_ranks
    rows = train.per_device_train_batch_size * train.gradient_accumulation_steps
    words = f"{num_ranks} share a step of {rows} rows"
    if rows % num_ranks:
        advice = "change train.gradient_accumulation_steps, which counts those of all ranks"
        yield Check("ranks", "fail", f"{words}, which cannot be done equally", advice)
    elif num_ranks > 1:
        yield Check("ranks", "ok", words)


def _resources(recipe: Recipe, found: Estimate, price: float | None) -> Iterator[Check]:
    placement = recipe.placement
    what = f"{parameters(found.num_parameters)} parameters, {found.length} tokens a row"
    available = GPU_BYTES.get(placement.profile)
    needs = f"{found.gpu_bytes / GIB:.1f} GiB to train ({what})"
    if available is None:
        yield Check("GPU memory", "ok", f"{needs}; profile local names no GPU")
    else:
        verdict: Verdict = "ok" if found.gpu_bytes <= 0.9 * available else "warn"
        verdict = "fail" if found.gpu_bytes > 1.1 * available else verdict
        advice = (
            "lower train.per_device_train_batch_size or prepare.max_seq_length, turn "
            "train.gradient_checkpointing on, or take a larger GPU"
        )
        words = f"{needs}, of {available / GIB:.1f} GiB on {placement.profile}"
        yield Check("GPU memory", verdict, words, "" if verdict == "ok" else advice)
    yield Check("artifacts", "ok", f"{size(found.artifact_bytes)} kept by a run")
    scratch = f"{size(found.scratch_bytes)} on the disk of the largest step"
    if placement.scratch_size and quantity_value(placement.scratch_size) < found.scratch_bytes:
        advice = "raise placement.scratch_size"
        words = f"{scratch}, and placement.scratch_size is {placement.scratch_size}"
        yield Check("disk", "fail", words, advice)
    else:
        yield Check("disk", "ok", scratch)
    if found.tokens_per_second is None:
        return
    speed = f"{found.tokens_per_second:,.0f} tokens/s a GPU"
    if found.hours is None or found.gpu_hours is None:
        yield Check("time", "ok", f"{speed}; how many tokens there are only the data says")
        return
    words = f"{duration(found.hours * 3600)} of training, at {speed}"
    words += f" on {found.num_gpus} GPUs at best" if found.num_gpus > 1 else ""
    limit = placement.steps["train"].timeout_hours if "train" in placement.steps else None
    if limit is not None and limit < found.hours:
        advice = "raise placement.steps.train.timeout_hours"
        yield Check("time", "fail", f"{words}; the step is ended after {limit:g} h", advice)
    else:
        yield Check("time", "ok", words)
    bill = f"{found.gpu_hours:.2f} GPU hours of training"
    if price is not None:
        bill += f", {found.gpu_hours * price:.2f} at {price:g} an hour"
    yield Check("cost", "ok", bill)


def _cluster(recipe: Recipe, kube: Kube) -> Iterator[Check]:
    yield Check("API", "ok", f"Kubernetes {kube.version()} at {kube.host}")
    for name, look in (
        ("CRDs", _crds),
        ("rights", _rights),
        ("secrets", _secrets),
        ("volumes", _volumes),
        ("queue", _queue),
        ("quota", _quota),
        ("nodes", _nodes),
    ):
        yield from _looked(name, look, recipe, kube)


def _looked(
    name: str, look: Callable[[Recipe, Kube], Iterator[Check]], recipe: Recipe, kube: Kube
) -> Iterator[Check]:
    try:
        yield from look(recipe, kube)
    except Refused as error:
        yield Check(name, "unknown", str(error))


def _crds(recipe: Recipe, kube: Kube) -> Iterator[Check]:
    wanted = dict(CRDS)
    if recipe.placement.num_nodes > 1:
        wanted[TRAINER_CRD] = (
            "Kubeflow Trainer 2 is not installed, and placement.num_nodes is "
            f"{recipe.placement.num_nodes}"
        )
    for crd, absence in wanted.items():
        versions = kube.served_versions(crd)
        if versions:
            yield Check("CRDs", "ok", f"{crd} {', '.join(versions)}")
        else:
            yield Check("CRDs", "fail", f"there is no {crd}: {absence}", "ask the platform's owner")


def _rights(recipe: Recipe, kube: Kube) -> Iterator[Check]:
    missing = [
        str(right)
        for right in RIGHTS
        if not kube.may(
            right.verb, right.resource, group=right.group, subresource=right.subresource
        )
    ]
    if missing:
        words = f"you may not {', '.join(missing)} in {kube.namespace}"
        yield Check("rights", "warn", words, "without them `tuneline doctor` sees less")
    else:
        yield Check("rights", "ok", f"you may read runs, pods, logs and events in {kube.namespace}")


def _secrets(recipe: Recipe, kube: Kube) -> Iterator[Check]:
    placement = recipe.placement
    present = kube.secret_names()
    wanted = list(placement.secrets)
    if placement.hub_token_secret:
        wanted.insert(0, placement.hub_token_secret)
    for name in wanted:
        if name in present:
            yield Check("secrets", "ok", f"{name} is there")
        else:
            words = f"there is no secret {name} in {kube.namespace}: steps start without it"
            yield Check("secrets", "warn", words, "manifests/secrets has the command to make one")
    for name in placement.image_pull_secrets:
        if name not in present:
            words = f"there is no image pull secret {name} in {kube.namespace}"
            yield Check("secrets", "fail", words, "manifests/secrets/registry.yaml says how to")


def _volumes(recipe: Recipe, kube: Kube) -> Iterator[Check]:
    placement = recipe.placement
    if placement.cache_claim:
        yield _claim(kube, "cache", placement.cache_claim, "cache_claim", "warn")
    if placement.num_nodes > 1 and placement.shared_claim:
        yield _claim(kube, "shared volume", placement.shared_claim, "shared_claim", "fail")


def _claim(kube: Kube, check: str, name: str, field: str, if_for_one_node: Verdict) -> Check:
    claim = kube.claim(name)
    if claim is None:
        words = f"there is no claim {name} in {kube.namespace}: pods would wait for it for ever"
        return Check(check, "fail", words, f"apply manifests/, or correct placement.{field}")
    modes = ", ".join(claim.spec.access_modes)
    words = f"{name} is {claim.status.phase}, {modes}, class {claim.spec.storage_class_name}"
    if claim.status.phase == "Lost":
        return Check(check, "fail", words, "its volume is gone: make the claim anew")
    if "ReadWriteMany" not in claim.spec.access_modes:
        advice = "pods that run side by side on several nodes need ReadWriteMany"
        return Check(check, if_for_one_node, words, advice)
    return Check(check, "ok", words)


def _queue(recipe: Recipe, kube: Kube) -> Iterator[Check]:
    name = recipe.placement.queue
    if name is None:
        return
    found = kube.local_queue(name)
    if found is None:
        words = f"there is no LocalQueue {name} in {kube.namespace}: pods would stay gated"
        yield Check("queue", "fail", words, "apply manifests/components/kueue, or correct the name")
        return
    conditions = found.get("status", {}).get("conditions", [])
    active = next((each for each in conditions if each["type"] == "Active"), None)
    if active is not None and active["status"] != "True":
        words = f"{name} takes nothing in: {active.get('message', active.get('reason', ''))}"
        yield Check("queue", "fail", words, "ask who runs Kueue about its ClusterQueue")
    else:
        waiting = found.get("status", {}).get("pendingWorkloads", 0)
        yield Check("queue", "ok", f"{name}: {waiting} waiting")


def _quota(recipe: Recipe, kube: Kube) -> Iterator[Check]:
    placement = recipe.placement
    if not placement.num_accelerators:
        return
    key = f"requests.{placement.accelerator}"
    for quota in kube.quotas():
        hard = (quota.status and quota.status.hard or quota.spec.hard or {}).get(key)
        if hard is None:
            continue
        used = float(((quota.status and quota.status.used) or {}).get(key, 0))
        words = f"{quota.metadata.name}: {used:g} of {hard} {placement.accelerator} in use"
        wanted = placement.num_accelerators * placement.num_nodes
        if float(hard) < wanted:
            advice = f"training asks for {wanted}: have the quota raised"
            yield Check("quota", "fail", words, advice)
        elif float(hard) - used < wanted:
            yield Check("quota", "warn", words, "steps are retried until some are given back")
        else:
            yield Check("quota", "ok", words)


def _nodes(recipe: Recipe, kube: Kube) -> Iterator[Check]:
    placement = recipe.placement
    if not placement.num_accelerators:
        return
    nodes = kube.nodes()
    fits, why = [], []
    for node in nodes:
        reason = _refusal(recipe, node)
        if reason:
            why.append(f"{node.metadata.name} {reason}")
        else:
            fits.append(node.metadata.name)
    wanted = f"{placement.num_accelerators} {placement.accelerator}"
    if len(fits) >= placement.num_nodes:
        yield Check("nodes", "ok", f"{len(fits)} of {len(nodes)} nodes fit {wanted}: {fits[0]}")
    else:
        found = "no node"
        if fits:
            found = f"only {len(fits)} of {placement.num_nodes} nodes that training takes"
        none = "there are no more" if fits else "there are none"
        words = f"{found} fits {wanted}: {'; '.join(why[:5]) or none}"
        advice = "another placement.profile, or a node pool that grows from zero"
        # A cluster autoscaler makes nodes that are not there yet.
        yield Check("nodes", "warn", words, advice)


def _refusal(recipe: Recipe, node: Any) -> str | None:
    """Say why a pod with an accelerator cannot run on an empty node."""
    placement = recipe.placement
    labels, capacity = node.metadata.labels or {}, node.status.allocatable or {}
    count = float(capacity.get(placement.accelerator, 0))
    if count < placement.num_accelerators:
        return f"has {count:g} {placement.accelerator}"
    product = labels.get(PRODUCT_LABEL)
    if placement.accelerator_products and product not in placement.accelerator_products:
        return f"has {product or 'no label ' + PRODUCT_LABEL}"
    for key, value in placement.node_selector.items():
        if labels.get(key) != value:
            return f"has {key}={labels.get(key)}"
    for resource in ("cpu", "memory"):
        request = getattr(placement.accelerated, f"{resource}_request")
        if request and quantity_value(capacity.get(resource, "0")) < quantity_value(request):
            return f"has {capacity.get(resource)} {resource}, less than {request}"
    for taint in node.spec.taints or []:
        tolerated = any(
            each.key == taint.key
            and each.effect in (None, taint.effect)
            and (each.operator == "Exists" or each.value == taint.value)
            for each in placement.tolerations
        )
        if taint.effect != "PreferNoSchedule" and not tolerated:
            return f"has the taint {taint.key}"
    return None
