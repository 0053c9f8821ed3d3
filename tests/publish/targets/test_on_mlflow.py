"""MLflow as a place: what a push leaves there, and the fault table.

The client is the real one. Without more, its own store in a directory is the server; where
MLFLOW_PROGRAM names the program `mlflow` of an environment with the whole package (`pip install
mlflow`), `pytest -m slow` runs the tests against `mlflow server` too.
"""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import proxying
from local_http import Fault
from mlflow import MlflowClient
from publish_cases import content_of, staged_tree

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
from tuneline.publish.targets.on_mlflow import OnMlflow
from tuneline.runtime.parameter_text import encode_list

TARGET = "mlflow:support"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits, and nothing of whoever runs the tests is used."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_TRACKING")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a real MLflow server."""
    program = os.environ.get("MLFLOW_PROGRAM")
    if not program:
        pytest.skip("MLFLOW_PROGRAM names no program mlflow of an environment with all of MLflow")
    root = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = f"--backend-store-uri=sqlite:///{root}/db --artifacts-destination={root}/artifacts"
    process = subprocess.Popen(
        [program, "server", "--workers=1", f"--port={port}", *store.split()],
        env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    for _ in range(900):
        with socket.socket() as connection:
            if connection.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert process.poll() is None
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    os.killpg(process.pid, 15)
    process.wait()


@pytest.fixture(params=["directory", pytest.param("server", marks=pytest.mark.slow)])
def client(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> MlflowClient:
    """The client of the server that MLFLOW_TRACKING_URI names."""
    is_server = request.param == "server"
    address = request.getfixturevalue("server") if is_server else (tmp_path / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    return MlflowClient()


def push(staged: list[Any], scratch: Path, targets: str | list[str] = TARGET) -> list[Any]:
    return publish_everywhere(
        staged,
        parse_targets(encode_list(targets)),
        config=PublishConfig(max_attempts=1),
        scratch=scratch,
    )


def content(client: MlflowClient, name: str, version: int, directory: Path) -> dict[str, bytes]:
    """Return the files of a version, as MLflow's own client downloads them."""
    found = client.get_model_version(name, str(version))
    assert found.status == "READY"
    directory.mkdir(parents=True)
    root = Path(client.download_artifacts(found.run_id, "model", str(directory)))
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def test_each_model_is_a_version(client: MlflowClient, tmp_path: Path) -> None:
    """Pushed, pushed again, another model, and read back; versions of others stay."""
    first = staged_tree(tmp_path)
    repos = push(first, tmp_path / "a")
    assert [(repo.repo, repo.url, repo.tag, repo.num_files) for repo in repos] == [
        (f"mlflow:{name}", f"models:/{name}/1", "v1", 6) for name in ("support-lora", "support")
    ]
    for repo, name in zip(first, ("support-lora", "support"), strict=True):
        assert content(client, name, 1, tmp_path / f"read/{name}") == content_of(repo)
    run = client.get_run(client.get_model_version("support", "1").run_id)
    assert run.info.status == "FINISHED"
    # A version of somebody else, and a model that was pushed again.
    source = f"{run.info.artifact_uri}/model"
    theirs = client.create_model_version("support", source, run.info.run_id)
    assert int(theirs.version) == 2
    assert push(staged_tree(tmp_path, speed=2), tmp_path / "b") == repos
    second = staged_tree(tmp_path, seed=2)
    assert [repo.url for repo in push(second, tmp_path / "c")] == [
        "models:/support-lora/2",
        "models:/support/3",
    ]
    assert content(client, "support", 3, tmp_path / "read/3") == content_of(second[1])
    assert content(client, "support", 1, tmp_path / "read/1") == content_of(first[1])
    read = OnMlflow(TARGET, PublishConfig(max_attempts=1)).read_last("mine")
    assert read == (second[1].folder / MARKER_FILE).read_text()
    assert OnMlflow("mlflow:other", PublishConfig(max_attempts=1)).read_last("mine") is None
    # Another kind, and versions of others alone.
    other = [replace(repo, kind="gguf") for repo in staged_tree(tmp_path, seed=3)[:1]]
    with pytest.raises(OutputExistsError, match="holds the kind 'adapter' of another run"):
        push([*other, *staged_tree(tmp_path, seed=4)[1:]], tmp_path / "d")
    client.create_registered_model("theirs")
    client.create_model_version("theirs", source, run.info.run_id)
    with pytest.raises(OutputExistsError, match="theirs exists, but was not made by tuneline"):
        push(staged_tree(tmp_path, seed=5), tmp_path / "e", "mlflow:theirs")
    assert len(client.search_model_versions("name='theirs'")) == 1


