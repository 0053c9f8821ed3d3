"""The fault table: what a push comes to when the Hub or the network fails at any of its requests.

The unmodified huggingface_hub client against a server on localhost. Waiting is not waited for: it
is recorded.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import hub_server
import pytest

from tuneline.errors import CredentialsError, HubError, TunelineError, UserError
from tuneline.publish.config import PublishConfig
from tuneline.publish.hub import push
from tuneline.publish.previous import MARKER_FILE
from tuneline.publish.staging import StagedRepo
from tuneline.runtime import retries

MERGED, LORA = "me/mine", "me/mine-lora"
ROUTES = {
    "who am I": "GET /api/whoami",
    "look up": "GET /api/models/me/mine$",
    "create": "POST /api/repos/create",
    "preupload": f"POST /api/models/{MERGED}/preupload",
    "ask what to send": f"POST /{MERGED}.git/info/lfs/objects/batch",
    "send": "PUT /blob/",
    "commit": f"POST /api/models/{MERGED}/commit",
    "list tags": f"GET /api/models/{MERGED}/refs",
    "tag": f"POST /api/models/{MERGED}/tag/",
}


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    # With hf_xet the client would talk to a storage server of another protocol.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    found: list[float] = []
    # Not in the module itself: threads that other tests' libraries left behind sleep as well.
    clock = SimpleNamespace(**{**vars(time), "sleep": found.append})
    for module in (_http, retries):
        monkeypatch.setattr(module, "time", clock)
    return found


def new_marker(folder: Path) -> None:
    """List the files of a staged repository, as `stage` does."""
    names = [path.name for path in folder.iterdir() if path.name != MARKER_FILE]
    (folder / MARKER_FILE).write_text(json.dumps({"files": dict.fromkeys(sorted(names), "")}))


@pytest.fixture
def staged(tmp_path: Path) -> list[StagedRepo]:
    repos = []
    for name, kind in ((LORA, "adapter"), (MERGED, "merged")):
        folder = tmp_path / name.split("/")[1]
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "llama"}')
        for shard in "12":
            (folder / f"{shard}.safetensors").write_bytes(os.urandom(300_000))
        new_marker(folder)
        repos.append(StagedRepo(name, kind, folder))
    return repos


@pytest.fixture
def send(hub, staged, waits, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.url)

    def call(*faults, max_attempts=3, private=None):
        hub.faults = list(faults)
        config = PublishConfig(max_attempts=max_attempts, private=private)
        return push(staged, token=hub_server.TOKEN, config=config)

    return call


def assert_whole(hub, staged: list[StagedRepo]) -> None:
    """Each repository has one commit with all of its files, under one tag."""
    assert set(hub.repos) == {MERGED, LORA}
    for repo in staged:
        kept = hub.repos[repo.repo]
        assert len(kept["commits"]) == 2, "one commit after the initial one"
        assert kept["tags"] == {"v1": kept["commits"][-1]}
        files = {name: path.read_bytes() for name, path in repo.files().items()}
        assert {name: hub.content(repo.repo, name) for name in kept["files"]} == files


@pytest.mark.parametrize(
    ("route", "fault"),
    [
        *((route, fault) for route in ROUTES for fault in (503, 429, "cut", "lost")),
        *(("commit", fault) for fault in (500, 502, 504)),
        *((route, "half") for route in ("send", "commit")),
    ],
)
def test_what_passes_is_waited_for(send, hub, staged, waits, route, fault) -> None:
    published = send((ROUTES[route], fault, 1))
    assert hub.faults[0][2] == 0, "the fault was met"
    assert_whole(hub, staged)
    assert len(waits) == 1
    assert [repo.commit for repo in published] == [
        hub.repos[repo.repo]["commits"][-1] for repo in staged
    ]
    # Of four files at most the one that broke is sent twice.
    assert hub.sent(MERGED) + hub.sent(LORA) == 4 + (route == "send")


REFUSALS = [
    (401, CredentialsError, r"does not accept the token in HF_TOKEN \(401\)"),
    (403, CredentialsError, r"write access to this namespace. The Hub says: injected"),
    (404, HubError, r"cannot find the repository \(404\)"),
    (409, UserError, r"409: the repository exists or was changed meanwhile"),
    (412, UserError, r"412: the repository exists or was changed meanwhile"),
    (422, HubError, r"the Hub answered 422: injected"),
]
NO_REFUSALS = {("look up", 404), ("create", 409)}
"""Mean that there is no repository, or that it is there: see below."""


@pytest.mark.parametrize(
    ("route", "status", "error", "says"),
    [
        (route, *refusal)
        for route in ROUTES
        for refusal in REFUSALS
        if (route, refusal[0]) not in NO_REFUSALS
    ],
)
def test_what_stays_is_one_sentence(send, hub, waits, route, status, error, says) -> None:
    with pytest.raises(error, match=says) as raised:
        send((ROUTES[route], status, 99))
    assert isinstance(raised.value, TunelineError) and waits == []
    assert len(str(raised.value).splitlines()) == 1
    if route not in ("list tags", "tag"):
        assert all(len(kept["commits"]) == 1 for name, kept in hub.repos.items() if name == MERGED)


@pytest.mark.parametrize(
    ("route", "fault"), [(route, (503, "cut")[n % 2]) for n, route in enumerate(ROUTES)]
)
def test_what_does_not_pass_ends_and_is_taken_up(send, hub, staged, waits, route, fault) -> None:
    with pytest.raises(
        HubError,
        match=r"after 2 attempts and \d+ s of waiting\. Check.*run the step again later; files",
    ):
        send((ROUTES[route], fault, 99), max_attempts=2)
    assert waits and all(wait <= 60 for wait in waits)
    send()
    assert_whole(hub, staged)


def test_a_cut_upload_goes_on_where_it_was(send, hub, staged) -> None:
    """The second of a repository's files never arrives; the next run sends that one alone."""
    second = hashlib.sha256((staged[1].folder / "2.safetensors").read_bytes()).hexdigest()
    with pytest.raises(HubError, match=rf"push {MERGED}"):
        send((f"PUT /blob/{second}", "half", 99), max_attempts=1)
    assert len(hub.blobs) == 3 and len(hub.repos[MERGED]["commits"]) == 1
    hub.requests.clear()
    send()
    assert [line for line in hub.requests if line.startswith("PUT")] == [f"PUT /blob/{second}"]
    assert_whole(hub, staged)


