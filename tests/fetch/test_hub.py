"""Fetch from a Hub: the unmodified client against a small server of its read-only routes."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import COMMIT, HubHandler, client_environment, downloaded, serve_files


@pytest.fixture
def hub(tiny_model_dir: Path, tmp_path: Path) -> Iterator[tuple[str, type[HubHandler]]]:
    model_dir = tmp_path / "hub"
    shutil.copytree(tiny_model_dir, model_dir, ignore=shutil.ignore_patterns("origin.json"))
    shutil.copy(model_dir / "model.safetensors", model_dir / "consolidated.safetensors")
    (model_dir / "pytorch_model.bin").write_bytes(b"pickle")
    with serve_files(model_dir) as served:
        yield served


def fetch(
    endpoint: str,
    source: str,
    tmp_path: Path,
    revision: str | None = None,
    version: str | None = None,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    tmp_path.mkdir(exist_ok=True)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"revision": revision} if revision else {}))
    return subprocess.run(
        [
            *(sys.executable, "-m", "tuneline.fetch", "--config", str(config)),
            *("--source", source, "--base-model", str(tmp_path / "out")),
            *(("--version", version) if version else ()),
        ],
        env=client_environment(endpoint, tmp_path / "hf") | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_download_is_recorded_with_its_commit(hub, tiny_model_dir: Path, tmp_path: Path) -> None:
    endpoint, handler = hub
    done = fetch(endpoint, "org/model", tmp_path, revision="v1")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    origin = json.loads((out / "origin.json").read_text())
    assert (origin["revision"], origin["licence"]) == (COMMIT, "llama3")
    weights = (out / "model.safetensors").read_bytes()
    assert weights == (tiny_model_dir / "model.safetensors").read_bytes()
    assert not (out / "model.safetensors").is_symlink()
    # The weights stand in the repository three times, and are downloaded once.
    fetched = downloaded(handler)
    assert "model.safetensors" in fetched
    assert not {"pytorch_model.bin", "consolidated.safetensors"} & fetched

    shutil.rmtree(out)
    again = fetch("http://127.0.0.1:9", "org/model", tmp_path, "v1", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert json.loads((out / "origin.json").read_text())["revision"] == COMMIT


@pytest.mark.slow
def test_the_commit_that_was_looked_up_is_fetched(hub, tmp_path: Path) -> None:
    endpoint, handler = hub
    handler.head = "b" * 40  # pushed after the look-up
    done = fetch(endpoint, "org/model", tmp_path, version=COMMIT)
    assert done.returncode == 0, done.stderr
    assert f"commit {COMMIT} is taken, not {handler.head}" in done.stderr
    assert json.loads((tmp_path / "out" / "origin.json").read_text())["revision"] == COMMIT
    done = fetch(endpoint, "org/model", tmp_path / "now")
    assert json.loads((tmp_path / "now/out/origin.json").read_text())["revision"] == handler.head


def test_the_version_of_a_model_is_its_commit(hub, tmp_path: Path) -> None:
    program = (
        "from tuneline.fetch import FetchConfig\n"
        "from tuneline.fetch.fingerprint import fingerprint\n"
        "print(fingerprint(FetchConfig(revision='v1'), source='org/model'))"
    )

    def look_up(**variables: str) -> subprocess.CompletedProcess[str]:
        environment = client_environment(hub[0], tmp_path / "hf") | variables
        command = [sys.executable, "-c", program]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert look_up().stdout == f"{COMMIT}\n"
    # Nothing was downloaded, so the cache knows nothing.
    assert "is not complete in the cache" in look_up(HF_HUB_OFFLINE="1").stderr
    assert fetch(hub[0], "org/model", tmp_path, "v1").returncode == 0
    assert look_up(HF_HUB_OFFLINE="1").stdout == f"{COMMIT}\n"


@pytest.mark.parametrize(
    ("source", "revision", "code", "sentence"),
    [
        ("org/gated", None, 2, "CredentialsError: org/gated is gated: ask for access"),
        ("org/none", None, 2, "has no model 'org/none' that this token may read"),
        ("org/model", "v9", 2, "ModelError: org/model has no revision 'v9'"),
    ],
)
def test_refusals(hub, tmp_path: Path, source, revision, code, sentence) -> None:
    done = fetch(hub[0], source, tmp_path, revision)
    assert done.returncode == code
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_pickle_only_repository_is_not_downloaded(hub, tmp_path: Path) -> None:
    endpoint, handler = hub
    for name in ("model.safetensors", "consolidated.safetensors"):
        (handler.model_dir / name).unlink()
    done = fetch(endpoint, "org/model", tmp_path)
    assert done.returncode == 2
    assert "org/model has its weights only as pickle (pytorch_model.bin)" in done.stderr
    assert not any("/resolve/" in path for path in handler.requests)


def test_no_network(tmp_path: Path) -> None:
    done = fetch("http://127.0.0.1:9", "org/model", tmp_path, TUNELINE_RETRY_SECONDS="0")
    assert done.returncode == 1
    assert "HubError: look up org/model at http://127.0.0.1:9: ConnectError: " in done.stderr
    assert "Traceback" not in done.stderr