def test_a_repeat_continues_the_run(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The push ends in the middle; the next one sends what is missing, and what was damaged."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "repeat")
    staged = staged_tree(tmp_path, seed=6)
    send, sent = MlflowClient.log_artifact, []

    def cut(self: MlflowClient, run: str, path: str, folder: str) -> None:
        if len(sent) == 8:
            raise ConnectionResetError("cut")
        sent.append(Path(path).name)
        send(self, run, path, folder)

    monkeypatch.setattr(MlflowClient, "log_artifact", cut)
    with pytest.raises(HubError, match="send .*: ConnectionResetError: cut.*files that arrived"):
        push(staged, tmp_path / "a", "mlflow:repeat")
    assert client.search_model_versions("name='repeat'") == []
    (run,) = client.search_runs(
        [client.get_experiment_by_name("repeat").experiment_id], "status = 'RUNNING'"
    )
    damaged = tmp_path / "config.json"
    damaged.write_text("damaged")
    send(client, run.info.run_id, str(damaged), "model")
    sent.clear()
    monkeypatch.setattr(
        MlflowClient, "log_artifact", lambda *args: (sent.append(Path(args[2]).name), send(*args))
    )
    repos = push(staged_tree(tmp_path, seed=6, speed=2), tmp_path / "b", "mlflow:repeat")
    assert [repo.url for repo in repos] == ["models:/repeat-lora/1", "models:/repeat/1"]
    assert client.get_model_version("repeat", "1").run_id == run.info.run_id
    # Of the merged model, the card and config.json had arrived; one is new, one was damaged.
    assert sorted(sent) == sorted(path.name for path in staged[1].files().values())
    sent.clear()
    push(staged_tree(tmp_path, seed=6, speed=3), tmp_path / "again", "mlflow:repeat")
    assert sent == []
    # Bytes that change on the way.
    monkeypatch.setattr(
        MlflowClient, "log_artifact", lambda c, run, path, at: send(c, run, str(damaged), at)
    )
    damaged = damaged.rename(tmp_path / "README.md")
    with pytest.raises(ProofError, match="README.md in MLflow's run .* is not what was proven"):
        push(staged_tree(tmp_path, seed=7), tmp_path / "c", "mlflow:repeat")
    assert len(client.search_model_versions("name='repeat'")) == 1


@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        (Fault("GET", "", 401, "login"), CredentialsError, "look up models at mlflow:support may"),
        (Fault("GET", "", 403, "no"), CredentialsError, "MLFLOW_TRACKING_USERNAME and MLFLOW_TRAC"),
        (Fault("GET", "", 404, "no"), DataError, "does not find it.*Check MLFLOW_TRACKING_URI"),
        (Fault("GET", "", 503, "busy"), HubError, "503 error responses.*run the step again"),
        (Fault("GET", "", 0), HubError, "run the step again later"),
    ],
)
def test_a_server_that_refuses_everything(
    monkeypatch: pytest.MonkeyPatch, fault: Fault, error: type[Exception], says: str
) -> None:
    """The real client, and a server that answers every request with a fault."""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "s3cr3t-of-mlflow")
    with proxying("http://127.0.0.1:9") as proxy:
        proxy.faults = [fault]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
        with pytest.raises(error, match=says) as raised:
            OnMlflow(TARGET, PublishConfig(max_attempts=1)).check_access()
    assert "s3cr3t" not in str(raised.value) and isinstance(raised.value, TunelineError)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        (Fault("POST", "runs/create", 403), CredentialsError, "begin a run at .* may not be writ"),
        (Fault("PUT", "model/config.json", 403), CredentialsError, "send config.json at mlflow:"),
        (Fault("PUT", "model/model.safe", 413), StorageError, "lower merge.max_shard_bytes"),
        (Fault("PUT", "model/model.safe", 507), StorageError, "the artifact store is full"),
        (Fault("PUT", "model/model.safe", 500), HubError, "send model.safetensors at mlflow:"),
        (Fault("PUT", "model/model.safe", 0), HubError, "files that arrived are not sent again"),
        (Fault("GET", "model/tuneline.json", 0), HubError, "read back tuneline.json at mlflow:"),
        (Fault("POST", "model-versions/create", 409), DataError, "create a version of x.*refused"),
    ],
)
def test_what_mlflow_refuses_is_a_sentence(
    server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    fault: Fault,
    error: type[Exception],
    says: str,
) -> None:
    """No version is made; the next push of the model completes it, in the run that was begun."""
    name = f"x{abs(hash(request.node.name))}"
    staged = staged_tree(tmp_path, seed=8)
    with proxying(server) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
        proxy.faults = [fault]
        with pytest.raises(error, match=says):
            push(staged, tmp_path / "a", f"mlflow:{name}")
        assert MlflowClient().search_model_versions(f"name='{name}'") == []
        proxy.faults = []
        push(staged, tmp_path / "b", f"mlflow:{name}")
        assert content(MlflowClient(), name, 1, tmp_path / "read") == content_of(staged[1])


def test_what_is_missing_here_is_a_sentence(tmp_path: Path, client: MlflowClient) -> None:
    experiment = client.get_experiment_by_name("tuneline")
    deleted = experiment.experiment_id if experiment else client.create_experiment("tuneline")
    client.delete_experiment(deleted)
    with pytest.raises(DataError, match="experiment 'tuneline' is deleted. Restore it"):
        push(staged_tree(tmp_path, seed=9), tmp_path / "a", "mlflow:new")
    client.restore_experiment(deleted)


def test_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="MLFLOW_TRACKING_URI, the address of MLflow's server"):
        OnMlflow(TARGET, PublishConfig()).check_access()
