"""The kustomizations: nothing dangles, and what is rendered belongs together.

Rendered by the real kubectl; Kubernetes 1.37 is asked for its schemas.
"""

import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kube_server import strict
from kubectl import KUBECTL

from tuneline import images
from tuneline.pipelines.lint.lint import lint_documents
from tuneline.placement import PlacementConfig
from tuneline.pods import NO_SIDECAR, PART_OF_LABEL
from tuneline.train.trainjob.manifest import CONTAINER, NODE_LABELS

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "manifests"
OVERLAYS = {
    "kubeflow": "tuneline", "standalone": "kubeflow", "dev": "kubeflow", "kind": "kubeflow",
}  # fmt: skip
CRDS = ROOT / "tests" / "data" / "crds"


def load(path: Path) -> list[dict[str, Any]]:
    return [found for found in yaml.safe_load_all(path.read_text(encoding="utf-8")) if found]


def kustomization(directory: Path) -> dict[str, Any]:
    (document,) = load(directory / "kustomization.yaml")
    return document


def referenced(directory: Path) -> list[Path]:
    """Every file and directory that a kustomization names, at any depth."""
    document = kustomization(directory)
    names = [*document.get("resources", []), *document.get("components", [])]
    found = []
    for path in ((directory / name).resolve() for name in names):
        assert path.exists(), f"{directory}: no {path}"
        found.append(path)
        if path.is_dir():
            found += referenced(path)
    return found


def resources(directory: Path) -> list[dict[str, Any]]:
    return [document for path in referenced(directory) if path.is_file() for document in load(path)]


def of_kind(documents: list[dict[str, Any]], kind: str, name: str | None = None) -> dict[str, Any]:
    (document,) = [
        found
        for found in documents
        if found["kind"] == kind and name in (None, found["metadata"]["name"])
    ]
    return document


def test_every_resource_is_used_by_an_overlay() -> None:
    used = {path for name in OVERLAYS for path in referenced(MANIFESTS / "overlays" / name)}
    there = {path.resolve() for path in MANIFESTS.rglob("*.yaml")}
    templates = {path.resolve() for path in (MANIFESTS / "secrets").glob("*.yaml")}
    # Its rules need the Prometheus Operator, so an administrator adds it.
    used |= set(referenced(MANIFESTS / "components" / "monitoring"))
    kustomizations = {path for path in there if path.name == "kustomization.yaml"}
    assert there - kustomizations - templates == {path for path in used if path.is_file()}
    assert templates


@pytest.mark.parametrize("name", OVERLAYS)
def test_names_are_unique_and_patches_have_a_target(name: str) -> None:
    directory = MANIFESTS / "overlays" / name
    documents = resources(directory)
    there = Counter((found["kind"], found["metadata"]["name"]) for found in documents)
    assert set(there.values()) == {1}
    for patch in kustomization(directory).get("patches", []):
        assert (patch["target"]["kind"], patch["target"]["name"]) in there
        yaml.safe_load(patch["patch"])


def test_the_binding_ties_what_exists() -> None:
    documents = resources(MANIFESTS / "base")
    binding = of_kind(documents, "RoleBinding")
    assert binding["roleRef"]["name"] == of_kind(documents, "Role")["metadata"]["name"]
    account = of_kind(documents, "ServiceAccount")["metadata"]["name"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account}]


def test_the_role_reads_no_secret_but_the_artifact_stores() -> None:
    rules = of_kind(resources(MANIFESTS / "base"), "Role")["rules"]
    for rule in rules:
        assert "*" not in [*rule["verbs"], *rule["resources"], *rule["apiGroups"]]
        if {"secrets", "configmaps"} & set(rule["resources"]):
            assert rule["resourceNames"]
        assert not {"delete", "update", "deletecollection", "escalate"} & set(rule["verbs"])


def test_the_network_policy_selects_the_pods_that_placement_labels() -> None:
    policy = of_kind(resources(MANIFESTS / "base"), "NetworkPolicy")["spec"]
    assert policy["podSelector"]["matchLabels"] == dict([PART_OF_LABEL])
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert "ingress" not in policy
    assert all(rule["ports"] for rule in policy["egress"])


def test_secret_templates_are_empty() -> None:
    for path in (MANIFESTS / "secrets").glob("*.yaml"):
        (secret,) = load(path)
        assert secret["kind"] == "Secret"
        assert set(secret["stringData"].values()) == {""}
        assert "data" not in secret


