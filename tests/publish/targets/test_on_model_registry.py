"""Kubeflow's Model Registry as a place: addresses of what an OCI registry holds, and the faults.

The client is the real one; see `model_registry_server` for the server.
"""

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import registry_server
from fault_proxy import proxying
from local_http import Fault
from model_registry_server import ROOT, TIME, ModelRegistryServer, serving
from publish_cases import content_of, staged_tree

from tuneline.artifacts import PublishedRepo
from tuneline.errors import (
    CredentialsError,
    DataError,
    HubError,
    OutputExistsError,
    RecipeError,
    TunelineError,
)
from tuneline.publish.config import PublishConfig
from tuneline.publish.target import check_targets, parse_targets
from tuneline.publish.targets.every import publish_everywhere
from tuneline.publish.targets.on_model_registry import OnModelRegistry, _address
from tuneline.runtime.parameter_text import encode_list

TARGET = "model-registry:support"
RECORDED = Path(__file__).parents[2] / "data" / "model-registry" / "exchanges.json"


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModelRegistryServer]:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("MODEL_REGISTRY_TOKEN", "ORAS_USER", "ORAS_PASS", "DOCKER_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    with serving() as server:
        monkeypatch.setenv("MODEL_REGISTRY_URL", server.url)
        yield server


@pytest.fixture
def store() -> Iterator[registry_server.RegistryServer]:
    """The registry that has the files."""
    with registry_server.serving() as server:
        yield server


def push(staged: list[Any], scratch: Path, store: registry_server.RegistryServer) -> list[Any]:
    return publish_everywhere(
        staged,
        parse_targets(encode_list([TARGET, f"oci://{store.host}/team"])),
        config=PublishConfig(max_attempts=1),
        scratch=scratch,
    )


def test_each_model_is_a_version(
    registry: ModelRegistryServer, store: registry_server.RegistryServer, tmp_path: Path
) -> None:
    """Pushed, pushed again, and another model; versions of others stay."""
    address = f"oci://{store.host}/team"
    repos = push(staged_tree(tmp_path), tmp_path / "a", store)
    assert [(repo.target, repo.url, repo.tag, repo.num_files) for repo in repos] == [
        (address, f"{address}/mine-lora:v1", "v1", 6),
        (address, f"{address}/mine:v1", "v1", 6),
        (TARGET, "model-registry:support-lora/v1", "v1", 0),
        (TARGET, "model-registry:support/v1", "v1", 0),
    ]
    assert registry.addresses("support") == {"v1": [f"{address}/mine:v1"]}
    assert registry.addresses("support-lora") == {"v1": [f"{address}/mine-lora:v1"]}
    (model,) = [key for key, each in registry.models.items() if each["name"] == "support"]
    theirs = {"name": "blessed", "registeredModelId": model, "id": "99", "state": "LIVE"}
    registry.versions["99"] = theirs
    assert push(staged_tree(tmp_path, speed=2), tmp_path / "b", store) == repos
    push(staged_tree(tmp_path, seed=2), tmp_path / "c", store)
    assert registry.addresses("support") == {
        **{f"v{number}": [f"{address}/mine:v{number}"] for number in (1, 2)},
        "blessed": [],
    }
    assert registry.versions["99"] == theirs
    properties = next(iter(registry.versions.values()))["customProperties"]
    assert properties["tuneline.kind"]["string_value"] == "adapter"
    assert OnModelRegistry(TARGET, PublishConfig()).read_last("mine") is None


def test_versions_of_others_alone(
    registry: ModelRegistryServer, store: registry_server.RegistryServer, tmp_path: Path
) -> None:
    registry.models["1"] = {"name": "support", "id": "1", "state": "LIVE"}
    theirs = {"name": "v1", "registeredModelId": "1", "id": "2", "state": "LIVE"}
    registry.versions["2"] = theirs
    with pytest.raises(OutputExistsError, match="registered model support of .* exists, but was n"):
        push(staged_tree(tmp_path), tmp_path / "a", store)
    assert registry.versions == {"2": theirs} and store.written == []


@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        (
            Fault("POST", "registered_models", 401),
            CredentialsError,
            "register support at",
        ),
        (
            Fault("POST", "model_versions", 403),
            CredentialsError,
            "make the version v1 of support",
        ),
        (Fault("POST", "artifacts", 404), DataError, "does not find it.*MODEL_REGISTRY_URL"),
        (Fault("POST", "model_versions", 409), HubError, "another run may have made it"),
        (Fault("POST", "model_versions", 400), DataError, "was refused: 400 injected"),
        (Fault("POST", "artifacts", 503), HubError, "register oci://.* the server answered 503"),
        (Fault("POST", "artifacts", 0), HubError, "register oci://.*run the step again later"),
    ],
)
def test_what_the_registry_refuses_is_a_sentence(
    registry: ModelRegistryServer,
    store: registry_server.RegistryServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
    error: type[Exception],
    says: str,
) -> None:
    """The other target has the model, and a repeat completes the version that was begun."""
    staged = staged_tree(tmp_path)[1:]
    with proxying(registry.url) as proxy:
        proxy.faults = [fault]
        monkeypatch.setenv("MODEL_REGISTRY_URL", proxy.url)
        with pytest.raises(error, match=f"^oci://.*/team has the model.*{says}") as raised:
            push(staged, tmp_path / "a", store)
        assert isinstance(raised.value, TunelineError)
        assert store.files("team/mine", "v1") == content_of(staged[0])
        store.written.clear()
        proxy.faults = []
        push(staged_tree(tmp_path, speed=2)[1:], tmp_path / "b", store)
    assert store.written == []
    assert registry.addresses("support") == {"v1": [f"oci://{store.host}/team/mine:v1"]}


