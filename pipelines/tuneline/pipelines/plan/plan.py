"""The checks before a run: estimate what a run of a recipe needs, and compare it with the limits.

The estimates are compared with the limits of the recipe's placement. With access to a cluster, the
objects and rights that the run needs there are checked too.
"""

import urllib.request
from collections.abc import Iterator

from tuneline.errors import DataError
from tuneline.gpu_profiles import GPU_PROFILES, LOCAL, fp8_profiles
from tuneline.html.units import duration, parameters, size
from tuneline.images import LOCAL as IMAGES_ON_NODES
from tuneline.images import origin_in_words
from tuneline.pipelines.inputs import local_problems, prepare_upload
from tuneline.pipelines.kube import Kube
from tuneline.pipelines.needs import memory_of
from tuneline.pipelines.plan.base_model import BaseModel, check_base_model
from tuneline.pipelines.plan.check import Check, Verdict
from tuneline.pipelines.plan.cluster import check_cluster
from tuneline.pipelines.plan.disk import check_disks, check_files
from tuneline.pipelines.plan.early import check_early
from tuneline.pipelines.plan.estimate import (
    MEMORY_FRACTION,
    Estimate,
    estimate,
    parameters_in_name,
)
from tuneline.pipelines.plan.host_memory import host_memory
from tuneline.pipelines.plan.model_facts import ModelFacts
from tuneline.pipelines.plan.optimizer_steps import check_optimizer_steps
from tuneline.pipelines.plan.power import check_power
from tuneline.placement import quantity_value
from tuneline.recipe import Recipe
from tuneline.train.batch_size import batch_size
from tuneline.train.memory.estimate import GIB

KFP_HOSTS = ("ml-pipeline.kubeflow.svc.cluster.local", "seaweedfs.kubeflow")
"""Services that KFP 2.17's launcher connects to from the pods of a run, by name."""
FAIL_FACTOR = 1.5
"""Multiple of a limit above which an estimate fails the plan. Estimates between the two values only
give a warning, because an estimate from the number of parameters alone is not exact."""
FAIL_FACTOR_KNOWN = 1.15
"""The same for the GPU memory of a model whose layers and widths are known: measured peaks are
within 4 % of the estimate."""


def plan(
    recipe: Recipe,
    *,
    num_parameters: float | None = None,
    model: BaseModel | None = None,
    price_per_gpu_hour: float | None = None,
    kube: Kube | None = None,
    account: str | None = None,
    is_step: bool = False,
    uploads_to_s3: bool = True,
    looks_up: bool = False,
) -> list[Check]:
    """Check a recipe by itself and, if `kube` is given, against a cluster.

    Args:
        recipe: the recipe, with the placement that it will run with.
        num_parameters: parameters of the base model; None: those of `model`, or the number in the
            model's name.
        model: what is known of the base model; None: do not check it.
        price_per_gpu_hour: in any currency; None: train.price_per_hour of the recipe.
        kube: the cluster; None: check the recipe only.
        account: service account that the run will use; None if it is not known.
        is_step: whether `kube` uses the credentials of the run itself.
        uploads_to_s3: whether KFP stores artifacts in S3, or in a store with its API.
        looks_up: whether to look at what the recipe names: model, data and target. The steps of a
            run do that themselves.

    Raises:
        ClusterError: the cluster cannot be reached.
    """
    facts = model.facts if model is not None and num_parameters is None else None
    if facts is not None:
        num_parameters = facts.num_parameters
    num_parameters = num_parameters or parameters_in_name(recipe.base_model)
    on_cluster = kube is not None or recipe.placement.profile != LOCAL
    checks = check_early(recipe, is_local=not on_cluster) if looks_up else []
    if looks_up and on_cluster and kube is None:
        checks.append(_images(recipe))
    checks += [*_ranks(recipe), *check_optimizer_steps(recipe), *_checkpoints(recipe)]
    checks += _data(recipe, has_pods=kube is not None)
    checks += [*_untried_gpu(recipe), *_kernels(recipe, has_pods=kube is not None)]
    checks += [*check_power(recipe), *_proxy(recipe)]
    if model is not None and model.refusal not in {check.words for check in checks}:
        checks += check_base_model(recipe, num_parameters, model)
    if num_parameters is None:
        advice = "pass --parameters, e.g. --parameters 8e9"
        words = f"the name {recipe.base_model} does not give the number of parameters"
        words += f", and {model.reason}" if model is not None and model.reason else ""
        checks.append(Check("estimate", "unknown", words, advice))
    else:
        price = recipe.train.price_per_hour if price_per_gpu_hour is None else price_per_gpu_hour
        checks += _resources(recipe, estimate(recipe, num_parameters, facts), price, facts)
        checks += _host_memory(recipe, num_parameters, facts, has_pods=kube is not None)
        if uploads_to_s3:
            checks += check_files(recipe, num_parameters, has_pods=kube is not None)
    if kube is not None:
        checks += check_cluster(recipe, kube, account=account, is_step=is_step)
    if num_parameters is not None:
        checks += check_disks(recipe, num_parameters, kube)
    return checks


