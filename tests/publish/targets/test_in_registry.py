"""OCI registries as places: what a push leaves there, and the fault table.

The first test runs against CNCF Distribution too, where `registry` is on the PATH:
`go install github.com/distribution/distribution/v3/cmd/registry@latest`, then `pytest -m slow`.
"""

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from oras.provider import Registry
from publish_cases import content_of, staged_tree
from registry_server import PASSWORD, TOKEN, USER, Fault, RegistryServer, serving

from tuneline.errors import (
    CredentialsError,
    DataError,
    HubError,
    OutputExistsError,
    ProofError,
    RecipeError,
    StorageError,
    TunelineError,
)
from tuneline.publish.config import PublishConfig
from tuneline.publish.previous import MARKER_FILE
from tuneline.publish.target import parse_targets
from tuneline.publish.targets.every import publish_everywhere
from tuneline.publish.targets.in_registry import InRegistry
from tuneline.publish.targets.registry_client import Client
from tuneline.runtime.parameter_text import encode_list


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the credentials of whoever runs the tests."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("ORAS_USER", "ORAS_PASS", "DOCKER_CONFIG", "TUNELINE_PLAIN_HTTP_REGISTRIES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def registry() -> Iterator[RegistryServer]:
    with serving() as server:
        yield server


@pytest.fixture(params=["small", pytest.param("distribution", marks=pytest.mark.slow)])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Host of the small registry, or of the real one."""
    if request.param == "small":
        with serving() as server:
            yield server.host
        return
    program = shutil.which("registry")
    if program is None:
        pytest.skip("the program registry of CNCF Distribution is not on the PATH")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = tmp_path / "registry.yml"
    config.write_text(
        f"version: 0.1\nstorage: {{inmemory: {{}}}}\nhttp: {{addr: '127.0.0.1:{port}'}}\n"
    )
    process = subprocess.Popen([program, "serve", config], stderr=subprocess.DEVNULL)
    for _ in range(200):
        with socket.socket() as connection:
            if connection.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    yield f"127.0.0.1:{port}"
    process.terminate()
    process.wait()


def push(staged: list[Any], scratch: Path, targets: str | list[str]) -> list[Any]:
    return publish_everywhere(
        staged,
        parse_targets(encode_list(targets)),
        config=PublishConfig(max_attempts=1),
        scratch=scratch,
    )


def pulled(host: str, version: str, directory: Path) -> dict[str, bytes]:
    """Return what oras's own client pulls."""
    client = Registry(host, insecure=True)
    client.pull(f"{host}/team/{version}", outdir=str(directory))
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_each_model_is_a_version(host: str, tmp_path: Path) -> None:
    """Pushed, pushed again, another model, read back, and pulled by oras; others' tags stay."""
    address = f"oci://{host}/team"
    first = staged_tree(tmp_path)
    repos = push(first, tmp_path / "a", address)
    assert [(repo.repo, repo.url, repo.tag, repo.num_files) for repo in repos] == [
        (f"{address}/{name}", f"{address}/{name}:v1", "v1", 6) for name in ("mine-lora", "mine")
    ]
    for repo in first:
        name = repo.folder.name
        assert pulled(host, f"{name}:v1", tmp_path / "pulled" / name) == content_of(repo)
    # Somebody's own tag on our manifest.
    client = Client(host)
    at = client.get_container(f"{host}/team/mine:v1")
    manifest = client.get_manifest(at)
    client.upload_manifest(manifest, client.get_container(f"{host}/team/mine:stable"))
    assert push(staged_tree(tmp_path, speed=2), tmp_path / "b", address) == repos
    second = staged_tree(tmp_path, seed=2)
    assert [repo.tag for repo in push(second, tmp_path / "c", address)] == ["v2", "v2"]
    assert sorted(client.get_tags(at)) == ["stable", "v1", "v2"]
    assert client.get_manifest(at) == manifest
    assert pulled(host, "mine:v2", tmp_path / "pulled/2") == content_of(second[1])
    place = InRegistry(address, PublishConfig(max_attempts=1))
    read = place.read_last("mine")
    assert read is not None and json.loads(read) == json.loads(
        (second[1].folder / MARKER_FILE).read_text()
    )
    assert place.read_last("other") is None
    assert pulled(host, "mine:v1", tmp_path / "pulled/1") == content_of(first[1])
    # Bytes that are not those of their digest.
    layer = {"digest": f"sha256:{'0' * 64}", "size": 6}
    with pytest.raises(Exception, match="400 DIGEST_INVALID"):
        client.put_upload(str(first[0].folder / "README.md"), at, layer)


