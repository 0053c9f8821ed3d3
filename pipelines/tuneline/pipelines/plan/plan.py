"""Say no before a GPU is asked for: what a recipe will take, and whether a cluster has it."""

from collections.abc import Iterator

from tuneline.html.units import duration, parameters, size
from tuneline.pipelines.kube import Kube
from tuneline.pipelines.needs import memory_of
from tuneline.pipelines.plan.check import Check, Verdict
from tuneline.pipelines.plan.cluster import check_cluster
from tuneline.pipelines.plan.estimate import GPU_BYTES, Estimate, estimate, parameters_in_name
from tuneline.pipelines.plan.host_memory import host_memory
from tuneline.placement import FUSED, quantity_value
from tuneline.recipe import Recipe
from tuneline.train.batch_size import batch_size
from tuneline.train.memory.estimate import GIB

CERTAINLY = 1.5
"""So many times a limit an estimate must be to say no: it knows a model by its name only."""


def plan(
    recipe: Recipe,
    *,
    num_parameters: float | None = None,
    price_per_gpu_hour: float | None = None,
    kube: Kube | None = None,
    account: str | None = None,
    is_step: bool = False,
) -> list[Check]:
    """Check a recipe, by itself and, where one is given, against a cluster.

    Args:
        recipe: with the placement that it will run with.
        num_parameters: of the base model; None reads them off its name.
        price_per_gpu_hour: in any currency; None: the recipe's train.price_per_hour.
        kube: the cluster.
        account: the service account that the run will have; None: not known.
        is_step: the credentials are the run's own.

    Raises:
        ClusterError: the cluster cannot be reached.
    """
    num_parameters = num_parameters or parameters_in_name(recipe.base_model)
    checks = [*_ranks(recipe), *_checkpoints(recipe)]
    checks += _kernels(recipe, has_pods=kube is not None)
    if num_parameters is None:
        advice = "give --parameters, e.g. 8e9"
        words = f"the name {recipe.base_model} does not say how many parameters it has"
        checks.append(Check("estimate", "unknown", words, advice))
    else:
        price = recipe.train.price_per_hour if price_per_gpu_hour is None else price_per_gpu_hour
        checks += _resources(recipe, estimate(recipe, num_parameters), price)
        checks += _host_memory(recipe, num_parameters, has_pods=kube is not None)
    if kube is not None:
        checks += check_cluster(recipe, kube, account=account, is_step=is_step)
    return checks


def _ranks(recipe: Recipe) -> Iterator[Check]:
    """Check that ranks can divide the global batch; the train step would refuse hours later."""
    batch = batch_size(recipe.train, recipe.num_ranks)
    words = f"{batch.num_ranks} ranks and a global batch of {batch.global_batch_size} examples"
    if not batch.divides:
        yield Check("ranks", "fail", f"{words}, which they cannot divide equally", batch.advice)
    elif batch.num_ranks > 1:
        yield Check("ranks", "ok", words)
    if batch.deprecation:
        words, _, advice = batch.deprecation.partition(": ")
        yield Check("batch size", "warn", words, advice)


def _checkpoints(recipe: Recipe) -> Iterator[Check]:
    placement = recipe.placement
    if placement.num_accelerators and not (placement.shared_claim or placement.cache_claim):
        words = "a retry of train begins anew, as its checkpoints go with the pod"
        advice = "name a claim in placement.shared_claim or placement.cache_claim"
        yield Check("checkpoints", "warn", words, advice)


def _kernels(recipe: Recipe, *, has_pods: bool) -> Iterator[Check]:
    """Say where our kernels cannot run; a GPU too old for fp8 the recipe itself refuses."""
    kernels, placement = recipe.train.kernels, recipe.placement
    on_cluster = has_pods or placement.profile != "local"
    if kernels == "fp8" and on_cluster and not placement.num_accelerators:
        words = "train.kernels is fp8, which needs a GPU, and placement.num_accelerators is 0"
        yield Check("kernels", "fail", words, "take train.kernels auto, or placement.profile h100")
    elif kernels == "auto" and placement.profile in GPU_BYTES and placement.profile not in FUSED:
        words = f"PyTorch's own: {placement.profile} is older than Ampere, from which ours run"
        yield Check("kernels", "ok", words)