def _images(recipe: Recipe) -> Check:
    """Say where the nodes get the images; with a cluster, `check_cluster` looks for them there."""
    registry = recipe.placement.registry
    if registry is not None:
        return Check("images", "ok", origin_in_words(registry))
    words = "the recipe does not say where the nodes get the images, so `submit` refuses it"
    advice = f"set placement.registry to your registry, or to {IMAGES_ON_NODES}"
    return Check("images", "warn", words, f"{advice} if the nodes have them")


def _ranks(recipe: Recipe) -> Iterator[Check]:
    """Check that the ranks can divide the global batch; train would find that hours later."""
    batch = batch_size(recipe.train, recipe.num_ranks)
    words = f"{batch.num_ranks} ranks and a global batch of {batch.global_batch_size} examples"
    if not batch.divides:
        yield Check("ranks", "fail", f"{words}, which they cannot divide equally", batch.advice)
    elif batch.num_ranks > 1:
        yield Check("ranks", "ok", words)
    if batch.deprecation:
        words, _, advice = batch.deprecation.partition(": ")
        yield Check("batch size", "warn", words, advice)


def _data(recipe: Recipe, *, has_pods: bool) -> Iterator[Check]:
    """Check that the pods can read the data and the model that are on this machine."""
    if not (has_pods or recipe.placement.profile != LOCAL):
        return
    try:
        upload = prepare_upload(recipe)
    except DataError as error:
        words, _, advice = str(error).partition(": ")
        yield Check("data", "fail", words, advice)
        return
    if upload.archive is not None:
        words = f"`tuneline submit` sends {', '.join(upload.files)} with the run"
        yield Check("data", "ok", words, "other ways to start a run need a store or a claim")
    for problem in local_problems(upload.recipe):
        words, _, advice = problem.partition(": ")
        yield Check("data", "fail", words, advice)


def _proxy(recipe: Recipe) -> Iterator[Check]:
    """Check that KFP's launcher in the pods does not ask a proxy for the services of KFP."""
    placement = recipe.placement
    proxies = placement.proxies
    # A value that only a secret has is not seen here.
    if not proxies or not placement.no_proxy:
        return
    hosts = {"no": placement.no_proxy}
    asked = [name for name in KFP_HOSTS if not urllib.request.proxy_bypass(name, hosts)]
    if asked:
        words = f"with {proxies[0]}, KFP's launcher asks the proxy for {' and '.join(asked)}"
        advice = "add .svc,.cluster.local,.kubeflow to NO_PROXY in placement.environment"
        yield Check("proxy", "warn", words, advice)
    else:
        words = (
            f"{', '.join(proxies)} without the services of KFP. NO_PROXY must hold the address of "
            "the Kubernetes API too, which is the first one of the cluster's service range"
        )
        yield Check("proxy", "ok", words)


def _checkpoints(recipe: Recipe) -> Iterator[Check]:
    placement = recipe.placement
    if placement.num_accelerators and not (placement.shared_claim or placement.cache_claim):
        words = "if the pod of train disappears, its checkpoints do too, and the retry starts over"
        advice = "set placement.shared_claim or placement.cache_claim to a claim"
        yield Check("checkpoints", "warn", words, advice)


