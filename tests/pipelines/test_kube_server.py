"""The server that the other tests ask is one that the real kubectl gets along with."""

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubectl import KUBECTL

MANIFESTS = Path(__file__).parents[2] / "manifests"


def kubectl(*arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [KUBECTL, *arguments],
        input=given, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def test_it_reads(kube_server: Any) -> None:
    kube_server.put("nodes", "gpu-1")
    kube_server.put("localqueues", "team")
    assert kubectl("get", "nodes", "-o", "name").stdout == "node/gpu-1\n"
    queues = kubectl("get", "localqueues", "-n", "kubeflow", "-o", "name")
    assert queues.stdout == "localqueue.kueue.x-k8s.io/team\n", queues.stderr
    assert "NotFound" in kubectl("get", "secret", "absent", "-n", "kubeflow").stderr
    kube_server.forbidden.add("list pods")
    assert "Forbidden" in kubectl("get", "pods", "-n", "kubeflow").stderr


@pytest.mark.parametrize(
    ("overlay", "how"),
    [("kubeflow", []), ("kubeflow", ["--server-side"]), ("standalone", []), ("dev", [])],
)
def test_an_overlay_is_applied_and_applied_again(
    kube_server: Any, overlay: str, how: list[str]
) -> None:
    command = ["-k", str(MANIFESTS / "overlays" / overlay), "--validate=false", *how]
    dry = kubectl("apply", *command, "--dry-run=server")
    assert dry.returncode == 0, dry.stderr
    assert kube_server.objects == {}
    done = kubectl("apply", *command)
    assert done.returncode == 0, done.stderr
    rendered = list(yaml.safe_load_all(kubectl("kustomize", command[1]).stdout))
    assert len(kube_server.objects) == len(rendered) == len(done.stdout.splitlines())
    kept = {(each["kind"], each["metadata"]["name"]): each for each in kube_server.objects.values()}
    for document in rendered:
        found = kept[document["kind"], document["metadata"]["name"]]
        assert {key: found[key] for key in document if key != "metadata"} == {
            key: value for key, value in document.items() if key != "metadata"
        }
    again = kubectl("apply", *command)
    assert again.returncode == 0, again.stderr
    if not how:
        assert all(line.endswith(" unchanged") for line in again.stdout.splitlines())
    gone = kubectl("delete", *command[:2], "--timeout=30s")
    assert gone.returncode == 0, gone.stderr
    assert kube_server.objects == {}


def test_it_refuses_as_kubernetes_does(kube_server: Any) -> None:
    claim = "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: x, namespace: kubeflow}\n"
    create = ("create", "-f", "-", "--validate=false")
    assert kubectl(*create, given=claim).returncode == 0
    assert "AlreadyExists" in kubectl(*create, given=claim).stderr
    patch = '{"metadata": {"labels": {"a": "b"}}}'
    assert kubectl("patch", "serviceaccount", "x", "-n", "kubeflow", "-p", patch).returncode == 0
    assert kube_server.objects["serviceaccounts", "kubeflow", "x"]["metadata"]["labels"] == {
        "a": "b"
    }
    kube_server.forbidden.add("delete serviceaccounts")
    assert "Forbidden" in kubectl("delete", "serviceaccount", "x", "-n", "kubeflow").stderr


def test_what_changes_can_be_waited_for(kube_server: Any) -> None:
    kube_server.put("trainjobs", "job", status={"conditions": []})
    command = ["wait", "trainjob/job", "-n", "kubeflow", "--for=condition=Complete"]
    assert "timed out" in kubectl(*command, "--timeout=1s").stderr
    before = len(kube_server.requests)
    with subprocess.Popen(
        ["kubectl", *command, "--timeout=30s"], stdout=subprocess.PIPE, text=True
    ) as process:
        while "WATCH trainjobs" not in kube_server.requests[before:]:
            assert process.poll() is None
            time.sleep(0.05)
        done = {"type": "Complete", "status": "True"}
        kube_server.put("trainjobs", "job", status={"conditions": [done]})
        output, _ = process.communicate(timeout=30)
    assert output == "trainjob.trainer.kubeflow.org/job condition met\n"
    assert process.returncode == 0
