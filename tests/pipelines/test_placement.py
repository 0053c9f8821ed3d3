"""What compiled tasks ask of the cluster, read from the YAML that a cluster gets."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import compiler

from tuneline import images
from tuneline.errors import RecipeError
from tuneline.pipelines.catalog import RECIPES_DIR
from tuneline.pipelines.finetune import finetune
from tuneline.pipelines.lint.lint import lint_documents
from tuneline.pipelines.placement import nodes_config
from tuneline.placement import CA_VARIABLES, PlacementConfig
from tuneline.recipe import load_recipe
from tuneline.train.checkpoints import ROOT_VARIABLE
from tuneline.train.trainjob.manifest import build
from tuneline.version import VERSION

GPU_STEPS = {"train", "merge", "quantize-gptq", "evaluate", "evaluate-2"}
LOOK_UPS = {"look-up-model", "look-up-data", "look-up-published"}
HUB_STEPS = {
    *("fetch", "prepare", "collect-benchmarks", "evaluate", "evaluate-2", "publish"),
    *LOOK_UPS,
}

EVERYTHING = {
    "profile": "a100-80g",
    "num_accelerators": 2,
    "node_selector": {"pool": "tuning"},
    "tolerations": [
        {"key": "nvidia.com/gpu"},
        {"key": "team", "operator": "Equal", "value": "nlp", "effect": "NoExecute"},
    ],
    "steps": {
        "train": {"memory_request": "200Gi", "timeout_hours": 1.5, "num_retries": 0},
        "fetch": {"cpu_limit": "500m"},
    },
    "scratch_size": "300Gi",
    "cache_claim": "tuneline-model-cache",
    "secrets": {"object-store": {"id": "AWS_ACCESS_KEY_ID", "key": "AWS_SECRET_ACCESS_KEY"}},
    "image_pull_secrets": ["registry"],
    "environment": {"HF_ENDPOINT": "https://hub.example.com"},
    "ca_bundle": {"config_map": "company-ca", "key": "ca-bundle.crt"},
    "queue": "tuneline",
    "workload_priority_class": "tuneline-batch",
}

NODE_KEYS = ("environment", "ca_bundle")


def compiled(placement: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    recipe = load_recipe(RECIPES_DIR / "llama3-8b-instruct.yaml", {"placement": placement})
    compiler.Compiler().compile(finetune(recipe), str(path))
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return compiled(EVERYTHING, tmp_path_factory.mktemp("placement") / "pipeline.yaml")


@pytest.fixture(scope="module")
def containers(everything: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    executors = everything[0]["deploymentSpec"]["executors"]
    return {name.removeprefix("exec-"): found["container"] for name, found in executors.items()}


@pytest.fixture(scope="module")
def pods(everything: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    kubernetes = everything[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return {name.removeprefix("exec-"): found for name, found in kubernetes.items()}


def test_accelerated_steps_get_the_node(
    containers: dict[str, dict[str, Any]], pods: dict[str, dict[str, Any]]
) -> None:
    for name, pod in pods.items():
        accelerator = containers[name]["resources"].get("accelerator")
        if name not in GPU_STEPS:
            assert accelerator is None
            assert not {"nodeAffinity", "nodeSelector", "tolerations"} & set(pod)
            continue
        assert accelerator["resourceType"] == "nvidia.com/gpu"
        # Only train shares its work among several.
        assert accelerator["resourceCount"] == ("2" if name == "train" else "1")
        assert pod["nodeSelector"] == {"labels": {"pool": "tuning"}}
        (term,) = pod["nodeAffinity"]
        assert term["matchExpressions"] == [
            {
                "key": "nvidia.com/gpu.product",
                "operator": "In",
                "values": ["NVIDIA-A100-SXM4-80GB", "NVIDIA-A100-80GB-PCIe"],
            }
        ]
        assert pod["tolerations"] == [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
            {"key": "team", "operator": "Equal", "value": "nlp", "effect": "NoExecute"},
        ]
        shared = {"volumeName": "dshm", "mountPath": "/dev/shm"}
        assert {**shared, "medium": "Memory", "sizeLimit": "16Gi"} in pod["emptyDirMounts"]


def test_a_gpu_of_amd_is_another_resource_and_another_label(tmp_path: Path) -> None:
    documents = compiled({"profile": "mi300x"}, tmp_path / "pipeline.yaml")
    train = documents[0]["deploymentSpec"]["executors"]["exec-train"]["container"]
    assert train["resources"]["accelerator"]["resourceType"] == "amd.com/gpu"
    executors = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    pod = executors["exec-train"]
    (expression,) = pod["nodeAffinity"][0]["matchExpressions"]
    assert expression["key"] == "amd.com/gpu.product-name"
    assert "AMD_Instinct_MI300X_OAM" in expression["values"]
    assert [each["key"] for each in pod["tolerations"]] == ["amd.com/gpu"]
    nodes = {"profile": "mi300x", "num_nodes": 2, "shared_claim": "c"}
    config = nodes_config(PlacementConfig.parse(nodes))
    job = build(config, name="x", directory=Path("/shared/x"), labels={}, owner=None,
                supported={"runtimePatches"})  # fmt: skip
    assert job["spec"]["trainer"]["resourcesPerNode"]["limits"]["amd.com/gpu"] == "1"
    assert "amd.com/gpu.product-name" in str(job) and "nvidia" not in str(job)


def resources(container: dict[str, Any]) -> tuple[str, ...]:
    found = container["resources"]
    names = ("CpuRequest", "CpuLimit", "MemoryRequest", "MemoryLimit")
    return tuple(found[f"resource{name}"] for name in names)


def test_the_own_value_of_a_step_wins_and_the_other_bound_follows(
    containers: dict[str, dict[str, Any]],
) -> None:
    assert resources(containers["merge"]) == ("10", "12", "120Gi", "150Gi")
    # 200 GiB asked for, above the profile's limit of 150; 1 core asked for by the table.
    assert resources(containers["train"]) == ("10", "12", "200Gi", "200Gi")
    assert resources(containers["fetch"]) == ("500m", "500m", "4Gi", "16Gi")
    assert resources(containers["gate"]) == ("1", "2", "1Gi", "4Gi")


def test_time_and_retries(
    everything: list[dict[str, Any]], pods: dict[str, dict[str, Any]]
) -> None:
    assert pods["train"]["activeDeadlineSeconds"] == "5400"
    assert pods["gate"]["activeDeadlineSeconds"] == "3600"
    tasks: dict[str, Any] = {}
    for component in everything[0]["components"].values():
        tasks.update(component.get("dag", {}).get("tasks", {}))
    assert "retryPolicy" not in tasks["train"]
    assert tasks["fetch"]["retryPolicy"] == {
        "maxRetryCount": 3,
        "backoffDuration": "30s",
        "backoffFactor": 2.0,
        # Four tries of six hours, 30 days of waiting before each, and pauses of 30, 60 and 120 s.
        "backoffMaxDuration": f"{4 * (6 + 720) * 3600 + 210}s",
    }


def test_volumes_and_secrets_go_where_they_are_used(
    containers: dict[str, dict[str, Any]], pods: dict[str, dict[str, Any]]
) -> None:
    scratch = {"volumeName": "scratch", "mountPath": "/scratch", "sizeLimit": "300Gi"}
    for name, pod in pods.items():
        environment = {found["name"]: found["value"] for found in containers[name].get("env", [])}
        assert (scratch in pod.get("emptyDirMounts", [])) == (environment.get("TMPDIR") is not None)
        assert ("TMPDIR" in environment) == (
            name not in {"plan", "gate", "report", "diagnose", *LOOK_UPS}
        )
        claims = [(mount["constant"], mount["mountPath"]) for mount in pod.get("pvcMount", [])]
        variables = {
            variable["envVar"]: (secret["secretName"], variable["secretKey"], secret["optional"])
            for secret in pod.get("secretAsEnv", [])
            for variable in secret["keyToEnv"]
        }
        of_the_recipe = {
            "AWS_ACCESS_KEY_ID": ("object-store", "id", True),
            "AWS_SECRET_ACCESS_KEY": ("object-store", "key", True),
        }
        if name in HUB_STEPS:
            assert claims == [("tuneline-model-cache", "/cache")]
            assert environment["HF_HOME"] == "/cache/huggingface"
            assert variables == {"HF_TOKEN": ("huggingface", "token", True), **of_the_recipe}
        elif name == "train":
            # For trackers; it has no use for the Hub, but for a place that outlives it.
            assert claims == [("tuneline-model-cache", "/cache")]
            assert environment[ROOT_VARIABLE] == "/cache/checkpoints"
            assert variables == of_the_recipe
        else:
            assert (claims, variables) == ([], {})


def test_only_the_exit_handler_gets_the_urls_of_webhooks(tmp_path: Path) -> None:
    values = {
        "placement.secrets": {"alerts": {"url": "SLACK_WEBHOOK", "id": "AWS_ACCESS_KEY_ID"}},
        "notify": [{"webhook": "SLACK_WEBHOOK", "format": "slack"}],
    }
    recipe = load_recipe(RECIPES_DIR / "llama3-8b-instruct.yaml", values)
    compiler.Compiler().compile(finetune(recipe), str(tmp_path / "pipeline.yaml"))
    _, platform = yaml.safe_load_all((tmp_path / "pipeline.yaml").read_text(encoding="utf-8"))
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    given = {
        name.removeprefix("exec-"): {
            variable["envVar"]
            for secret in pod.get("secretAsEnv", [])
            for variable in secret["keyToEnv"]
        }
        for name, pod in executors.items()
    }
    assert given["diagnose"] == {"SLACK_WEBHOOK"}
    assert {name for name, found in given.items() if "SLACK_WEBHOOK" in found} == {"diagnose"}
    assert "AWS_ACCESS_KEY_ID" in given["fetch"]


def test_checkpoints_lie_where_several_nodes_keep_them(tmp_path: Path) -> None:
    claims = {"shared_claim": "shared", "cache_claim": "cache"}
    pipeline, platform = compiled(claims, tmp_path / "pipeline.yaml")
    container = pipeline["deploymentSpec"]["executors"]["exec-train"]["container"]
    pod = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-train"]
    (mount,) = pod["pvcMount"]
    assert (mount["constant"], mount["mountPath"]) == ("shared", "/shared")
    (variable,) = container["env"]
    nodes = nodes_config(PlacementConfig.parse({**claims, "num_nodes": 2}))
    job = build(nodes, name="n", directory=Path("/shared/tuneline/n"), labels={}, owner=None,
                supported={"runtimePatches"})  # fmt: skip
    assert variable in job["spec"]["trainer"]["env"]
    assert variable["name"] == ROOT_VARIABLE


def test_every_pod_has_labels_a_user_and_pull_secrets(pods: dict[str, dict[str, Any]]) -> None:
    for name, pod in pods.items():
        assert pod["podMetadata"]["labels"] == {
            "app.kubernetes.io/part-of": "tuneline",
            "app.kubernetes.io/component": name.removesuffix("-2"),
            "kueue.x-k8s.io/queue-name": "tuneline",
            "kueue.x-k8s.io/priority-class": "tuneline-batch",
        }
        assert pod["securityContext"] == {"runAsUser": "65532", "runAsNonRoot": True}
        assert [secret["secretName"] for secret in pod["imagePullSecret"]] == ["registry"]


def test_every_pod_gets_the_environment_and_the_certificates(
    containers: dict[str, dict[str, Any]], pods: dict[str, dict[str, Any]]
) -> None:
    file = "/etc/tuneline/ca/ca-bundle.crt"
    wanted = {"HF_ENDPOINT": "https://hub.example.com", **dict.fromkeys(CA_VARIABLES, file)}
    assert {"diagnose", "plan", "train", "quantize-gguf"} <= set(pods) == set(containers)
    for name, pod in pods.items():
        variables = {each["name"]: each["value"] for each in containers[name]["env"]}
        assert wanted.items() <= variables.items(), name
        (mount,) = pod["configMapAsVolume"]
        assert (mount["configMapName"], mount["mountPath"]) == ("company-ca", "/etc/tuneline/ca")
        assert not mount.get("optional"), name
        # What the line sets itself, `environment` cannot set.
        for variable in variables.keys() - wanted.keys():
            with pytest.raises(RecipeError, match=f"environment.{variable}: "):
                PlacementConfig.parse({"environment": {variable: "x"}})
    nodes = {"num_nodes": 2, "shared_claim": "c", **{k: EVERYTHING[k] for k in NODE_KEYS}}
    config = nodes_config(PlacementConfig.parse(nodes))
    assert config.environment == wanted
    assert config.ca_config_map == "company-ca"


def test_another_registry_is_in_every_name(tmp_path: Path) -> None:
    registry = "registry.example.com:5000/team"
    documents = compiled({"registry": registry}, tmp_path / "pipeline.yaml")
    found = {
        name.removeprefix("exec-"): executor["container"]["image"]
        for name, executor in documents[0]["deploymentSpec"]["executors"].items()
    }
    for name, image in found.items():
        assert image.startswith(f"{registry}/"), name
        assert image.endswith(f":{VERSION}"), name
    assert found["train"] == images.in_registry(images.TRAIN, registry)
    assert found["evaluate"] == found["evaluate-2"] == f"{registry}/evaluate:{VERSION}"
    nodes = {"registry": registry, "num_nodes": 2, "shared_claim": "c"}
    assert nodes_config(PlacementConfig.parse(nodes)).image == found["train"]
    assert lint_documents(documents) == []


@pytest.mark.parametrize("registry", [None, "local", "local:tuneline", "registry.example.com"])
def test_images_that_the_nodes_have_are_never_pulled(registry: str | None, tmp_path: Path) -> None:
    documents = compiled({"registry": registry}, tmp_path / "pipeline.yaml")
    executors = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    policies = {executor.get("imagePullPolicy") for executor in executors.values()}
    assert policies == {None if registry == "registry.example.com" else "Never"}
    assert lint_documents(documents) == []


def test_the_lint_has_nothing_to_say(everything: list[dict[str, Any]]) -> None:
    assert lint_documents(everything) == []


def test_the_platform_may_pick_the_user(tmp_path: Path) -> None:
    documents = compiled({"run_as_user": None}, tmp_path / "pipeline.yaml")
    executors = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert executors["exec-train"]["securityContext"] == {"runAsNonRoot": True}
    assert lint_documents(documents) == []
