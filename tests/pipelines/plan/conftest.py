"""A cluster for the checks of plan."""

import json
from typing import Any

import pytest
from plan_cases import ALL_IMAGES, CONTROLLER, NODE

from tuneline.pipelines.plan.cluster import CRDS


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask no Hub but a test's own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def cluster(kube_server: Any) -> Any:
    """A cluster that has everything."""
    for crd in CRDS:
        served = [{"name": "v1beta1", "served": True, "storage": True},
                  {"name": "v1alpha1", "served": False, "storage": False}]  # fmt: skip
        group = crd.partition(".")[2]
        names = {"plural": crd.partition(".")[0], "kind": "K"}
        spec = {"group": group, "scope": "Namespaced", "names": names, "versions": served}
        kube_server.put("customresourcedefinitions", crd, spec=spec)
    kube_server.put("secrets", "huggingface")
    claim = {"accessModes": ["ReadWriteMany"], "storageClassName": "nfs"}
    kube_server.put("persistentvolumeclaims", "cache", spec=claim, status={"phase": "Bound"})
    active = {"type": "Active", "status": "True"}
    kube_server.put("localqueues", "team", status={"conditions": [active], "pendingWorkloads": 3})
    hard = {"requests.nvidia.com/gpu": "8"}
    used = {"requests.nvidia.com/gpu": "2"}
    kube_server.put("resourcequotas", "q", spec={"hard": hard}, status={"hard": hard, "used": used})
    kube_server.put("nodes", "gpu-1", **NODE)
    # It has the images, and no GPU.
    kube_server.put("nodes", "cpu-1", status={"images": ALL_IMAGES})
    # As KFP 2.17.0 ships it.
    settings = json.loads(CONTROLLER.read_text(encoding="utf-8"))
    kube_server.put("configmaps", settings["metadata"]["name"], data=settings["data"])
    return kube_server
