"""plan: the estimate against measured steps, and every check against a Kubernetes API over HTTP.

The client is the unmodified one, the server tests/support/kube_server.py; no cluster was there.
"""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from tuneline import images
from tuneline.artifacts import DatasetManifest
from tuneline.errors import ClusterError, RecipeError, UserError
from tuneline.gpu_profiles import GPU_PROFILES
from tuneline.pipelines import kube, kube_api
from tuneline.pipelines.catalog import find_recipe
from tuneline.pipelines.cli.main import app
from tuneline.pipelines.plan.check import Check
from tuneline.pipelines.plan.cluster import CRDS, LAUNCHER_RIGHTS, RIGHTS, TRAINER_CRD
from tuneline.pipelines.plan.disk import POD_BYTES, pod_disks
from tuneline.pipelines.plan.estimate import estimate, llama_shape, parameters_in_name
from tuneline.pipelines.plan.host_memory import host_memory
from tuneline.pipelines.plan.plan import plan
from tuneline.placement import PlacementConfig
from tuneline.quantize.formats import FORMATS
from tuneline.recipe import Recipe
from tuneline.steps import STEPS
from tuneline.train.batch_size import batch_size
from tuneline.train.config import LoraConfig
from tuneline.train.memory.estimate import GIB, estimate_memory
from tuneline.train.memory.plan import recipe_plan, run_settings

LLAMA = 8.03e9


def recipe(*assignments: str, profile: str = "h100") -> Recipe:
    return find_recipe("llama3-8b-instruct", [f"placement.profile={profile}", *assignments])


def test_a_size_gives_the_shape_of_a_llama() -> None:
    # Its config: 32 layers of 4096, 14336 in the MLP, 1024 for keys; and its LoRA of seven modules.
    shape = llama_shape(LLAMA, LoraConfig())
    assert (shape.num_layers, shape.hidden, shape.mlp, shape.key_value) == (32, 4096, 14336, 1024)
    assert shape.num_quantized + shape.num_other == int(LLAMA)
    assert shape.num_adapter == 41_943_040
    assert llama_shape(LLAMA, LoraConfig(target_modules=("q_proj",))).num_adapter == 4_194_304
    # Small ones are off by their embeddings, not by their size.
    small = llama_shape(1.345e8, LoraConfig())
    assert small.num_quantized + small.num_other == pytest.approx(1.345e8)


@pytest.mark.parametrize("profile", ["t4", "a100-80g", "h100"])
@pytest.mark.parametrize("changes", [
    {}, {"kernels": "off"}, {"gradient_checkpointing": False, "kernels": "off"},
    {"micro_batch_size": 4}, {"load_in_4bit": False}, {"kernels": "fp8"},
    {"dtype": "float16"}, {"dtype": "float32"},
])  # fmt: skip
def test_plan_and_train_go_by_one_estimate(profile: str, changes: dict[str, Any]) -> None:
    loaded = recipe(profile=profile)
    loaded = loaded.model_copy(update={"train": loaded.train.model_copy(update=changes)})
    manifest = DatasetManifest.model_construct(method="sft", max_seq_length=2048)
    # As train itself settles it, on the model's own config; a T4 has no bfloat16.
    auto = "float32" if profile == "t4" else "bfloat16"
    own_dtype = auto if loaded.train.dtype == "auto" else loaded.train.dtype
    size = batch_size(loaded.train, 1)
    settings = run_settings(
        loaded.train,
        manifest,
        recipe_plan(loaded.train, size, manifest.max_seq_length),
        itemsize=4 if own_dtype == "float32" else 2,
        optimizer=loaded.train.optim,
        device="cuda",
        fused=loaded.train.kernels != "off" and profile != "t4",
    )
    known = estimate_memory(llama_shape(LLAMA, loaded.train.lora), settings).total
    assert estimate(loaded, LLAMA).gpu_bytes == known