def _untried_gpu(recipe: Recipe) -> Iterator[Check]:
    """Warn of a GPU on which tuneline never ran and for which it has no images."""
    profile = recipe.placement.profile
    gpu = GPU_PROFILES.get(profile)
    if gpu is not None and gpu.capability is None:
        words = (
            f"{profile} is declared from its data sheet, and tuneline never ran on a GPU of AMD: "
            "the images have PyTorch for CUDA, which does not find it; bitsandbytes (4-bit base, "
            "8-bit optimizer) and GPTQ were not tried on ROCm, and tuneline's kernels are off there"
        )
        advice = "build images with PyTorch, Triton and bitsandbytes for ROCm, or take another GPU"
        yield Check("GPU", "warn", words, advice)


def _kernels(recipe: Recipe, *, has_pods: bool) -> Iterator[Check]:
    """Check whether tuneline's kernels run on the recipe's placement.

    fp8 on a GPU that does not support it is not checked here: such a recipe cannot be loaded.
    """
    kernels, placement = recipe.train.kernels, recipe.placement
    gpu = GPU_PROFILES.get(placement.profile)
    on_cluster = has_pods or placement.profile != LOCAL
    if kernels == "fp8" and on_cluster and not placement.num_accelerators:
        words = "train.kernels is fp8, which needs a GPU, but placement.num_accelerators is 0"
        profiles = " or ".join(fp8_profiles())
        advice = f"set train.kernels to auto, or placement.profile to {profiles}"
        yield Check("kernels", "fail", words, advice)
    elif kernels == "auto" and gpu is not None and not gpu.runs_kernels:
        why = "is AMD's" if gpu.capability is None else "is older than Ampere"
        words = f"PyTorch's, because {placement.profile} {why}"
        yield Check("kernels", "ok", words)


def _resources(
    recipe: Recipe, estimated: Estimate, price: float | None, facts: ModelFacts | None
) -> Iterator[Check]:
    factor = FAIL_FACTOR if facts is None else FAIL_FACTOR_KNOWN
    yield _gpu_memory(recipe, estimated, factor)
    yield Check("artifacts", "ok", f"the run keeps {size(estimated.artifact_bytes)}")
    yield from _time(recipe, estimated, price)


def _gpu_memory(recipe: Recipe, estimated: Estimate, fail_factor: float) -> Check:
    what = f"{parameters(estimated.num_parameters)} parameters, {estimated.length} tokens per row"
    needs = f"{estimated.gpu_bytes / GIB:.1f} GiB to train ({what})"
    gpu = GPU_PROFILES.get(recipe.placement.profile)
    if gpu is None:
        return Check(
            "GPU memory", "ok", f"{needs}; profile {recipe.placement.profile} names no GPU"
        )
    words = f"{needs}, of {gpu.memory_bytes / GIB:.1f} GiB on {recipe.placement.profile}"
    least = f"{estimated.least_gpu_bytes / GIB:.1f} GiB"
    if estimated.gpu_bytes <= MEMORY_FRACTION * gpu.memory_bytes:
        return Check("GPU memory", "ok", words)
    if estimated.single_gpu_bytes <= MEMORY_FRACTION * gpu.memory_bytes:
        single = f"{estimated.single_gpu_bytes / GIB:.1f} GiB"
        advice = f"train will use smaller micro-batches, and more per step, down to {single}"
        return Check("GPU memory", "warn", words, advice)
    if estimated.least_gpu_bytes <= MEMORY_FRACTION * gpu.memory_bytes:
        advice = (
            "train will use micro-batches of 1 and, if these are not enough, keep the input "
            f"embedding and the head in host memory, down to {least}"
        )
        return Check("GPU memory", "warn", words, advice)
    verdict = _verdict(estimated.least_gpu_bytes, gpu.memory_bytes, fail_factor)
    advice = "lower prepare.max_seq_length or train.lora.r, or take a larger GPU"
    return Check("GPU memory", verdict, f"{words}; at least {least}", advice)


