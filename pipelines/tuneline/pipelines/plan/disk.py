"""Estimate the disk space of every pod, and the largest file that a step writes.

KFP downloads all inputs of a step before the step starts, and uploads the outputs after it. Both
lie on the node's disk and count as the pod's ephemeral storage. The rows of the dataset, logs and
records are small in comparison and not counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tuneline.gpu_profiles import LOCAL
from tuneline.html.units import parameters, size
from tuneline.kinds import EXPORT_KINDS
from tuneline.pipelines.kube import Kube
from tuneline.pipelines.kube_api import Refused
from tuneline.pipelines.plan.check import Check
from tuneline.pipelines.plan.estimate import llama_shape
from tuneline.placement import quantity_value
from tuneline.quantize.formats import FORMATS
from tuneline.recipe import Recipe
from tuneline.runtime.source_names import is_hub_id

WEIGHT_BYTES = 2
"""Bytes per parameter of base model, merged model and f16 file."""
ADAPTER_BYTES = 4
"""Bytes per parameter of the adapter."""
POD_BYTES = 0.3e9
"""Size of the programs that Argo and KFP copy into every pod; 294 MB measured on KFP 2.17."""
MAX_FILE_BYTES = 10_000 * 5 * 2**20
"""Largest file that KFP 2.17 can upload to S3: an upload has at most 10,000 parts, and KFP's client
(gocloud.dev/blob over the AWS SDK) makes parts of 5 MiB of a stream whose size it does not know.
Google Cloud Storage has no such limit."""
NUM_CONTAINERS = 2
"""Containers of a KFP pod: the step's and Argo's. A limit range gives each of them its limit, and
the kubelet compares the sum of the limits with what the pod uses."""
STORAGE = "ephemeral-storage"


@dataclass(frozen=True)
class PodDisk:
    """Estimated disk space of one pod, in bytes."""

    step: str
    num_bytes: float


def pod_disks(recipe: Recipe, num_parameters: float) -> list[PodDisk]:
    """Estimate inputs, outputs and temporary files of every pod that holds a model."""
    model = WEIGHT_BYTES * num_parameters
    adapter = ADAPTER_BYTES * llama_shape(num_parameters, recipe.train.lora).num_adapter
    sizes = {
        kind: [_export_bytes(name, num_parameters) for name in getattr(recipe.quantize, kind)]
        for kind in EXPORT_KINDS
    }
    # Without a claim, the Hub's client keeps its download in the pod beside the artifact.
    downloads = is_hub_id(recipe.base_model) and not recipe.placement.cache_claim
    uploads = adapter + model + sum(sum(exports) for exports in sizes.values())
    # A directory on another file system gets copies; a push to the Hub takes hard links.
    copies = 1 + sum(target.kind == "directory" for target in recipe.targets)
    train = "train" if recipe.placement.num_nodes == 1 else "train-on-nodes"
    pods = {
        "fetch": 2 * model if downloads else model,
        "prepare": model,
        "evaluate": model,
        train: model + adapter,
        "merge": model + adapter + model,
        "publish": copies * uploads,
    }
    if any(sizes.values()):
        pods["check-exports"] = model
    if sizes["gguf"]:
        pods["convert-gguf"] = model + model
        pods["quantize-gguf"] = model + model + max(sizes["gguf"])
        if recipe.quantize.num_importance_rows:
            pods["measure-importance"] = model
    for kind in EXPORT_KINDS:
        if sizes[kind] and kind != "gguf":
            pods[f"quantize-{kind}"] = model + max(sizes[kind])
    return [PodDisk(step, POD_BYTES + num_bytes) for step, num_bytes in pods.items()]


def check_files(recipe: Recipe, num_parameters: float, *, has_pods: bool) -> Iterator[Check]:
    """Check that KFP can upload every file; local runs upload none.

    All weights but those of a GGUF file and of an adapter are in several files. A GGUF file could
    be split too, but Ollama does not load the parts.
    """
    shape = llama_shape(num_parameters, recipe.train.lora)
    files: dict[str, tuple[str, float, str]] = {}
    files["train"] = ("the adapter", ADAPTER_BYTES * shape.num_adapter, "lower train.lora.r")
    if recipe.quantize.gguf:
        words = "f16, from which all GGUF formats are made"
        most = parameters(MAX_FILE_BYTES / WEIGHT_BYTES)
        advice = (
            "set quantize.gguf to [] (checkpoints are several files), or take a base model of "
            f"at most {most} parameters"
        )
        files["convert-gguf"] = (words, WEIGHT_BYTES * num_parameters, advice)
    for step, (what, num_bytes, advice) in files.items():
        if num_bytes <= MAX_FILE_BYTES:
            continue
        on_cluster = has_pods or recipe.placement.profile != LOCAL
        yield Check(
            "file size",
            "fail" if on_cluster else "warn",
            f"{step} writes one file of {size(num_bytes)} ({what}), but KFP uploads at most "
            f"{size(MAX_FILE_BYTES)} per file to S3",
            advice,
        )


def check_disks(recipe: Recipe, num_parameters: float, kube: Kube | None) -> Iterator[Check]:
    """Compare the disk space of the pods with the limit ranges and the nodes of a cluster."""
    pods = sorted(pod_disks(recipe, num_parameters), key=lambda pod: -pod.num_bytes)
    summary = f"at most {size(pods[0].num_bytes)}, by {pods[0].step}"
    if kube is None:
        yield Check("disk", "ok", summary)
        return
    refusal = ""
    limit = None
    try:
        limit = _limit(kube)
    except Refused as error:
        refusal = str(error)
    node = _largest_node(kube)
    too_large = False
    for pod in pods:
        needs = f"{pod.step} needs {size(pod.num_bytes)}"
        if limit is not None and pod.num_bytes > limit:
            words = f"{needs}, but the namespace's limit range gives a pod {size(limit)}"
            advice = f"raise the limit range's default {STORAGE}"
            yield Check("disk", "fail", words, advice)
        elif node is not None and pod.num_bytes > node:
            # Only a warning, because a cluster autoscaler may add larger nodes.
            words = f"{needs}, but the largest node has {size(node)}"
            yield Check("disk", "warn", words, "add nodes with larger disks")
        else:
            continue
        too_large = True
    if refusal:
        yield Check("disk", "unknown", f"{summary}; {refusal}")
    elif not too_large:
        yield Check("disk", "ok", summary)


def _export_bytes(name: str, num_parameters: float) -> float:
    return num_parameters * FORMATS[name].bits_per_weight / 8


def _limit(kube: Kube) -> float | None:
    """Return the disk space that the namespace's limit ranges give a pod of KFP, or None."""
    limits = []
    for limit_range in kube.limit_ranges():
        for item in limit_range.spec.limits:
            if item.type == "Container" and STORAGE in (item.default or {}):
                limits.append(NUM_CONTAINERS * quantity_value(item.default[STORAGE]))
            if item.type == "Pod" and STORAGE in (item.max or {}):
                limits.append(quantity_value(item.max[STORAGE]))
    return min(limits, default=None)


def _largest_node(kube: Kube) -> float | None:
    """Return the largest disk space that a node has for pods, or None if it cannot be seen."""
    try:
        nodes = kube.nodes()
    except Refused:
        return None
    sizes = [(node.status.allocatable or {}).get(STORAGE) for node in nodes]
    return max((quantity_value(text) for text in sizes if text), default=None)