def test_several_gpus_divide_the_optimizer_and_the_time() -> None:
    steps = ("train.max_steps=100", "train.global_batch_size=16")
    one = recipe(*steps)
    eight = recipe(*steps, "placement.num_accelerators=8")
    sixteen = recipe(
        *steps, "placement.num_accelerators=8", "placement.num_nodes=2",
        "placement.shared_claim=shared",
    )  # fmt: skip
    found = [estimate(each, LLAMA) for each in (one, eight, sixteen)]
    assert [each.num_gpus for each in found] == [1, 8, 16]
    assert len({each.gpu_hours for each in found}) == 1
    hours = [each.hours or 0 for each in found]
    assert hours[0] == pytest.approx(8 * hours[1]) == pytest.approx(16 * hours[2])
    assert found[1].gpu_bytes == found[0].gpu_bytes
    # 8-bit moments on one; an eighth of fp32 gradients and moments on eight.
    zero2 = estimate(recipe(*steps, "placement.num_accelerators=8", "train.sharding=zero2"), LLAMA)
    bytes_a_parameter = (found[0].gpu_bytes - zero2.gpu_bytes) / 41_943_040
    assert bytes_a_parameter == pytest.approx((4 + 2) - (4 + 8) / 8, rel=0.01)
    words = {check.name: check.words for check in plan(sixteen)}
    assert words["time"].endswith("on 16 GPUs at best")
    assert words["ranks"] == "16 ranks and a global batch of 16 examples"


def test_gpus_that_cannot_share_a_step_are_told_so() -> None:
    (found,) = [
        each for each in plan(recipe("placement.num_accelerators=3")) if each.name == "ranks"
    ]
    assert (found.verdict, found.words) == (
        "fail",
        "3 ranks and a global batch of 8 examples, which they cannot divide equally",
    )  # fmt: skip
    with pytest.raises(
        RecipeError, match=r"size is 8, .* 16 ranks \(2 nodes x 8 GPUs\): .* multiple of 16"
    ):
        recipe("placement.num_accelerators=8", "placement.num_nodes=2", "placement.shared_claim=c")


def test_upstreams_batch_names_are_resolved_by_the_ranks_of_the_placement() -> None:
    raw = {"name": "a", "base_model": "org/m-8b", "dataset": "d", "publish_to": "dir:p"}
    loaded = Recipe.parse(
        {
            **raw,
            "train": {"per_device_train_batch_size": 2, "max_steps": 10},
            "placement": {"profile": "h100", "num_accelerators": 3},
        }
    )
    checks = {check.name: check for check in plan(loaded)}
    assert checks["ranks"].words == "3 ranks and a global batch of 24 examples"
    assert checks["batch size"].verdict == "warn"
    assert checks["batch size"].advice == (
        "write train.global_batch_size: 24 and train.micro_batch_size: 2 instead"
    )
    assert estimate(loaded, LLAMA).num_tokens == 10 * 24 * 2048


@pytest.mark.parametrize(
    ("profile", "assignments", "found"),
    [
        ("t4", [], ("ok", "PyTorch's, because t4 is older than Ampere")),
        ("t4", ['train.kernels="off"'], None),
        ("a10g", [], None),
        ("h100", ["train.kernels=fp8"], None),
        ("local", ["train.kernels=fp8"], None),
        ("h100", ["train.kernels=fp8", "placement.num_accelerators=0"], (
            "fail", "train.kernels is fp8, which needs a GPU, but placement.num_accelerators is 0",
        )),
    ],
)  # fmt: skip
def test_where_our_kernels_do_not_run_is_told(
    profile: str, assignments: list[str], found: tuple[str, str] | None
) -> None:
    checks = plan(recipe(*assignments, profile=profile))
    kernels = [(each.verdict, each.words) for each in checks if each.name == "kernels"]
    assert kernels == ([found] if found else [])


def test_fp8_in_pods_without_a_gpu_fails(cluster: Any) -> None:
    loaded = recipe("train.kernels=fp8", profile="local")
    loaded = loaded.model_copy(update={"placement": PlacementConfig()})
    assert verdicts(look(loaded))["kernels"] == "fail"


@pytest.mark.parametrize("claim", [None, "shared_claim", "cache_claim"])
def test_a_retry_that_would_begin_anew_is_told(claim: str | None) -> None:
    loaded = recipe(*([f"placement.{claim}=c"] if claim else []))
    found = [each.verdict for each in plan(loaded) if each.name == "checkpoints"]
    assert found == ([] if claim else ["warn"])