def test_large_files_go_in_parts(send, hub, staged) -> None:
    hub.part_bytes = 100_000
    send()
    assert_whole(hub, staged)
    assert {len(parts) for parts in hub.parts.values()} == {3}
    assert hub.num_received_bytes == 4 * 300_000


@pytest.mark.parametrize("fault", ["cut", "half", "lost", 500, 503])
def test_of_a_cut_file_one_part_is_sent_again(send, hub, staged, fault) -> None:
    hub.part_bytes = 100_000
    send((r"PUT /part/\w+/2", fault, 1))
    assert_whole(hub, staged)
    parts = [line for line in hub.requests if line.startswith("PUT /part/")]
    assert len(parts) == 4 * 3 + 1
    assert hub.num_received_bytes <= 4 * 300_000 + 100_000


def test_a_file_whose_parts_never_all_arrive_is_alone_sent_by_the_next_run(
    send, hub, staged
) -> None:
    hub.part_bytes = 100_000
    second = hashlib.sha256((staged[1].folder / "2.safetensors").read_bytes()).hexdigest()
    with pytest.raises(HubError, match=rf"push {MERGED}"):
        send((f"PUT /part/{second}/3", "half", 99), max_attempts=1)
    assert second not in hub.blobs and len(hub.blobs) == 3
    hub.requests.clear()
    send()
    assert [line for line in hub.requests if line.startswith("PUT")] == [
        f"PUT /part/{second}/{number}" for number in (1, 2, 3)
    ]
    assert_whole(hub, staged)


def test_waiting_grows_and_the_hubs_word_counts(send, hub, waits) -> None:
    with pytest.raises(HubError):
        send(("GET /api/whoami", "cut", 99), max_attempts=6)
    assert len(waits) == 5
    assert all(0.5 * 2**n <= wait <= 2**n for n, wait in enumerate(waits, start=1))
    waits.clear()
    send(("GET /api/whoami", 429, 1))
    assert waits == [0.0]  # Retry-After


def test_the_same_content_makes_no_commit_and_no_tag(send, hub, staged) -> None:
    send()
    hub.requests.clear()
    again = send()
    assert [line for line in hub.requests if "commit" in line or "/tag/" in line] == []
    assert [repo.tag for repo in again] == ["v1", "v1"]
    assert_whole(hub, staged)


def test_a_file_that_is_gone_is_deleted_in_the_same_commit(send, hub, staged) -> None:
    send()
    (staged[1].folder / "2.safetensors").unlink()
    new_marker(staged[1].folder)
    send()
    assert "2.safetensors" not in hub.repos[MERGED]["files"]
    assert len(hub.repos[MERGED]["commits"]) == 3


def test_somebody_elses_commit_in_between(send, hub, staged, monkeypatch) -> None:
    """Their commit lands after we looked and before we commit: it is not overwritten."""
    send_blob = hub.fault

    def intrude(line: str):
        if line.startswith("PUT"):
            hub.repos[MERGED]["commits"].append("f" * 40)
            hub.repos[MERGED]["files"]["theirs.txt"] = ("regular", b"theirs")
        return send_blob(line)

    send()
    (staged[1].folder / "2.safetensors").write_bytes(b"another")
    monkeypatch.setattr(hub, "fault", intrude)
    with pytest.raises(UserError, match="412: the repository exists or was changed meanwhile"):
        send()
    assert hub.repos[MERGED]["files"]["theirs.txt"] == ("regular", b"theirs")
    assert hub.repos[MERGED]["commits"][-1] == "f" * 40


def test_a_card_that_the_hub_refuses_is_one_sentence(send, hub, staged) -> None:
    (staged[1].folder / "README.md").write_text("---\nlicense: some-research\n---\n# mine")
    with pytest.raises(UserError, match=r"must be one of .*\. Check publish.licence") as raised:
        send()
    assert len(str(raised.value).splitlines()) == 1
    assert set(hub.repos) == {LORA}, "the empty repository is deleted again"


def test_what_is_public_already_is_told(send, hub, caplog) -> None:
    assert [repo.private for repo in send()] == [True, True]
    assert "is public" not in caplog.text
    hub.repos[LORA]["private"] = False
    assert [repo.private for repo in send()] == [False, True]
    assert f"{LORA} exists and is public, so its new version is public too" in caplog.text
    hub.requests.clear()
    with pytest.raises(UserError, match=f"private is true, but the repository {LORA} exists and"):
        send(private=True)
    assert not [line for line in hub.requests if line.startswith(("POST", "PUT"))]


def test_an_empty_repository_is_taken_and_a_foreign_one_is_not(send, hub) -> None:
    hub.repos[LORA] = hub_server.new_repo(**{".gitattributes": b"*.bin lfs"})
    hub.repos[MERGED] = hub_server.new_repo(readme=b"mine")
    with pytest.raises(UserError, match=f"{MERGED} exists, but was not made by tuneline"):
        send()
    assert len(hub.repos[LORA]["commits"]) == 1, "nothing was sent before all names were checked"
    del hub.repos[MERGED]
    send()
    assert len(hub.repos[LORA]["commits"]) == 2
