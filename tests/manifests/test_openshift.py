"""What OpenShift's constraint restricted-v2 refuses: a user or group that is not its own choice."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import compiler
from kubectl import KUBECTL

from tuneline.pipelines.catalog import RECIPES_DIR
from tuneline.pipelines.finetune import finetune
from tuneline.pipelines.placement import nodes_config
from tuneline.placement import PlacementConfig
from tuneline.recipe import load_recipe
from tuneline.serving.inference_service import Container, Resources, inference_service
from tuneline.train.trainjob.manifest import build

ROOT = Path(__file__).parents[2]
CHOSEN = {"runAsUser", "runAsGroup", "fsGroup", "supplementalGroups", "seLinuxOptions"}
"""Fields of which restricted-v2 accepts only values in the ranges of the namespace."""


def chosen(node: Any, path: str = "") -> Iterator[str]:
    """Yield the path of every such field."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in CHOSEN:
                yield f"{path}.{key}"
            yield from chosen(value, f"{path}.{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from chosen(value, f"{path}[{index}]")


def test_no_task_names_a_user_if_the_platform_chooses(tmp_path: Path) -> None:
    for user, found in ((None, False), (65532, True)):
        recipe = load_recipe(RECIPES_DIR / "demo.yaml", {"placement.run_as_user": user})
        compiler.Compiler().compile(finetune(recipe), str(tmp_path / "pipeline.yaml"))
        _, platform = yaml.safe_load_all((tmp_path / "pipeline.yaml").read_text(encoding="utf-8"))
        assert bool(list(chosen(platform))) == found
        executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        assert all(each["securityContext"]["runAsNonRoot"] for each in executors.values())


@pytest.mark.parametrize("field", ["podSpecOverrides", "podTemplateOverrides", "runtimePatches"])
def test_no_trainjob_and_no_service_does_either(field: str) -> None:
    values = {"num_nodes": 2, "shared_claim": "c", "run_as_user": None}
    placement = PlacementConfig.parse(values)
    job = build(nodes_config(placement), name="n", directory=Path("/shared/n"), labels={},
                owner=None, supported={field})  # fmt: skip
    assert list(chosen(job)) == []
    server = Container("i:1", [], [], Resources(("1", "1"), (1e9, 1e9)))
    service = inference_service("s", server, uris={}, placement=placement)
    assert list(chosen(service)) == []


def rendered(directory: Path) -> list[dict[str, Any]]:
    done = subprocess.run(
        [KUBECTL, "kustomize", directory], capture_output=True, text=True, check=True
    )
    return list(yaml.safe_load_all(done.stdout))


def test_the_component_removes_what_collides(tmp_path: Path) -> None:
    plain = rendered(ROOT / "manifests" / "overlays" / "kubeflow")
    assert list(chosen(plain)), "nothing collides any more: delete the component"
    manifests = os.path.relpath(ROOT / "manifests", tmp_path.resolve())
    overlay = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [f"{manifests}/overlays/kubeflow"],
        "components": [f"{manifests}/components/openshift"],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    changed = rendered(tmp_path)
    assert list(chosen(changed)) == []
    assert [each["metadata"]["name"] for each in changed] == [
        each["metadata"]["name"] for each in plain
    ]