def test_time_is_what_the_measured_step_took() -> None:
    loaded = recipe(
        "train.global_batch_size=4",
        "train.micro_batch_size=4",
        "train.gradient_checkpointing=false",
        "train.max_steps=1000",
    )
    found = estimate(loaded, LLAMA)
    assert found.num_tokens == 1000 * 4 * 2048
    assert found.gpu_hours == pytest.approx(1000 * 0.702 / 3600, rel=0.01)


def test_disk_counts_base_merged_and_exports() -> None:
    loaded = recipe('quantize.gguf=["f16", "q8_0"]', "quantize.gptq=[]")
    found = estimate(loaded, LLAMA)
    # 16 GB each: base, merged, f16 to convert from and the f16 export; and 8.5 GB.
    assert found.artifact_bytes == pytest.approx(LLAMA * (2 + 2 + 2 + 2 + 1.0625), rel=0.01)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("meta-llama/Llama-3.1-8B", 8e9), ("Qwen/Qwen2.5-0.5B-Instruct", 5e8),
     ("builtin:smollm2-135m", 1.35e8), ("mistralai/Mistral-7B-v0.3", 7e9),
     ("org/model-v3", None), ("org/abc8bit", None)],
)  # fmt: skip
def test_names_say_how_large_a_model_is(name: str, expected: float | None) -> None:
    assert parameters_in_name(name) == expected


def verdicts(checks: list[Check]) -> dict[str, str]:
    order = ("ok", "unknown", "warn", "fail")
    worst: dict[str, str] = {}
    for check in checks:
        known = worst.get(check.name, "ok")
        worst[check.name] = max(known, check.verdict, key=order.index)
    return worst


@pytest.mark.parametrize(
    ("profile", "num_parameters", "verdict", "advice"),
    [
        # Train makes eight rows a forward fewer; 70 B parameters it cannot make fewer.
        ("t4", 8e9, "warn", "smaller micro-batches, and more per step, down to 9."),
        ("t4", 70e9, "fail", "take a larger GPU"),
        ("a10g", 8e9, "ok", ""),
        ("h100", 8e9, "ok", ""),
    ],
)
def test_a_gpu_that_is_too_small_is_named(
    profile: str, num_parameters: float, verdict: str, advice: str
) -> None:
    loaded = recipe("train.global_batch_size=32", "train.micro_batch_size=8", profile=profile)
    checks = plan(loaded, num_parameters=num_parameters)
    (memory,) = [each for each in checks if each.name == "GPU memory"]
    assert memory.verdict == verdict
    assert f"on {profile}" in memory.words
    assert advice in memory.advice and bool(advice) == bool(memory.advice)


@pytest.mark.parametrize("profile", GPU_PROFILES)
def test_every_gpu_is_checked(profile: str) -> None:
    gpu = GPU_PROFILES[profile]
    # So large that no GPU trains it.
    checks = {each.name: each for each in plan(recipe(profile=profile), num_parameters=2e12)}
    assert checks["GPU memory"].verdict == "fail"
    assert f"of {gpu.memory_bytes / GIB:.1f} GiB on {profile}" in checks["GPU memory"].words
    speed = estimate(recipe(profile=profile), LLAMA).tokens_per_second
    assert speed == pytest.approx(gpu.relative_speed * 11_700 / 1.41)


def test_limits_that_the_run_would_hit_fail() -> None:
    loaded = recipe(
        "train.max_steps=100000",
        "placement.steps={train: {timeout_hours: 1}}",
    )  # fmt: skip
    checks = {check.name: check for check in plan(loaded, price_per_gpu_hour=2.0)}
    assert checks["time"].verdict == "fail"
    assert "ended after 1 h" in checks["time"].words
    hours = estimate(loaded, 8e9).gpu_hours
    assert hours is not None
    assert checks["cost"].words.endswith(f"{2 * hours:.2f} at 2 per GPU hour")
    own = loaded.model_copy(update={"train": loaded.train.model_copy(update={"price_per_hour": 3})})
    (cost,) = [check for check in plan(own) if check.name == "cost"]
    assert cost.words.endswith(f"{3 * hours:.2f} at 3 per GPU hour")


