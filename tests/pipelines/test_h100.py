"""The pipeline of an 8B model on H100 nodes, read from the YAML that a cluster gets."""

from typing import Any

import pytest
import yaml
from kfp import compiler

from tuneline.errors import RecipeError
from tuneline.pipelines.catalog import find_recipe
from tuneline.pipelines.finetune import finetune
from tuneline.pipelines.lint.lint import lint_documents
from tuneline.placement import PlacementConfig, quantity_value
from tuneline.train.trainjob.manifest import NodesConfig

GPU_STEPS = {"train", "merge", "quantize-gptq", "evaluate", "evaluate-2"}
WITHOUT_RETRY = {"plan", "gate", "report", "diagnose"}
NODE_OF_EIGHT = {
    "num_accelerators": 8,
    "shared_memory": "64Gi",
    "steps": {"train": {"cpu_request": "96", "memory_request": "900Gi"}},
}


@pytest.fixture(scope="module", params=[1, 8])
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, list[dict[str, Any]]]:
    placement = {"profile": "h100", **(NODE_OF_EIGHT if request.param == 8 else {})}
    recipe = find_recipe("llama3-8b-instruct", []).model_copy(
        update={"placement": PlacementConfig.parse(placement)}
    )
    path = tmp_path_factory.mktemp("h100") / "pipeline.yaml"
    compiler.Compiler().compile(finetune(recipe), str(path))
    return request.param, list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def executors(documents: list[dict[str, Any]]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Return the container and the pod of each step."""
    containers = documents[0]["deploymentSpec"]["executors"]
    pods = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert set(containers) == set(pods)
    return {
        name.removeprefix("exec-"): (containers[name]["container"], pods[name]) for name in pods
    }


def test_gpus_go_to_who_uses_them(compiled: tuple[int, list[dict[str, Any]]]) -> None:
    count, documents = compiled
    for name, (container, _) in executors(documents).items():
        found = container["resources"].get("accelerator")
        if name not in GPU_STEPS:
            assert found is None, name
            continue
        wanted = count if name == "train" else 1
        assert (found["resourceType"], found["resourceCount"]) == ("nvidia.com/gpu", str(wanted))


def test_requests_and_limits(compiled: tuple[int, list[dict[str, Any]]]) -> None:
    count, documents = compiled
    found = {name: container["resources"] for name, (container, _) in executors(documents).items()}
    for resources in found.values():
        for kind in ("Cpu", "Memory"):
            request, limit = (resources[f"resource{kind}{part}"] for part in ("Request", "Limit"))
            assert 0 < quantity_value(request) <= quantity_value(limit)
    train = [
        found["train"][f"resource{part}"]
        for part in ("CpuRequest", "CpuLimit", "MemoryRequest", "MemoryLimit")
    ]
    eight = ["96", "96", "900Gi", "900Gi"]
    assert train == (eight if count == 8 else ["20", "26", "180Gi", "210Gi"])


def test_shared_memory_fits_into_the_limit(compiled: tuple[int, list[dict[str, Any]]]) -> None:
    count, documents = compiled
    for name, (container, pod) in executors(documents).items():
        sizes = [
            mount["sizeLimit"]
            for mount in pod.get("emptyDirMounts", [])
            if mount["mountPath"] == "/dev/shm" and mount["medium"] == "Memory"
        ]
        if name not in GPU_STEPS:
            assert sizes == []
            continue
        assert sizes == ["64Gi" if count == 8 else "16Gi"]
        limit = quantity_value(container["resources"]["resourceMemoryLimit"])
        assert quantity_value(sizes[0]) < limit


def test_retries_secrets_and_users(compiled: tuple[int, list[dict[str, Any]]]) -> None:
    _, documents = compiled
    for name, (container, pod) in executors(documents).items():
        assert pod["securityContext"] == {"runAsUser": "65532", "runAsNonRoot": True}
        assert not any("TOKEN" in found["name"] for found in container.get("env", []))
        for secret in pod.get("secretAsEnv", []):
            assert (secret["secretName"], secret["optional"]) == ("huggingface", True)
            assert secret["keyToEnv"] == [{"envVar": "HF_TOKEN", "secretKey": "token"}]
        assert not {"hostPath", "privileged"} & set(pod), name
        assert ":latest" not in container["image"]
    for component in documents[0]["components"].values():
        for name, task in component.get("dag", {}).get("tasks", {}).items():
            if f"exec-{name}" in documents[0]["deploymentSpec"]["executors"]:
                assert ("retryPolicy" in task) == (name not in WITHOUT_RETRY), name
    assert lint_documents(documents) == []


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    nodes = {"num_nodes": 2, "shared_claim": "tuneline-shared", "queue": "team"}
    placement = {"profile": "h100", **NODE_OF_EIGHT, **nodes}
    recipe = find_recipe("llama3-8b-instruct", ["train.global_batch_size=32"]).model_copy(
        update={"placement": PlacementConfig.parse(placement)}
    )
    path = tmp_path_factory.mktemp("h100") / "pipeline.yaml"
    compiler.Compiler().compile(finetune(recipe), str(path))
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def test_two_nodes_are_a_small_pod_and_a_trainjob(two_nodes: list[dict[str, Any]]) -> None:
    found = executors(two_nodes)
    assert "train" not in found
    container, pod = found["train-on-nodes"]
    # It waits and watches: the GPUs are the job's.
    assert "accelerator" not in container["resources"]
    assert container["image"].startswith("localhost/tuneline/light:")
    assert quantity_value(container["resources"]["resourceMemoryLimit"]) <= 4 * 2**30
    (mount,) = pod["pvcMount"]
    assert (mount["constant"], mount["mountPath"]) == ("tuneline-shared", "/shared")
    # A queue may take longer than the training; the limit of that is the job's own.
    assert int(pod["activeDeadlineSeconds"]) == 30 * 24 * 3600
    tasks = {
        name: task
        for component in two_nodes[0]["components"].values()
        for name, task in component.get("dag", {}).get("tasks", {}).items()
    }
    task = tasks["train-on-nodes"]
    assert task["taskInfo"]["name"] == "train"
    assert task["retryPolicy"]["maxRetryCount"] == 3
    assert "train-on-nodes" in tasks["merge"]["dependentTasks"]
    constant = task["inputs"]["parameters"]["nodes"]["runtimeValue"]["constant"]
    nodes = NodesConfig.parse(constant)
    assert (nodes.num_nodes, nodes.ranks_per_node, nodes.accelerator) == (2, 8, "nvidia.com/gpu")
    assert (nodes.cpu_limit, nodes.memory_limit) == ("96", "900Gi")
    assert (nodes.shared_memory, nodes.timeout_hours, nodes.queue) == ("64Gi", 96, "team")
    assert nodes.image.startswith("localhost/tuneline/train:")
    assert lint_documents(two_nodes) == []
    # Other steps use one GPU of one node.
    assert found["merge"][0]["resources"]["accelerator"]["resourceCount"] == "1"


@pytest.mark.parametrize(
    ("placement", "says"),
    [
        (
            {"num_nodes": 2},
            "shared_claim is not set: set it to a ReadWriteMany claim",
        ),
        ({"num_nodes": 0}, "a whole number at least 1"),
    ],
)
def test_nodes_without_what_they_need(placement: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        PlacementConfig.parse(placement)


def test_ranks_are_not_counted_by_hand_on_several_nodes() -> None:
    nodes = ["placement.num_nodes=2", "placement.shared_claim=c"]
    with pytest.raises(
        RecipeError, match="set num_ranks to auto, which makes every GPU of every node"
    ):
        find_recipe("llama3-8b-instruct", [*nodes, "train.num_ranks=16"])