def test_the_trainer_role_allows_what_the_launcher_asks_for_and_no_more() -> None:
    documents = resources(MANIFESTS / "components" / "trainer")
    allowed = {
        f"{verb} {resource}"
        for rule in of_kind(documents, "Role")["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    source = (ROOT / "components/tuneline/train/trainjob/client.py").read_text(encoding="utf-8")
    # The client's names of calls: read_namespaced_pod_log, patch_namespaced_custom_object, ...
    called = set(re.findall(r"\.(\w+?)_namespaced_(\w+)\(", source))
    plurals = {
        "pod": "pods",
        "pod_log": "pods/log",
        "event": "events",
        "custom_object": "trainjobs",
    }
    verbs = {"read": "get"}
    # The exit handler lists the jobs of its run, and deletes them (tests/diagnose/test_cluster.py).
    asked = {f"{verbs.get(verb, verb)} {plurals[what]}" for verb, what in called}
    # Of the custom objects, JobSets are only read.
    assert allowed == asked | {"list trainjobs", "get jobsets"}
    binding = of_kind(documents, "RoleBinding")
    assert binding["roleRef"]["name"] == of_kind(documents, "Role")["metadata"]["name"]
    account = of_kind(resources(MANIFESTS / "base"), "ServiceAccount")["metadata"]["name"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account}]


def test_the_runtime_is_restricted_and_is_the_one_that_jobs_name() -> None:
    documents = resources(MANIFESTS / "components" / "trainer")
    runtime = of_kind(documents, "TrainingRuntime", PlacementConfig().trainer_runtime)
    assert runtime["kind"] == PlacementConfig().trainer_runtime_kind
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert job["name"] == container["name"] == CONTAINER
    assert container["image"] == images.TRAIN
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    selector = of_kind(documents, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"]
    assert pod["metadata"]["labels"] == NODE_LABELS
    assert selector.items() <= NODE_LABELS.items()
    assert pod["metadata"]["annotations"] == dict([NO_SIDECAR])
    # OpenShift chooses the user; elsewhere Trainer 2.2 sets it, or it is the image's.
    assert not {"runAsUser", "runAsGroup", "fsGroup"} & set(pod["spec"]["securityContext"])
    # A failed pod is kept for its log; no pod keeps a GPU for a minute after a run is cancelled.
    assert pod["spec"]["restartPolicy"] == "Never"
    assert pod["spec"]["terminationGracePeriodSeconds"] <= 30
    assert lint_documents(documents) == []


@pytest.mark.parametrize("name", ["tuneline", "tuneline-nodes"])
def test_the_runtimes_fit_trainers_schema(name: str) -> None:
    runtime = of_kind(resources(MANIFESTS / "components" / "trainer"), "TrainingRuntime", name)
    # Both kinds of runtime have one spec.
    (crd,) = load(CRDS / "trainer-v2.3.0" / "clustertrainingruntimes.yaml")
    (version,) = crd["spec"]["versions"]
    assert runtime["apiVersion"] == f"{crd['spec']['group']}/{version['name']}"
    schema = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    jsonschema.validate(runtime["spec"], strict(schema))
    misspelt = {**runtime["spec"], "mlPolicy": {"torsh": {}}}
    with pytest.raises(jsonschema.ValidationError, match="torsh"):
        jsonschema.validate(misspelt, strict(schema))


def test_the_local_queue_fits_kueues_schema() -> None:
    (queue,) = load(MANIFESTS / "components" / "kueue" / "local-queue.yaml")
    (crd,) = load(CRDS / "kueue-localqueues.yaml")
    version = queue["apiVersion"].rpartition("/")[2]
    (schema,) = [
        found["schema"]["openAPIV3Schema"]
        for found in crd["spec"]["versions"]
        if found["name"] == version and found["served"]
    ]
    assert queue["apiVersion"] == f"{crd['spec']['group']}/{version}"
    strict = {**schema["properties"]["spec"], "additionalProperties": False}
    jsonschema.validate(queue["spec"], strict)


@pytest.fixture(scope="module", params=OVERLAYS)
def rendered(request: pytest.FixtureRequest) -> tuple[str, list[dict[str, Any]]]:
    command = [KUBECTL, "kustomize", str(MANIFESTS / "overlays" / request.param)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return request.param, list(yaml.safe_load_all(done.stdout))


def test_rendered_resources_are_in_one_namespace(
    rendered: tuple[str, list[dict[str, Any]]],
) -> None:
    name, documents = rendered
    for document in documents:
        if document["kind"] == "PriorityClass":
            assert "namespace" not in document["metadata"]
        else:
            assert document["metadata"]["namespace"] == OVERLAYS[name]
        assert document["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "tuneline"
    for binding in (found for found in documents if found["kind"] == "RoleBinding"):
        assert [subject["namespace"] for subject in binding["subjects"]] == [OVERLAYS[name]]


def test_rendered_overlays_differ_where_they_should(
    rendered: tuple[str, list[dict[str, Any]]],
) -> None:
    name, documents = rendered
    always = {"ServiceAccount", "Role", "RoleBinding", "PersistentVolumeClaim"}
    always |= {"PriorityClass"} | ({"NetworkPolicy"} if name != "kind" else set())
    team = (
        {"ResourceQuota", "LimitRange", "LocalQueue", "TrainingRuntime"}
        if name == "kubeflow"
        else set()
    )
    assert {document["kind"] for document in documents} == always | team
    claim = of_kind(documents, "PersistentVolumeClaim", "tuneline-model-cache")["spec"]
    size = claim["resources"]["requests"]["storage"]
    small = name in ("dev", "kind")
    expected = (["ReadWriteOnce"], "20Gi") if small else (["ReadWriteMany"], "500Gi")
    assert (claim["accessModes"], size) == expected
    assert claim.get("storageClassName") == ("standard" if name == "kind" else None)


def test_kubernetes_knows_every_field(rendered: tuple[str, list[dict[str, Any]]]) -> None:
    secrets = [
        document for path in (MANIFESTS / "secrets").glob("*.yaml") for document in load(path)
    ]
    documents = [
        found
        for found in [*rendered[1], *secrets]
        if found["kind"] not in ("LocalQueue", "TrainingRuntime")
    ]
    for runtime in (found for found in rendered[1] if found["kind"] == "TrainingRuntime"):
        for job in runtime["spec"]["template"]["spec"]["replicatedJobs"]:
            pod = {**job["template"]["spec"]["template"], "apiVersion": "v1", "kind": "Pod"}
            documents.append({**pod, "metadata": {**pod["metadata"], "name": job["name"]}})
    for document in documents:
        kubernetes_validate.validate(document, "1.37", strict=True)
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate({**document, "misspelt": {}}, "1.37", strict=True)


def test_the_lint_has_nothing_to_say(rendered: tuple[str, list[dict[str, Any]]]) -> None:
    assert lint_documents(rendered[1]) == []
