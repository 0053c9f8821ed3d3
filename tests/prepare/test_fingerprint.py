"""What a cache is told of a recipe's rows: it changes when they do, and only then."""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tuneline.errors import DataError
from tuneline.prepare import PrepareConfig
from tuneline.prepare.fingerprint import fingerprint

COMMITS = {"org/rows": "a" * 40, "org/other": "b" * 40}


def of(source: str | Path, **config: object) -> str:
    return fingerprint(PrepareConfig.parse(config), source=str(source))


def test_a_file_counts_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n')
    first = of(path)
    os.utime(path, (1, 1))
    assert of(path) == first
    path.write_text('{"text": "two"}\n')
    assert of(path) != first
    path.write_text('{"text": "one"}\n')
    assert of(path) == first


def test_a_directory_counts_every_file_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    found = [of(tmp_path)]
    (tmp_path / "notes.pdf").write_text("not rows")
    assert of(tmp_path) == found[0]
    (tmp_path / "b.jsonl").write_text("{}\n")
    found.append(of(tmp_path))
    (tmp_path / "b.jsonl").rename(tmp_path / "c.jsonl")
    found.append(of(tmp_path))
    assert len(set(found)) == 3


def test_held_out_and_general_rows_count(tmp_path: Path) -> None:
    rows, other = tmp_path / "rows.jsonl", tmp_path / "other.jsonl"
    rows.write_text("{}\n")
    other.write_text("{}\n")
    for config in ({"heldout": {"source": str(other)}}, {"general": {"source": str(other)}}):
        before = of(rows, **config)
        assert before != of(rows)
        other.write_text(other.read_text() + "{}\n")
        assert of(rows, **config) != before


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file or directory"):
        of(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="no built-in dataset 'nothing'"):
        of("builtin:nothing")


class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name = self.path.split("?")[0].removeprefix("/api/datasets/")
        repo, _, revision = name.partition("/revision/")
        code = "" if repo in COMMITS else "RepoNotFound"
        code = "RevisionNotFound" if revision == "v9" else code
        body = json.dumps({"id": repo, "sha": COMMITS.get(repo)}).encode()
        self.send_response(404 if code else 200)
        self.send_header("Content-Length", str(len(body)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *unused: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


PROGRAM = """
import sys
from tuneline.prepare import PrepareConfig
from tuneline.prepare.fingerprint import fingerprint
from tuneline.errors import TunelineError
for source, revision in (("org/rows", None), ("org/other", None), ("org/none", None),
                         ("org/rows", "v9")):
    try:
        print(fingerprint(PrepareConfig(revision=revision), source=source))
    except TunelineError as error:
        print(f"{type(error).__name__}: {error}")
"""


def test_a_hub_data_set_counts_by_its_commit(hub: str, tmp_path: Path) -> None:
    # A process of its own: the client reads its environment once.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path)}

    def lines(**more: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={**environment, **more},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.splitlines()

    first = lines(HF_ENDPOINT=hub)
    assert first[0] != first[1]
    assert first[2].startswith("DataError: ") and "no dataset 'org/none'" in first[2]
    assert first[3] == (
        "DataError: dataset org/rows has no revision 'v9': give a branch, a tag or a commit"
    )
    COMMITS["org/rows"] = "c" * 40
    second = lines(HF_ENDPOINT=hub)
    assert second[0] != first[0] and second[1] == first[1]
    away = lines(HF_ENDPOINT="http://127.0.0.1:9", TUNELINE_RETRY_SECONDS="0")
    assert away[0].startswith("HubError: look up org/rows at http://127.0.0.1:9: ConnectError")
