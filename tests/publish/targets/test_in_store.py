"""Stores of files as places: what a push leaves there, and the fault table.

The server is moto's, which answers the requests of S3's API from memory. Faults are injected into
its application, so that s3fs and botocore are the real ones.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import s3fs
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer
from s3_environment import use_s3

from tuneline.errors import (
    CredentialsError,
    DataError,
    HubError,
    OutputExistsError,
    ProofError,
    StorageError,
    TunelineError,
)
from tuneline.publish.config import PublishConfig
from tuneline.publish.previous import MARKER_FILE
from tuneline.publish.staging import StagedRepo
from tuneline.publish.target import parse_targets
from tuneline.publish.targets.every import publish_everywhere
from tuneline.publish.targets.in_store import UPLOAD_FILE, InStore
from tuneline.runtime.parameter_text import encode_list

ADDRESS = "s3://models/team"
STORE = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
"""What the server keeps, to look into and to add to without a request."""
WEIGHTS = bytes(range(256)) * 40


@dataclass
class Fault:
    """An answer that the server gives instead of its own."""

    method: str
    part: str
    """Part of the paths that get it."""
    status: int
    code: str
    times: int = 99


@dataclass
class Faulty:
    """An application that answers some requests with faults, and counts those that write."""

    app: Any
    faults: list[Fault] = field(default_factory=list)
    written: list[str] = field(default_factory=list)

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        for fault in self.faults:
            if fault.times and method == fault.method and fault.part in path:
                fault.times -= 1
                body = f"<Error><Code>{fault.code}</Code><Message>injected</Message></Error>"
                start(f"{fault.status} injected", [("Content-Type", "application/xml")])
                return [body.encode()]
        if method == "PUT":
            self.written.append(path)
        if method == "DELETE":
            self.written.append(f"delete {path}")
        return self.app(environ, start)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Faulty]]:
    moto = ThreadedMotoServer(port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    faulty = Faulty(moto._server.app)
    moto._server.app = faulty
    yield f"http://{host}:{port}", faulty
    moto.stop()


@pytest.fixture
def faulty(server: tuple[str, Faulty], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Faulty:
    """The server, with an empty bucket `models`; nothing waits."""
    endpoint, faulty = server
    use_s3(endpoint, monkeypatch, tmp_path)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    # s3fs repeats five times, with pauses; its five seconds to connect are few on a busy machine.
    for name, number in {"retries": 1, "connect_timeout": 60, "read_timeout": 60}.items():
        monkeypatch.setattr(s3fs.S3FileSystem, name, number)
    STORE.reset()
    STORE.create_bucket("models", "us-east-1")
    faulty.faults, faulty.written = [], []
    return faulty


def objects() -> dict[str, bytes]:
    return {name: key.value for name, key in STORE.buckets["models"].keys.items()}


def put(key: str, body: bytes) -> None:
    STORE.put_object("models", key, body)


@pytest.fixture
def stage(tmp_path: Path) -> Callable[..., list[StagedRepo]]:
    """A function that stages `mine-lora` and `mine` as `stage` does."""

    def staged(seed: int = 1, speed: int = 1) -> list[StagedRepo]:
        repos = []
        for name, kind in (("mine-lora", "adapter"), ("mine", "merged")):
            folder = tmp_path / f"staged-{seed}-{speed}" / name
            folder.mkdir(parents=True)
            files = {"config.json": str(seed).encode(), "model.safetensors": WEIGHTS}
            for file, content in files.items():
                folder.joinpath(file).write_bytes(content)
            hashes = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
            folder.joinpath("README.md").write_text(f"{speed} tokens per second")
            marker = {"files": hashes, "kind": kind, "card": {"sha256": str(speed)}}
            folder.joinpath(MARKER_FILE).write_text(json.dumps(marker))
            repos.append(StagedRepo(name, kind, folder))
        return repos

    return staged


def push(staged: list[StagedRepo], scratch: Path, targets: str | list[str] = ADDRESS) -> list[Any]:
    return publish_everywhere(
        staged,
        parse_targets(encode_list(targets)),
        config=PublishConfig(max_attempts=1),
        scratch=scratch,
    )


def contents(staged: list[StagedRepo], tag: str) -> dict[str, bytes]:
    return {
        f"team/{repo.folder.name}/{tag}/{name}": path.read_bytes()
        for repo in staged
        for name, path in repo.files().items()
    }


def test_each_model_is_a_version(
    faulty: Faulty, stage: Callable[..., list[StagedRepo]], tmp_path: Path
) -> None:
    """Pushed, pushed again, another model, and read back; files of people stay."""
    first = stage()
    repos = push(first, tmp_path / "a")
    assert objects() == contents(first, "v1")
    assert [(repo.url, repo.tag, repo.target) for repo in repos] == [
        (f"{ADDRESS}/mine-lora/v1", "v1", ADDRESS),
        (f"{ADDRESS}/mine/v1", "v1", ADDRESS),
    ]
    put("team/mine/notes.txt", b"theirs")
    put("team/mine/v1/added.txt", b"theirs too")
    theirs = {"team/mine/notes.txt": b"theirs", "team/mine/v1/added.txt": b"theirs too"}
    faulty.written.clear()
    assert push(stage(speed=2), tmp_path / "b") == repos
    assert faulty.written == []
    second = stage(seed=2)
    assert [repo.tag for repo in push(second, tmp_path / "c")] == ["v2", "v2"]
    assert objects() == contents(first, "v1") | contents(second, "v2") | theirs
    # A version from which somebody removed a file is not taken for the model.
    del STORE.buckets["models"].keys["team/mine/v2/config.json"]
    third = push(stage(seed=2, speed=2), tmp_path / "d")
    assert [repo.tag for repo in third] == ["v2", "v3"]
    place = InStore(ADDRESS, PublishConfig())
    read = place.read_last("mine")
    assert read is not None and json.loads(read)["card"] == {"sha256": "2"}
    assert place.read_last("other") is None
    InStore("s3://models/new", PublishConfig()).check_access()
    with pytest.raises(DataError, match="there is no s3://absent/x.*check the bucket"):
        InStore("s3://absent/x", PublishConfig()).check_access()


def test_an_unfinished_version_of_another_model_stays(
    faulty: Faulty, stage: Callable[..., list[StagedRepo]], tmp_path: Path
) -> None:
    staged = stage()
    faulty.faults = [Fault("PUT", "team/mine/v1/model.safetensors", 500, "InternalError")]
    with pytest.raises(HubError, match="the server answered 500.*files that arrived are not sent"):
        push(staged, tmp_path / "a")
    assert "team/mine/v1/" + MARKER_FILE not in objects()
    assert "team/mine/v1/" + UPLOAD_FILE in objects()
    # Another model does not touch it: the other upload may still be under way.
    faulty.faults = []
    other = stage(seed=2)
    assert [repo.tag for repo in push(other, tmp_path / "b")] == ["v2", "v2"]
    assert contents(other, "v2").items() <= objects().items()
    assert "team/mine/v1/config.json" in objects()


def test_a_repeat_sends_only_what_is_missing(
    faulty: Faulty, stage: Callable[..., list[StagedRepo]], tmp_path: Path
) -> None:
    staged = stage()
    faulty.faults = [Fault("PUT", "team/mine/v1/model.safetensors", 500, "InternalError")]
    with pytest.raises(HubError):
        push(staged, tmp_path / "a")
    # What was damaged meanwhile is sent again.
    put("team/mine/v1/config.json", b"!")
    faulty.faults, faulty.written = [], []
    push(staged, tmp_path / "b")
    assert objects() == contents(staged, "v1")
    sent = [path.rpartition("/")[2] for path in faulty.written]
    assert sent == ["README.md", "config.json", "model.safetensors", MARKER_FILE, UPLOAD_FILE]


@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        (("GET", "models", 403, "AccessDenied"), CredentialsError, "AWS_ACCESS_KEY_ID"),
        (("PUT", "team/", 403, "AccessDenied"), CredentialsError, "may not be written.*secrets"),
        (("PUT", "model.safe", 403, "QuotaExceeded"), StorageError, "quota is used up.*make space"),
        (("PUT", "model.safe", 507, "XMinioStorageFull"), StorageError, "the store is full"),
        (("PUT", UPLOAD_FILE, 412, "PreconditionFailed"), TunelineError, "team"),
        (("PUT", "config.json", 503, "SlowDown"), HubError, "the server answered 503"),
    ],
)
def test_what_a_store_refuses_is_a_sentence(
    faulty: Faulty,
    stage: Callable[..., list[StagedRepo]],
    tmp_path: Path,
    fault: tuple[str, str, int, str],
    error: type[Exception],
    says: str,
) -> None:
    faulty.faults = [Fault(*fault)]
    with pytest.raises(error, match=says) as raised:
        push(stage(), tmp_path / "a")
    assert isinstance(raised.value, TunelineError)
    faulty.faults = []
    assert f"team/mine/v1/{MARKER_FILE}" not in objects()


def test_what_others_made_is_in_the_way(
    faulty: Faulty, stage: Callable[..., list[StagedRepo]], tmp_path: Path
) -> None:
    put("team/mine/v1/model.bin", b"theirs")
    with pytest.raises(OutputExistsError, match=f"{ADDRESS}/mine exists, but was not made by"):
        push(stage(), tmp_path / "a")
    assert objects() == {"team/mine/v1/model.bin": b"theirs"}, "nothing was sent"
    put(f"team/mine/v2/{MARKER_FILE}", b'{"kind": "gguf"}')
    with pytest.raises(OutputExistsError, match="holds the kind 'gguf' of another run"):
        push(stage(seed=2), tmp_path / "b")


def test_two_runs_at_once_do_not_share_a_version(
    faulty: Faulty, stage: Callable[..., list[StagedRepo]], tmp_path: Path, monkeypatch: Any
) -> None:
    """The other run begins the version between this run's look and its first write."""
    begin = InStore._create

    def late(self: InStore, path: str, data: bytes) -> None:
        put(f"team/{path}", b'{"kind": "merged", "files": {}}')
        begin(self, path, data)

    monkeypatch.setattr(InStore, "_create", late)
    with pytest.raises(OutputExistsError, match="mine-lora/v1 was begun by another run"):
        push(stage(), tmp_path / "a")
    assert list(objects()) == [f"team/mine-lora/v1/{UPLOAD_FILE}"]