def test_a_repeat_sends_only_what_is_missing(registry: RegistryServer, tmp_path: Path) -> None:
    address = f"oci://{registry.host}/team"
    staged = staged_tree(tmp_path)
    weights = json.loads((staged[1].folder / MARKER_FILE).read_text())["files"]["model.safetensors"]
    registry.faults = [Fault("PUT", f"team/mine/blobs/uploads/{part}", 0) for part in ("",)]
    with pytest.raises(HubError, match="send .* at oci://.*files that arrived are not sent again"):
        push(staged, tmp_path / "a", address)
    assert list(registry.tags) == ["team/mine-lora"]
    registry.faults = []
    push(staged, tmp_path / "b", address)
    assert registry.files("team/mine", "v1") == content_of(staged[1])
    assert registry.tags["team/mine-lora"].keys() == {"v1"}
    # A blob that somebody removed: the version is not taken for the model.
    del registry.blobs["team/mine", f"sha256:{weights}"]
    registry.written.clear()
    third = push(staged_tree(tmp_path, speed=2), tmp_path / "c", address)
    assert [repo.tag for repo in third] == ["v1", "v2"]
    assert f"sha256:{weights}" in registry.written and "v2" in registry.written


@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        (Fault("GET", "tags/list", 401, "UNAUTHORIZED"), CredentialsError, "ORAS_USER and ORAS_PA"),
        (Fault("POST", "mine-lora", 403, "DENIED"), CredentialsError, "begin an upload to mine-lo"),
        (Fault("POST", "mine", 404, "NAME_UNKNOWN"), DataError, "the project or the repository to"),
        (Fault("POST", "mine", 405, "UNSUPPORTED"), DataError, "registry is read-only"),
        (
            Fault("PUT", "blobs", 403, "DENIED", "exceeds the limit"),
            StorageError,
            "quota",
        ),
        (Fault("PUT", "blobs", 413), StorageError, "lower merge.max_shard_bytes"),
        (Fault("PUT", "blobs", 507), StorageError, "the registry is full"),
        (Fault("PUT", "blobs", 503), HubError, "the server answered 503"),
        (Fault("PUT", "blobs", 400, "DIGEST_INVALID"), ProofError, "is not what was proven"),
        (Fault("PUT", "v1", 409, "CONFLICT"), OutputExistsError, "does not replace what exists"),
        (Fault("PUT", "v1", 412, "PRECONDITION"), OutputExistsError, "Another run may"),
        (
            Fault("PUT", "v1", 400, "MANIFEST_INVALID"),
            DataError,
            "set the tag v1 of mine.*was",
        ),
        (Fault("GET", "blobs", 0), HubError, "read back README.md at oci"),
    ],
)
def test_what_a_registry_refuses_is_a_sentence(
    registry: RegistryServer, tmp_path: Path, fault: Fault, error: type[Exception], says: str
) -> None:
    registry.faults = [fault]
    address = f"oci://{registry.host}/team"
    with pytest.raises(error, match=says) as raised:
        push(staged_tree(tmp_path), tmp_path / "a", address)
    assert isinstance(raised.value, TunelineError)
    assert registry.tags == {} or not any(registry.tags.values())
    registry.faults = []
    push(staged_tree(tmp_path, speed=2), tmp_path / "b", address)
    assert set(registry.tags["team/mine"]) == {"v1"}


def test_nothing_of_others_is_replaced(registry: RegistryServer, tmp_path: Path) -> None:
    address = f"oci://{registry.host}/team"
    registry.tags["team/mine"] = {"v1": b'{"layers": [], "config": {}}', "latest": b"{}"}
    before = {tag: data for tag, data in registry.tags["team/mine"].items()}
    with pytest.raises(OutputExistsError, match="mine exists, but was not made by tuneline: it ha"):
        push(staged_tree(tmp_path), tmp_path / "a", address)
    assert registry.tags == {"team/mine": before} and registry.written == []
    registry.tags.clear()
    push(staged_tree(tmp_path, speed=2), tmp_path / "b", address)
    registry.tags["team/mine"]["v1"] = registry.tags["team/mine-lora"]["v1"]
    registry.blobs |= {("team/mine", digest): data for (_, digest), data in registry.blobs.items()}
    with pytest.raises(OutputExistsError, match="holds the kind 'adapter' of another run"):
        push(staged_tree(tmp_path, seed=2), tmp_path / "c", address)


