"""plan: every check against a Kubernetes API over HTTP.

The client is the unmodified one, the server kube_server.py of tests/support; no cluster was there.
"""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from plan_cases import ALL_IMAGES, NODE, look, recipe, verdicts
from typer.testing import CliRunner

from tuneline import images
from tuneline.errors import ClusterError, UserError
from tuneline.pipelines import kube, kube_api
from tuneline.pipelines.catalog import find_recipe
from tuneline.pipelines.cli.main import app
from tuneline.pipelines.plan.check import Check
from tuneline.pipelines.plan.cluster import LAUNCHER_RIGHTS, RIGHTS, TRAINER_CRD
from tuneline.pipelines.plan.plan import plan
from tuneline.steps import IMAGE_SETS
from tuneline.version import VERSION


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
        "no visible node lists them, and placement.registry local means that nodes do not pull: "
        f"{images.LIGHT}, "
    )
    assert found[1].advice.startswith("load the images onto every node")


def test_a_recipe_without_a_registry(cluster: Any) -> None:
    loaded = find_recipe("demo", [])
    (found,) = [check for check in look(loaded) if check.name == "images"]
    assert found == Check(
        "images", "fail", "the recipe does not say where the nodes get the images",
        "set placement.registry to your registry, or to local if nodes have them",
    )  # fmt: skip
    # The pod of the plan step has one of the images, which a compiled file names as local does.
    checks = plan(loaded, kube=kube.Kube("kubeflow"), is_step=True)
    (found,) = [check for check in checks if check.name == "images"]
    assert (found.verdict, found.words.partition(": ")[0]) == ("ok", "a node has them")


@pytest.mark.parametrize(
    ("registry", "verdict"), [("local:tuneline", "ok"), ("local:other", "unknown")]
)
def test_images_that_nodes_have_under_another_name(
    cluster: Any, registry: str, verdict: str
) -> None:
    names = [{"names": [f"docker.io/tuneline/{each}:{VERSION}"]} for each in IMAGE_SETS]
    cluster.put("nodes", "gpu-1", **{**NODE, "status": {**NODE["status"], "images": names}})
    loaded = recipe(f"placement.registry={registry}")
    found = [check for check in look(loaded) if check.name == "images"]
    assert {check.verdict for check in found} == {verdict}


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
    options = ("--profile", "h100", "--cluster", "--set", "placement.registry=local")
    done = tuneline("plan", "llama3-8b-instruct", *options)
    assert done.exit_code == 0, done.output
    assert "ok      GPU memory: 7." in done.output
    assert f"ok      API: Kubernetes v1.32.4 at {cluster.host}" in done.output
    small = tuneline("plan", "llama3-8b-instruct", "--profile", "t4", "--parameters", "70e9")
    assert small.exit_code == 1
    assert "-> lower prepare.max_seq_length" in small.output
    assert tuneline("plan", "demo", "--profile", "h300").exit_code != 0


CA = "placement.ca_bundle={config_map: company-ca}"


def certificates(cluster: Any) -> tuple[str, str]:
    (found,) = [check for check in look(recipe(CA)) if check.name == "certificates"]
    return found.verdict, found.words


def test_the_certificates_must_be_there(cluster: Any) -> None:
    words = "there is no ConfigMap company-ca in kubeflow: pods would wait"
    assert certificates(cluster) == ("fail", words)
    cluster.put("configmaps", "company-ca", data={"ca-bundle.crt": "x"})
    words = "the ConfigMap company-ca in kubeflow has no key ca.crt, only ca-bundle.crt"
    assert certificates(cluster) == ("fail", words)
    cluster.put("configmaps", "company-ca", data={"ca.crt": "x"})
    words = "the ConfigMap company-ca in kubeflow has the key ca.crt"
    assert certificates(cluster) == ("ok", words)
    cluster.forbidden.add("get configmaps")
    assert certificates(cluster)[0] == "unknown"


def test_a_pod_looks_at_the_certificates_that_it_has(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's service account may not read ConfigMaps."""
    cluster.forbidden.add("get configmaps")
    monkeypatch.setattr("tuneline.pipelines.plan.cluster.CA_PATH", str(tmp_path))
    assert certificates(cluster)[0] == "fail"
    (tmp_path / "ca.crt").write_text("x")
    assert certificates(cluster)[0] == "ok"


@pytest.mark.parametrize(
    ("no_proxy", "verdict", "words"),
    [
        (".svc", "warn", "asks the proxy for ml-pipeline.kubeflow.svc.cluster.local and seaweedfs"),
        (".svc,.cluster.local", "warn", "KFP's launcher asks the proxy for seaweedfs.kubeflow"),
        (".svc, .cluster.local, .kubeflow", "ok", "must hold the address of the Kubernetes API"),
        ("*", "ok", "HTTPS_PROXY without the services of KFP"),
    ],
)
def test_a_proxy_is_not_for_the_services_of_kfp(no_proxy: str, verdict: str, words: str) -> None:
    environment = {"HTTPS_PROXY": "http://proxy.example.com:3128", "NO_PROXY": no_proxy}
    loaded = recipe(f"placement.environment={json.dumps(environment)}")
    (found,) = [check for check in plan(loaded) if check.name == "proxy"]
    assert found.verdict == verdict
    assert words in found.words


def test_openshift_chooses_the_user_of_a_pod(cluster: Any) -> None:
    assert "user" not in verdicts(look())
    served = [{"name": "v1", "served": True, "storage": True}]
    names = {"plural": "securitycontextconstraints", "kind": "SecurityContextConstraints"}
    spec = {"group": "security.openshift.io", "scope": "Cluster", "names": names}
    crd = "securitycontextconstraints.security.openshift.io"
    cluster.put("customresourcedefinitions", crd, spec={**spec, "versions": served})
    (found,) = [check for check in look() if check.name == "user"]
    assert found.verdict == "warn"
    assert "restricted-v2 refuses pods of user 65532" in found.words
    assert "user" not in verdicts(look(recipe("placement.run_as_user=null")))