def _resources(recipe: Recipe, found: Estimate, price: float | None) -> Iterator[Check]:
    placement = recipe.placement
    what = f"{parameters(found.num_parameters)} parameters, {found.length} tokens a row"
    available = GPU_BYTES.get(placement.profile)
    needs = f"{found.gpu_bytes / GIB:.1f} GiB to train ({what})"
    if available is None:
        yield Check("GPU memory", "ok", f"{needs}; profile local names no GPU")
    else:
        words = f"{needs}, of {available / GIB:.1f} GiB on {placement.profile}"
        least = f"{found.least_gpu_bytes / GIB:.1f} GiB"
        if found.gpu_bytes <= 0.9 * available:
            yield Check("GPU memory", "ok", words)
        elif found.least_gpu_bytes <= 0.9 * available:
            advice = f"train uses smaller micro-batches and recomputation, down to {least}"
            yield Check("GPU memory", "warn", words, advice)
        else:
            verdict = _verdict(found.least_gpu_bytes, available)
            advice = "lower prepare.max_seq_length or train.lora.r, or take a larger GPU"
            yield Check("GPU memory", verdict, f"{words}; {least} at the least", advice)
    yield Check("artifacts", "ok", f"{size(found.artifact_bytes)} kept by a run")
    scratch = f"{size(found.scratch_bytes)} on the disk of the largest step"
    if placement.scratch_size and quantity_value(placement.scratch_size) < found.scratch_bytes:
        advice = "raise placement.scratch_size"
        words = f"{scratch}, and placement.scratch_size is {placement.scratch_size}"
        verdict = _verdict(found.scratch_bytes, quantity_value(placement.scratch_size))
        yield Check("disk", verdict, words, advice)
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
        verdict = _verdict(found.hours, limit)
        yield Check("time", verdict, f"{words}; the step is ended after {limit:g} h", advice)
    else:
        yield Check("time", "ok", words)
    bill = f"{found.gpu_hours:.2f} GPU hours of training"
    if price is not None:
        bill += f", {found.gpu_hours * price:.2f} at {price:g} an hour"
    yield Check("cost", "ok", bill)


def _host_memory(recipe: Recipe, num_parameters: float, *, has_pods: bool) -> Iterator[Check]:
    """Hold steps on a CPU against their pods' memory, which only a cluster keeps them to."""
    found = host_memory(recipe, num_parameters)
    fits = True
    for each in found:
        request, limit = memory_of(each.step, recipe.placement)
        own, files = f"{each.own_bytes / GIB:.1f} GiB", f"{each.mapped_bytes / GIB:.1f} GiB"
        setting = f"placement.steps.{each.step}.memory"
        if each.own_bytes > quantity_value(limit):
            verdict = _verdict(each.own_bytes, quantity_value(limit))
            words, advice = f"of at most {limit}", f"raise {setting}_limit"
            verdict = verdict if has_pods or recipe.placement.profile != "local" else "warn"
        elif each.own_bytes > quantity_value(request):
            words, advice = f"and requests {request}", f"raise {setting}_request"
            verdict = "warn"
        elif each.own_bytes + each.mapped_bytes > quantity_value(limit):
            words = f"of {limit}: files of {files} are read again at every pass"
            verdict, advice = "warn", f"raise {setting}_limit to save hours"
        else:
            continue
        fits = False
        yield Check("memory", verdict, f"{each.step} takes {own} {words}", advice)
    if found and fits:
        most = max(found, key=lambda each: each.own_bytes)
        words = f"{most.own_bytes / GIB:.1f} GiB at the most, by {most.step}"
        yield Check("memory", "ok", f"{words}, of {memory_of(most.step, recipe.placement)[1]}")


def _verdict(estimate: float, limit: float) -> Verdict:
    """Judge what is over a limit: a run is ended for what the estimate's own error cannot be."""
    return "fail" if estimate > CERTAINLY * limit else "warn"