def test_nothing_is_registered_that_no_target_has(
    registry: ModelRegistryServer, store: registry_server.RegistryServer, tmp_path: Path
) -> None:
    store.faults = [registry_server.Fault("PUT", "blobs", 403)]
    with pytest.raises(CredentialsError, match="no other target of the run has mine-lora"):
        push(staged_tree(tmp_path), tmp_path / "a", store)
    assert registry.models == {}


def test_which_address_is_registered(tmp_path: Path) -> None:
    (_, repo) = staged_tree(tmp_path)
    held = {
        "claim:models/team/mine": "pvc://models/team/mine",
        "me/mine": f"hf://me/mine:{'c' * 40}",
        "s3://bucket/team/mine": "s3://bucket/team/mine/v2",
        "abfs://bucket/team/mine": "abfs://bucket/team/mine/v2",
        "/srv/out/mine": None,
        "me/mine-lora": None,
    }
    everywhere = [
        PublishedRepo(
            repo=name,
            kind="merged",
            url=f"{name}/v2",
            commit="c" * 40,
            tag="v2",
            num_files=1,
            num_bytes=1,
        )
        for name in held
    ]
    for published in everywhere:
        assert _address(repo, [published]) == held[published.repo]
    assert _address(repo, everywhere) == held["me/mine"]


def test_credentials_and_addresses(
    registry: ModelRegistryServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.token = "s3cr3t-of-a-registry"
    with pytest.raises(CredentialsError, match="401 .*set MODEL_REGISTRY_TOKEN, or give"):
        OnModelRegistry(TARGET, PublishConfig(max_attempts=1)).check_access()
    monkeypatch.setenv("MODEL_REGISTRY_TOKEN", registry.token)
    OnModelRegistry(TARGET, PublishConfig(max_attempts=1)).check_access()
    for url in ("", "registry:8080"):
        monkeypatch.setenv("MODEL_REGISTRY_URL", url)
        with pytest.raises(RecipeError, match=f"MODEL_REGISTRY_URL is '{url}'. Set it to"):
            OnModelRegistry(TARGET, PublishConfig()).check_access()


@pytest.mark.parametrize("alone", [TARGET, [TARGET, "dir:/out"], [TARGET, "mlflow:support"]])
def test_a_registry_of_addresses_needs_an_address(alone: str | list[str]) -> None:
    with pytest.raises(RecipeError, match=f"names {TARGET}, which registers the address of"):
        check_targets(alone)
    others = [TARGET, "s3://bucket/x", "me/mine"]
    assert [each.kind for each in parse_targets(encode_list(others))] == [
        "hub",
        "store",
        "model-registry",
    ]


def test_the_small_server_answers_as_kubeflows_did(registry: ModelRegistryServer) -> None:
    """Statuses, types and bodies of 20 requests in their order, but for the times."""
    exchanges = json.loads(re.sub(r'(?<=Epoch": ")\d+', TIME, RECORDED.read_text("utf-8")))
    assert len(exchanges) == 20
    for each in exchanges:
        request = urllib.request.Request(
            registry.url + ROOT + each["path"],
            data=json.dumps(each["body"]).encode() if "body" in each else None,
            headers={"Content-Type": "application/json"},
            method=each["method"],
        )
        try:
            answer = urllib.request.urlopen(request)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            text = answer.read().decode()
            content = json.loads(text) if text.startswith("{") else text
        given = (answer.status, answer.headers["Content-Type"], content)
        assert given == (each["status"], each["type"], each["answer"]), each["path"]


def test_a_registry_without_the_api_v1_is_refused_before_anything_is_sent(
    registry: ModelRegistryServer,
    store: registry_server.RegistryServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Servers up to 0.3.14 answer each path of the API v1 as they answer an unknown one.

    The client takes this answer to a look-up for "no such model".
    """
    monkeypatch.setenv("MODEL_REGISTRY_URL", f"{registry.url}/older")
    with pytest.raises(DataError, match="404 page not found.*0.3.14 and older have only v1alpha3"):
        push(staged_tree(tmp_path), tmp_path / "a", store)
    assert store.written == []


def test_more_versions_than_a_page_has(
    registry: ModelRegistryServer, store: registry_server.RegistryServer, tmp_path: Path
) -> None:
    registry.max_page_size = 2
    for seed in range(1, 6):
        push(staged_tree(tmp_path, seed=seed)[1:], tmp_path / str(seed), store)
    assert list(registry.addresses("support")) == ["v1", "v2", "v3", "v4", "v5"]