def test_bytes_that_changed_on_the_way_are_not_published(
    faulty: Faulty, stage: Callable[..., list[StagedRepo]], tmp_path: Path, monkeypatch: Any
) -> None:
    put_file = s3fs.S3FileSystem.put_file

    def damaged(self: Any, source: str, path: str) -> None:
        self.pipe_file(path, b"#" * Path(source).stat().st_size)

    monkeypatch.setattr(s3fs.S3FileSystem, "put_file", damaged)
    with pytest.raises(ProofError, match="is not what was proven.*is not complete"):
        push(stage(), tmp_path / "a")
    assert not any(name.endswith(f"/{MARKER_FILE}") for name in objects())
    monkeypatch.setattr(s3fs.S3FileSystem, "put_file", put_file)
    push(staged := stage(speed=2), tmp_path / "b")
    assert objects() == contents(staged, "v1")


def test_several_targets_get_the_same_tree(
    faulty: Faulty, stage: Callable[..., list[StagedRepo]], tmp_path: Path, monkeypatch: Any
) -> None:
    """A target that fails does not keep the others from the model, and a repeat completes it."""
    monkeypatch.setenv("TUNELINE_CLAIMS", str(tmp_path / "claims"))
    (tmp_path / "claims" / "models").mkdir(parents=True)
    targets = [ADDRESS, "claim:models/team", f"dir:{tmp_path}/out"]
    staged = stage()
    faulty.faults = [Fault("PUT", "team/mine/v1/", 403, "AccessDenied")]
    with pytest.raises(CredentialsError) as raised:
        push(staged, tmp_path / "a", targets)
    said = str(raised.value)
    assert said.startswith(
        f"claim:models/team, dir:{tmp_path}/out have the model. {ADDRESS} failed"
    )
    assert said.endswith("targets that have the model stay as they are")
    faulty.faults = []
    repos = push(staged, tmp_path / "b", targets)
    assert [repo.url for repo in repos[::2]] == [
        f"{ADDRESS}/mine-lora/v1",
        "pvc://models/team/mine-lora",
        (tmp_path / "out" / "mine-lora").as_uri(),
    ]
    assert objects() == contents(staged, "v1")
    for root in (tmp_path / "claims/models/team", tmp_path / "out"):
        there = {path.relative_to(root): path.read_bytes() for path in root.rglob("*.*")}
        assert there == {
            Path(name.replace("/v1/", "/")).relative_to("team"): content
            for name, content in contents(staged, "v1").items()
        }
    with pytest.raises(TunelineError, match="the claim other is not mounted here"):
        push(staged, tmp_path / "c", "claim:other/x")