def test_two_runs_at_once_do_not_share_a_tag(
    registry: RegistryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run sets the tag between this run's look and its own."""
    send = InRegistry._send

    def late(self: InRegistry, *args: Any) -> Any:
        registry.tags.setdefault("team/mine-lora", {})["v1"] = b"theirs"
        return send(self, *args)

    monkeypatch.setattr(InRegistry, "_send", late)
    with pytest.raises(OutputExistsError, match="mine-lora:v1 was set by another run"):
        push(staged_tree(tmp_path), tmp_path / "a", f"oci://{registry.host}/team")
    assert registry.tags == {"team/mine-lora": {"v1": b"theirs"}}


def test_bytes_that_changed_there_are_not_published(
    registry: RegistryServer, tmp_path: Path
) -> None:
    staged = staged_tree(tmp_path)
    files = json.loads((staged[0].folder / MARKER_FILE).read_text())["files"]
    registry.blobs["team/mine-lora", f"sha256:{files['model.safetensors']}"] = b"damaged"
    with pytest.raises(ProofError, match="model.safetensors at .*mine-lora is not what was proven"):
        push(staged, tmp_path / "a", f"oci://{registry.host}/team")
    assert registry.tags == {}


@pytest.mark.parametrize("auth", ["Basic", "Bearer"])
@pytest.mark.parametrize("source", ["variables", "config"])
def test_credentials(
    registry: RegistryServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    auth: str,
    source: str,
) -> None:
    """Of both ways to ask for them, and both places to find them; a wrong one is a sentence."""
    registry.auth = auth
    address = f"oci://{registry.host}/team"
    with pytest.raises(CredentialsError, match="is not allowed .401 UNAUTHORIZED.*DOCKER_CONFIG"):
        InRegistry(address, PublishConfig(max_attempts=1)).check_access("mine")
    if source == "variables":
        monkeypatch.setenv("ORAS_USER", USER)
        monkeypatch.setenv("ORAS_PASS", PASSWORD)
    else:
        import base64

        secret = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        config = {"auths": {registry.host: {"auth": secret}}}
        tmp_path.joinpath("config.json").write_text(json.dumps(config))
        monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    staged = staged_tree(tmp_path)
    record = push(staged, tmp_path / "a", address)
    assert registry.files("team/mine", "v1") == content_of(staged[1])
    said = caplog.text + repr(record)
    assert PASSWORD not in said and TOKEN not in said
    assert not re.search("robot:|Basic |Bearer ", said)


def test_names_of_repositories(registry: RegistryServer, tmp_path: Path) -> None:
    place = InRegistry(f"oci://{registry.host}/team", PublishConfig(max_attempts=1))
    with pytest.raises(RecipeError, match="'a..b' cannot be the name of a repository"):
        place.check_access("a..b")
    staged = [
        type(each)(each.repo, each.kind, each.folder.rename(tmp_path / each.folder.name.upper()))
        for each in staged_tree(tmp_path)
    ]
    assert [repo.repo.rpartition("/")[2] for repo in place.push(staged)] == ["mine-lora", "mine"]


def test_a_target_that_fails_does_not_keep_others_from_the_model(
    registry: RegistryServer, tmp_path: Path
) -> None:
    targets = [f"oci://{registry.host}/team", f"dir:{tmp_path}/out"]
    registry.faults = [Fault("PUT", "team/mine/blobs", 403, "DENIED")]
    with pytest.raises(CredentialsError, match="out has the model. oci://.*/team failed: send"):
        push(staged_tree(tmp_path), tmp_path / "a", targets)
    registry.faults = []
    repos = push(staged := staged_tree(tmp_path, speed=2), tmp_path / "b", targets)
    assert [repo.url for repo in repos[:2]] == [
        f"oci://{registry.host}/team/{name}:v1" for name in ("mine-lora", "mine")
    ]
    assert registry.files("team/mine", "v1") == content_of(staged[1])


def test_a_host_that_is_away(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"oci://127.0.0.1:{free.getsockname()[1]}/team"
        place = InRegistry(address, PublishConfig(max_attempts=1))
        with pytest.raises(HubError, match="look up mine at oci://127.*after 1 attempt"):
            place.read_last("mine")