def test_host_memory_is_what_the_steps_took() -> None:
    # tests/measure/proof_memory.py, 8.03e9 parameters, two rows compared.
    loaded = recipe("quantize.num_proof_prompts=2", 'quantize.gguf=["f16", "q4_k_m"]')
    found = {each.step: each.own_bytes / GIB for each in host_memory(loaded, LLAMA)}
    assert found == {
        "convert-gguf": pytest.approx(3.43, rel=0.05),
        "quantize-gguf": pytest.approx(4.81, rel=0.05),
    }  # fmt: skip
    # Without a GPU models are loaded in float32.
    on_cpu = host_memory(recipe(profile="local").model_copy(
        update={"placement": PlacementConfig()}
    ), LLAMA)  # fmt: skip
    assert {each.step for each in on_cpu} == {*found, "quantize-gptq", "evaluate"}
    assert min(each.own_bytes for each in on_cpu[2:]) > 4 * LLAMA


@pytest.mark.parametrize(
    ("steps", "verdict", "words", "advice"),
    [
        ("", "ok", "by quantize-gguf, of 48Gi", ""),
        ("{quantize-gguf: {memory_request: 5Gi}}", "warn", "requests 5Gi",
         "quantize-gguf.memory_request"),
        ("{quantize-gguf: {memory_limit: 5Gi}}", "warn", "but its limit is 5Gi",
         "quantize-gguf.memory_limit"),
        ("{quantize-gguf: {memory_limit: 2Gi}}", "fail", "but its limit is 2Gi",
         "quantize-gguf.memory_limit"),
        # Files may be read again; what a run cannot do without is there.
        ("{convert-gguf: {memory_limit: 12Gi}}", "warn",
         "files of 14.9 GiB do not fit and are read again", "to save hours"),
    ],
)  # fmt: skip
def test_a_pod_with_too_little_memory_is_named(
    steps: str, verdict: str, words: str, advice: str
) -> None:
    loaded = recipe(*([f"placement.steps={steps}"] if steps else []))
    (found,) = [each for each in plan(loaded) if each.name == "memory"]
    assert found.verdict == verdict
    assert words in found.words and advice in found.advice


def test_the_plan_is_made_without_kfp() -> None:
    """In a step's pod kfp.dsl has no tasks to place."""
    code = "import sys, tuneline.pipelines.plan.run; sys.exit('kfp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_pod_holds_a_run_on_this_machine_to_its_memory() -> None:
    loaded = recipe(profile="local").model_copy(update={"placement": PlacementConfig()})
    checks = [each for each in plan(loaded, num_parameters=70e9) if each.name == "memory"]
    assert {each.verdict for each in checks} == {"warn"}
    on_cluster = recipe(profile="h100")
    checks = [each for each in plan(on_cluster, num_parameters=180e9) if each.name == "memory"]
    assert "fail" in {each.verdict for each in checks}


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


CONTROLLER = Path(__file__).parents[2] / "data/kfp-2.17/workflow-controller-configmap.json"


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


def look(loaded: Recipe = CLUSTER) -> list[Check]:
    return plan(loaded, kube=kube.Kube("kubeflow"))


def test_a_cluster_that_has_everything(cluster: Any) -> None:
    checks = look()
    assert set(verdicts(checks).values()) == {"ok"}
    words = {check.name: check.words for check in checks}
    assert words["API"] == f"Kubernetes v1.32.4 at {cluster.host}"
    assert words["CRDs"] == "scheduledworkflows.kubeflow.org v1beta1"
    assert words["queue"] == "team: 3 workloads waiting"
    assert words["quota"] == "q: 2 of 8 nvidia.com/gpu in use"
    assert words["nodes"] == "1 of 2 nodes fit 1 nvidia.com/gpu: gpu-1"
    assert words["images"].startswith(f"a node has them: {images.LIGHT}, ")
    # Reviews of rights are the only thing that is posted.
    posts = [each for each in cluster.requests if not each.startswith("GET")]
    assert len(posts) == len(RIGHTS)


def without(plural: str, name: str) -> Any:
    where = "" if plural in ("nodes", "customresourcedefinitions") else "kubeflow"
    return lambda server: server.objects.pop((plural, where, name))


def controller(strategy: dict[str, str] | None) -> Any:
    """Give the workflow controller another retry strategy as its default."""
    defaults = {"spec": {"templateDefaults": {"retryStrategy": strategy}} if strategy else {}}
    data = {"workflowDefaults": yaml.safe_dump(defaults)}
    return lambda server: server.put("configmaps", "workflow-controller-configmap", data=data)


