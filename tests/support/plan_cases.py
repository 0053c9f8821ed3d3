"""Recipes and a cluster for the tests of plan."""

from pathlib import Path

from tuneline import images
from tuneline.pipelines import kube
from tuneline.pipelines.catalog import find_recipe
from tuneline.pipelines.plan.check import Check
from tuneline.pipelines.plan.plan import plan
from tuneline.recipe import Recipe

LLAMA = 8.03e9


def recipe(*assignments: str, profile: str = "h100") -> Recipe:
    return find_recipe("llama3-8b-instruct", [f"placement.profile={profile}", *assignments])


def verdicts(checks: list[Check]) -> dict[str, str]:
    order = ("ok", "unknown", "warn", "fail")
    worst: dict[str, str] = {}
    for check in checks:
        known = worst.get(check.name, "ok")
        worst[check.name] = max(known, check.verdict, key=order.index)
    return worst


CLUSTER = recipe("placement.cache_claim=cache", "placement.queue=team")
ALL_IMAGES = [
    {"names": [f"docker.io/{name}", f"docker.io/{name.partition(':')[0]}@sha256:{'0' * 64}"]}
    for name in (images.LIGHT, images.TRAIN, images.EVALUATE, images.PUBLISH, images.GGUF,
                 images.GPTQ)
]  # fmt: skip
NODE = {
    "spec": {"taints": [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}]},
    "status": {
        "allocatable": {"nvidia.com/gpu": "8", "cpu": "200", "memory": "2000Gi"},
        "images": ALL_IMAGES,
    },
    "metadata": {"labels": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}},
}


CONTROLLER = Path(__file__).parents[1] / "data/kfp-2.17/workflow-controller-configmap.json"


def look(loaded: Recipe = CLUSTER) -> list[Check]:
    return plan(loaded, kube=kube.Kube("kubeflow"))