def _time(recipe: Recipe, estimated: Estimate, price: float | None) -> Iterator[Check]:
    cap = recipe.train.max_cost
    if cap is not None and price and (estimated.gpu_hours is None):
        words = f"training stops at {cap:g} (train.max_cost): after {cap / price:.4g} device hours"
        yield Check("cost", "ok", f"{words} at {price:g} per hour")
    if estimated.tokens_per_second is None:
        return
    speed = f"{estimated.tokens_per_second:,.0f} tokens per second and GPU"
    if estimated.speed_note:
        speed += f" ({estimated.speed_note})"
    if estimated.hours is None or estimated.gpu_hours is None:
        yield Check("time", "ok", f"{speed}; the number of tokens is known only with the data")
        return
    words = f"{duration(estimated.hours * 3600)} of training, at {speed}"
    words += f" on {estimated.num_gpus} GPUs at best" if estimated.num_gpus > 1 else ""
    steps = recipe.placement.steps
    limit = steps["train"].timeout_hours if "train" in steps else None
    if limit is not None and limit < estimated.hours:
        advice = "raise placement.steps.train.timeout_hours"
        verdict = _verdict(estimated.hours, limit)
        yield Check("time", verdict, f"{words}; the step is ended after {limit:g} h", advice)
    else:
        yield Check("time", "ok", words)
    bill = f"{estimated.gpu_hours:.2f} GPU hours of training"
    if price is None:
        yield Check("cost", "ok", bill)
        return
    cost = estimated.gpu_hours * price
    bill += f", {cost:.2f} at {price:g} per GPU hour"
    if cap is None or cost <= cap:
        yield Check("cost", "ok", bill if cap is None else f"{bill}, of {cap:g} (train.max_cost)")
        return
    advice = "raise train.max_cost, or lower train.num_train_epochs or train.max_steps"
    yield Check("cost", _verdict(cost, cap), f"{bill}; train stops at {cap:g}", advice)


def _host_memory(
    recipe: Recipe, num_parameters: float, facts: ModelFacts | None, *, has_pods: bool
) -> Iterator[Check]:
    """Compare the memory of steps on a CPU with their pods' limits; local runs have no limits.

    Args:
        recipe: the recipe.
        num_parameters: parameters of the base model.
        facts: sizes of the base model, if they are known.
        has_pods: whether the steps run in pods.
    """
    estimates = host_memory(recipe, num_parameters, facts)
    fits = True
    for step in estimates:
        request, limit = memory_of(step.step, recipe.placement)
        process, files = f"{step.own_bytes / GIB:.1f} GiB", f"{step.mapped_bytes / GIB:.1f} GiB"
        setting = f"placement.steps.{step.step}.memory"
        if step.own_bytes > quantity_value(limit):
            verdict = _verdict(step.own_bytes, quantity_value(limit))
            words, advice = f"but its limit is {limit}", f"raise {setting}_limit"
            verdict = verdict if has_pods or recipe.placement.profile != LOCAL else "warn"
        elif step.own_bytes > quantity_value(request):
            words, advice = f"but requests {request}", f"raise {setting}_request"
            verdict = "warn"
        elif step.own_bytes + step.mapped_bytes > quantity_value(limit):
            words = f"of {limit}: its files of {files} do not fit and are read again in every pass"
            verdict, advice = "warn", f"raise {setting}_limit to save hours"
        else:
            continue
        fits = False
        yield Check("memory", verdict, f"{step.step} needs {process} {words}", advice)
    if estimates and fits:
        most = max(estimates, key=lambda step: step.own_bytes)
        limit = memory_of(most.step, recipe.placement)[1]
        words = f"at most {most.own_bytes / GIB:.1f} GiB, by {most.step}, of {limit}"
        yield Check("memory", "ok", words)


def _verdict(estimate: float, limit: float, fail_factor: float = FAIL_FACTOR) -> Verdict:
    """Return the verdict on an estimate that exceeds a limit."""
    return "fail" if estimate > fail_factor * limit else "warn"