def changed(plural: str, name: str, **parts: Any) -> Any:
    return lambda server: server.put(plural, name, **parts)


FAULTS = {
    "no Kubeflow Pipelines": (
        without("customresourcedefinitions", "workflows.argoproj.io"),
        "CRDs", "fail", "there is no workflows.argoproj.io",
    ),
    "no schedules": (
        without("customresourcedefinitions", "scheduledworkflows.kubeflow.org"),
        "CRDs", "warn", "`tuneline schedule` will not work",
    ),
    "no secret": (
        without("secrets", "huggingface"), "secrets", "warn", "no secret huggingface",
    ),
    "no claim": (
        without("persistentvolumeclaims", "cache"), "cache", "fail", "no claim cache",
    ),
    "a claim for one node": (
        changed("persistentvolumeclaims", "cache", spec={"accessModes": ["ReadWriteOnce"]},
                status={"phase": "Bound"}),
        "cache", "warn", "ReadWriteOnce",
    ),
    "a lost claim": (
        changed("persistentvolumeclaims", "cache", spec={"accessModes": ["ReadWriteMany"]},
                status={"phase": "Lost"}),
        "cache", "fail", "cache is Lost",
    ),
    "no queue": (without("localqueues", "team"), "queue", "fail", "no LocalQueue team"),
    "a queue that is stopped": (
        changed("localqueues", "team", status={"conditions": [
            {"type": "Active", "status": "False", "message": "ClusterQueue is stopped"}]}),
        "queue", "fail", "ClusterQueue is stopped",
    ),
    "quota too small": (
        changed("resourcequotas", "q", spec={"hard": {"requests.nvidia.com/gpu": "0"}}),
        "quota", "fail", "0 of 0 nvidia.com/gpu",
    ),
    "quota used up": (
        changed("resourcequotas", "q", spec={}, status={
            "hard": {"requests.nvidia.com/gpu": "8"}, "used": {"requests.nvidia.com/gpu": "8"}}),
        "quota", "warn", "8 of 8",
    ),
    "quota below one step": (
        changed("resourcequotas", "q", spec={"hard": {"requests.cpu": "10", "pods": "100"}}),
        "quota", "fail", "q: 0 of 10 requests.cpu in use, but train requests 20",
    ),
    "quota below the steps side by side": (
        changed("resourcequotas", "q", spec={"hard": {"requests.memory": "300Gi"}}),
        "quota", "warn", "steps that can run side by side request 572",
    ),
    "quota under its short name": (
        changed("resourcequotas", "q", spec={"hard": {"memory": "100Gi"}}),
        "quota", "fail", "0 of 100Gi requests.memory in use, but train requests 180Gi",
    ),
    "no node": (without("nodes", "gpu-1"), "nodes", "warn", "cpu-1 has 0"),
    "another GPU": (
        changed("nodes", "gpu-1", **{**NODE, "metadata": {
            "labels": {"nvidia.com/gpu.product": "Tesla-T4"}}}),
        "nodes", "warn", "gpu-1 has Tesla-T4",
    ),
    "a small node": (
        changed("nodes", "gpu-1", **{**NODE, "status": {
            "allocatable": {"nvidia.com/gpu": "1", "cpu": "8", "memory": "2000Gi"}}}),
        "nodes", "warn", "gpu-1 has 8 cpu, less than 20",
    ),
    "another taint": (
        changed("nodes", "gpu-1", **{**NODE, "spec": {
            "taints": [{"key": "team", "value": "b", "effect": "NoExecute"}]}}),
        "nodes", "warn", "gpu-1 has the taint team",
    ),
    "a limit range for small models": (
        changed("limitranges", "l", spec={"limits": [
            {"type": "Container", "default": {"ephemeral-storage": "23Gi"}}]}),
        "disk", "fail", "publish needs 57.3 GB, but the namespace's limit range gives a pod 49.4",
    ),
    "a limit range for small pods": (
        changed("limitranges", "l", spec={"limits": [
            {"type": "Container", "default": {"ephemeral-storage": "200Gi"}},
            {"type": "Pod", "max": {"ephemeral-storage": "50G"}}]}),
        "disk", "fail", "a pod 50 GB",
    ),
    "nodes with small disks": (
        changed("nodes", "cpu-1", status={
            "images": ALL_IMAGES, "allocatable": {"ephemeral-storage": "50G"}}),
        "disk", "warn", "publish needs 57.3 GB, but the largest node has 50 GB",
    ),
    "limit ranges may not be read": (
        lambda server: server.forbidden.add("list limitranges"),
        "disk", "unknown", "at most 57.3 GB, by publish; ",
    ),
    "no controller to be seen": (
        without("configmaps", "workflow-controller-configmap"),
        "retries", "unknown", "there is no ConfigMap workflow-controller-configmap",
    ),
    "its settings may not be read": (
        lambda server: server.forbidden.add("get configmaps"),
        "retries", "unknown", "refuses to show configmap workflow-controller-configmap",
    ),
    "failed steps are retried": (
        controller({"limit": "2", "retryPolicy": "Always"}),
        "retries", "warn", "(retryPolicy Always), and retries multiply: train up to (2 + 1) x 3 t",
    ),
    "failed steps are retried without a limit": (
        controller({"retryPolicy": "Always"}),
        "retries", "warn", "train up to (2 + 1) x any number of times",
    ),
    "pods that disappeared are not made again": (
        controller(None), "retries", "warn", "not make a pod again that disappeared (retryPolicy On"
    ),
    "logs may not be read": (
        lambda server: server.forbidden.add("get pods/log"),
        "rights", "warn", "you may not get pods/log",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_missing_is_named_and_nothing_else(cluster: Any, fault: str) -> None:
    break_it, name, verdict, says = FAULTS[fault]
    break_it(cluster)
    checks = look()
    assert {key: value for key, value in verdicts(checks).items() if value != "ok"} == {
        name: verdict
    }
    (found,) = [check for check in checks if check.verdict != "ok"]
    assert says in found.words


def test_a_limit_range_and_nodes_that_are_large_enough(cluster: Any) -> None:
    # That of manifests/base: 200 GiB for each of the pod's two containers.
    default = {"ephemeral-storage": "200Gi"}
    cluster.put("limitranges", "l", spec={"limits": [{"type": "Container", "default": default}]})
    cluster.put("nodes", "cpu-1", status={
        "images": ALL_IMAGES, "allocatable": {"ephemeral-storage": "53687091200"}})  # fmt: skip
    cluster.put("nodes", "cpu-2", status={"allocatable": {"ephemeral-storage": "100Gi"}})
    assert verdicts(look())["disk"] == "ok"


def test_the_disk_of_every_pod() -> None:
    loaded = recipe(
        'quantize.gguf=["f16", "q8_0"]', 'quantize.gptq=["gptq-4bit"]',
        "quantize.num_importance_rows=8", "publish_to=org/model",
    )  # fmt: skip
    found = {pod.step: (pod.num_bytes - POD_BYTES) / LLAMA for pod in pod_disks(loaded, LLAMA)}
    adapter = 4 * 41_943_040 / LLAMA
    gptq = FORMATS["gptq-4bit"].bits_per_weight / 8
    assert found == pytest.approx(
        {
            "fetch": 4, "prepare": 2, "evaluate": 2, "train": 2 + adapter, "merge": 4 + adapter,
            "convert-gguf": 4, "measure-importance": 2, "quantize-gguf": 6,
            "quantize-gptq": 2 + gptq, "publish": adapter + 2 + 2 + 1.0625 + gptq,
        },
        rel=1e-3,
    )  # fmt: skip
    # Every step but these is counted: they read records, scores and parameters only.
    light = {"plan", "look-up-model", "look-up-data", "gate", "report", "diagnose"}
    assert set(STEPS) - set(found) == light | {"train-on-nodes"}
    elsewhere = recipe("placement.cache_claim=cache", "publish_to=dir:/models", "quantize.gguf=[]")
    found = {pod.step: (pod.num_bytes - POD_BYTES) / LLAMA for pod in pod_disks(elsewhere, LLAMA)}
    assert found["fetch"] == pytest.approx(2)
    assert found["publish"] == pytest.approx(2 * (adapter + 2 + gptq), rel=1e-3)
    assert "convert-gguf" not in found


def test_the_disk_of_a_pod_that_was_measured() -> None:
    """KFP 2.17: publish of the demo to a directory in its pod used 2.389 GB at most."""
    demo = find_recipe("demo", [])
    (publish,) = [pod for pod in pod_disks(demo, 134_515_008) if pod.step == "publish"]
    assert publish.num_bytes == pytest.approx(2.389e9, rel=0.1)


@pytest.mark.parametrize(
    ("num_parameters", "assignments", "profile", "verdict"),
    [
        (24e9, [], "h100", None),
        (27.2e9, [], "h100", "fail"),
        (27.2e9, [], "local", "warn"),
        (70e9, ["quantize.gguf=[]"], "h100", None),
        (110e9, ["quantize.gguf=[]", "train.lora.r=1024"], "h100", "fail"),
    ],
)
def test_a_file_that_kfp_cannot_upload_is_refused(
    num_parameters: float, assignments: list[str], profile: str, verdict: str | None
) -> None:
    loaded = recipe(*assignments, profile=profile)
    checks = plan(loaded, num_parameters=num_parameters)
    found = [check for check in checks if check.name == "file size"]
    assert [check.verdict for check in found] == ([verdict] if verdict else [])
    if verdict and not assignments:
        assert found[0].words.startswith("convert-gguf writes one file of 54.4 GB (f16, from")
        assert "at most 52.4 GB per file" in found[0].words
        assert "quantize.gguf to []" in found[0].advice and "26.2 B" in found[0].advice
    # Google Cloud Storage takes such a file.
    checks = plan(loaded, num_parameters=num_parameters, uploads_to_s3=False)
    assert "file size" not in {check.name for check in checks}


def test_what_the_recipe_asks_for_train_counts(cluster: Any) -> None:
    loaded = recipe("placement.steps={train: {memory_request: 3000Gi}}")
    (found,) = [check for check in look(loaded) if check.name == "nodes"]
    assert found.verdict == "warn"
    assert "gpu-1 has 2000Gi memory, less than 3000Gi" in found.words


def test_a_quota_has_to_hold_all_nodes_of_a_training(cluster: Any) -> None:
    sets = ("placement.num_nodes=2", "placement.shared_claim=cache", "train.global_batch_size=16")
    for hard, verdict in (("15", "fail"), ("16", "warn"), ("17", "ok")):
        cluster.put("resourcequotas", "q", spec={"hard": {"requests.nvidia.com/gpu": hard}})
        loaded = recipe("placement.num_accelerators=8", *sets)
        (found,) = [check for check in look(loaded) if check.name == "quota"]
        assert found.verdict == verdict
    assert found.words == "q: 0 of 17 nvidia.com/gpu in use"


def test_a_quota_with_a_scope_is_for_other_pods(cluster: Any) -> None:
    spec = {"hard": {"requests.cpu": "1"}, "scopes": ["BestEffort"]}
    cluster.put("resourcequotas", "q", spec=spec)
    assert "quota" not in verdicts(look())


@pytest.mark.parametrize(
    ("profile", "verdict", "words"),
    [
        ("local", "warn", "no node fits train: cpu-2 has 2 cpu, less than 4"),
        ("small", "ok", "each step fits one of 1 nodes"),
    ],
)
def test_steps_on_cpus_need_a_node_too(
    kube_server: Any, profile: str, verdict: str, words: str
) -> None:
    allocatable = {"cpu": "2", "memory": "15Gi"}
    kube_server.put("nodes", "cpu-2", status={"allocatable": allocatable, "images": ALL_IMAGES})
    demo = find_recipe("demo", [f"placement.profile={profile}"])
    (found,) = [check for check in look(demo) if check.name == "nodes"]
    assert (found.verdict, found.words) == (verdict, words)
    assert ("set placement.profile to small" in found.advice) == (verdict == "warn")


def test_nodes_that_may_not_be_seen(cluster: Any) -> None:
    cluster.forbidden.add("list nodes")
    found = [check for check in look() if check.verdict != "ok"]
    assert [(check.name, check.verdict) for check in found] == [
        ("nodes", "unknown"), ("images", "unknown"),
    ]  # fmt: skip
    assert "refuses to show nodes" in found[0].words
    assert found[1].words.startswith(
        f"no visible node has them, and their names have no registry: {images.LIGHT}, "
    )


@pytest.mark.parametrize("version", ["v1beta1", "v1beta2"])
def test_kueue_of_either_version(cluster: Any, version: str) -> None:
    group, _, *rest = cluster.resources["localqueues"]
    cluster.resources["localqueues"] = (group, version, *rest)
    assert verdicts(look())["queue"] == "ok"


TWO_NODES = (
    "placement.num_nodes=2", "placement.shared_claim=shared", "placement.num_accelerators=4",
)  # fmt: skip


def test_several_nodes_need_trainer_a_volume_and_the_nodes(cluster: Any) -> None:
    loaded = recipe(*TWO_NODES)
    bad = [check for check in look(loaded) if check.verdict != "ok"]
    assert [(check.name, check.verdict) for check in bad] == [
        ("rights", "unknown"), ("CRDs", "fail"), ("shared volume", "fail"), ("quota", "warn"),
        ("nodes", "warn"),
    ]  # fmt: skip
    assert "name the run's service account with --service-account" in bad[0].advice
    assert "Kubeflow Trainer 2 is not installed" in bad[1].words
    assert "no claim shared" in bad[2].words
    assert "training needs 2 nodes but only 1 fit 4 nvidia.com/gpu" in bad[4].words
    served = [{"name": "v1alpha1", "served": True, "storage": True}]
    names = {"plural": "trainjobs", "kind": "TrainJob"}
    cluster.put("customresourcedefinitions", TRAINER_CRD, spec={
        "group": "trainer.kubeflow.org", "scope": "Namespaced", "names": names, "versions": served,
    })  # fmt: skip
    claim = {"accessModes": ["ReadWriteOnce"], "storageClassName": "ssd"}
    cluster.put("persistentvolumeclaims", "shared", spec=claim, status={"phase": "Bound"})
    cluster.put("nodes", "gpu-2", **NODE)
    bad = [check for check in look(loaded) if check.verdict != "ok"]
    assert [(check.name, check.verdict) for check in bad] == [
        ("rights", "unknown"), ("shared volume", "fail"), ("quota", "warn"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("who", "prefix"),
    [({"account": "tuneline-runner"}, "tuneline-runner "), ({"is_step": True}, "")],
)
def test_the_runs_account_needs_the_launchers_rights(
    cluster: Any, who: dict[str, Any], prefix: str
) -> None:
    def rights() -> Check:
        checks = plan(recipe(*TWO_NODES), kube=kube.Kube("kubeflow"), **who)
        return next(check for check in checks if check.name == "rights")

    assert rights().verdict == "ok"
    for right in LAUNCHER_RIGHTS:
        name = f"{right.resource}/{right.subresource}".rstrip("/")
        cluster.forbidden = {f"{prefix}{right.verb} {name}"}
        found = rights()
        assert (found.verdict, str(right) in found.words) == ("fail", True)
        assert "manifests/components/trainer" in found.advice


def test_a_server_that_is_away_is_asked_again(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kube_api, "BACKOFF_SECONDS", 0.001)
    cluster.down = 5
    assert set(verdicts(look()).values()) == {"ok"}
    cluster.down = 100
    with pytest.raises(ClusterError, match="answered 503 when asked for its version"):
        look()


def test_a_server_that_is_not_there(
    kube_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kube_api, "BACKOFF_SECONDS", 0.001)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        kube_server.host = f"http://127.0.0.1:{taken.getsockname()[1]}"
    kube_server.write_kubeconfig(tmp_path / "kubeconfig")
    with pytest.raises(ClusterError, match=f"cannot be reached at {kube_server.host}"):
        kube.Kube("kubeflow").version()


def test_no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    with pytest.raises(UserError, match="no Kubernetes cluster: .*; set KUBECONFIG"):
        kube.Kube("kubeflow")


def tuneline(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)


def test_the_command(cluster: Any) -> None:
    done = tuneline("plan", "llama3-8b-instruct", "--profile", "h100", "--cluster")
    assert done.exit_code == 0, done.output
    assert "ok      GPU memory: 7." in done.output
    assert f"ok      API: Kubernetes v1.32.4 at {cluster.host}" in done.output
    small = tuneline("plan", "llama3-8b-instruct", "--profile", "t4", "--parameters", "70e9")
    assert small.exit_code == 1
    assert "-> lower prepare.max_seq_length" in small.output
    assert tuneline("plan", "demo", "--profile", "h300").exit_code != 0
