"""The TrainJob that the launcher creates, for each version of Kubeflow Trainer.

The server holds what it is sent against the schemas that Trainer ships.
"""

import json
from typing import Any

import pytest
from trainjob_cases import NAME, OWNER, body_for, schema_of

from tuneline.errors import (
    ClusterError,
)
from tuneline.pipelines.lint.lint import lint_documents
from tuneline.runtime.kubernetes_client import connect
from tuneline.train.trainjob.client import TrainJobs
from tuneline.train.trainjob.manifest import NODE_LABELS

VERSIONS = ["v2.0.0", "v2.0.1", "v2.1.0", "v2.2.1", "v2.3.0"]


@pytest.mark.parametrize("version", VERSIONS)
def test_each_version_of_trainer_takes_the_job(server: Any, version: str) -> None:
    server.trainjob_schema = schema_of(version)
    jobs = TrainJobs(connect(num_retries=0), "kubeflow")
    body = body_for(jobs.supported())
    jobs.create(body)
    found = jobs.get(NAME)
    assert found is not None
    assert lint_documents([found]) == []
    spec = found["spec"]
    assert ("activeDeadlineSeconds" in spec) == (version >= "v2.2")
    minor = version[:4]
    if minor == "v2.0":
        template = {"spec": spec["podSpecOverrides"][0]}
    elif minor == "v2.1":
        template = spec["podTemplateOverrides"][0]
    else:
        runtime = spec["runtimePatches"][0]["trainingRuntimeSpec"]
        template = runtime["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    pod = template["spec"]
    # The runtime sets them too, for 2.0; a runtime of the cluster's would not.
    if minor != "v2.0":
        assert template["metadata"]["annotations"] == {"sidecar.istio.io/inject": "false"}
        assert template["metadata"]["labels"] == {**NODE_LABELS, "pipeline/runid": "run-1"}
    user = {"runAsUser": 65532} if version >= "v2.2" else None
    assert pod.get("securityContext") == user
    assert {"name": "dshm", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]
    assert {"name": "ca-bundle", "configMap": {"name": "company-ca"}} in pod["volumes"]
    certificates = {"name": "ca-bundle", "mountPath": "/etc/tuneline/ca", "readOnly": True}
    assert certificates in pod["containers"][0]["volumeMounts"]
    plain = {each["name"]: each.get("value") for each in spec["trainer"]["env"]}
    assert plain["HF_ENDPOINT"] == "https://hub.example.com"
    assert plain["SSL_CERT_FILE"] == "/etc/tuneline/ca/c"
    assert pod["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    ]
    # Before 2.1 there is no affinity.
    assert ("affinity" in pod) == (minor != "v2.0")
    assert ("nvidia.com/gpu.product" in pod["nodeSelector"]) == (minor == "v2.0")
    # No patch of environment, and a secret's value nowhere.
    assert "env" not in pod["containers"][0]
    secret = {"name": "wandb", "key": "key", "optional": True}
    assert {"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": secret}} in spec["trainer"][
        "env"
    ]
    assert found["metadata"]["ownerReferences"] == [OWNER]
    assert found["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert spec["trainer"]["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == "8"
    # One that is there already is no error, and stays.
    jobs.create(body_for(jobs.supported(), num_nodes=4))
    assert jobs.get(NAME) == found


def test_the_server_refuses_what_a_version_does_not_know(server: Any) -> None:
    server.trainjob_schema = schema_of("v2.0.0")
    jobs = TrainJobs(connect(num_retries=0), "kubeflow")
    with pytest.raises(ClusterError, match="400 .*runtimePatches.* unexpected"):
        jobs.create(body_for({"runtimePatches"}))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"accelerator_products": ["A", "B"]}, "cannot choose among the GPU products A, B"),
        ({"image_pull_secrets": ["registry"]}, "cannot set image pull secrets"),
    ],
)
def test_what_an_old_trainer_cannot_say_is_an_error(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ClusterError, match=says):
        body_for({"podSpecOverrides"}, **changed)


@pytest.mark.parametrize("field", ["podSpecOverrides", "podTemplateOverrides", "runtimePatches"])
@pytest.mark.parametrize("user", [None, 65532, 1000])
def test_the_pods_have_the_user_of_the_recipe(field: str, user: int | None) -> None:
    if field != "runtimePatches" and user == 1000:
        with pytest.raises(
            ClusterError, match=r"2.1 cannot set the user.*to 1000 .*image is 65532"
        ):
            body_for({field}, run_as_user=user)
        return
    text = json.dumps(body_for({field}, run_as_user=user))
    # null: the platform's, as OpenShift refuses a user outside of the namespace's range.
    assert (f'"runAsUser": {user}' in text) == (field == "runtimePatches" and user is not None)
    assert text.count("runAsUser") <= 1
