"""Stores: an S3 server and a web server, read through fsspec; what goes wrong is a sentence.

The S3 server is moto's, which answers the requests of S3's API from memory.
"""

import gzip
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pyarrow
import pyarrow.parquet
import pytest
import s3fs
from moto.server import ThreadedMotoServer
from s3_environment import use_s3

from tuneline.errors import CredentialsError, DataError, HubError
from tuneline.prepare import PrepareConfig
from tuneline.prepare.fingerprint import fingerprint
from tuneline.prepare.sources.kinds import date_of, read_rows
from tuneline.prepare.sources.row import Remarks, Selection
from tuneline.runtime.retries import SECONDS_VARIABLE

ROWS = [{"prompt": f"Question {number}?", "completion": str(number)} for number in range(2000)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def values(source: str, **selection: Any) -> list[dict[str, Any] | None]:
    return [row.values for row in read_rows(source, Selection(**selection))]


def of(source: str) -> str:
    return fingerprint(PrepareConfig(), source=source)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """An S3 bucket named `rows`, and credentials in the variables of Amazon's own tools."""
    use_s3(endpoint, monkeypatch, tmp_path)
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="rows")
    yield client
    listed = client.list_objects_v2(Bucket="rows").get("Contents", [])
    for entry in listed:
        client.delete_object(Bucket="rows", Key=entry["Key"])
    client.delete_bucket(Bucket="rows")
    s3fs.S3FileSystem.clear_instance_cache()


def put(client: Any, key: str, body: bytes) -> None:
    client.put_object(Bucket="rows", Key=key, Body=body)


def test_files_directories_and_globs_of_s3(bucket: Any, tmp_path: Path) -> None:
    put(bucket, "a/train.jsonl", LINES)
    put(bucket, "a/test.jsonl", b'{"prompt": "held", "completion": "out"}\n')
    put(bucket, "a/.cache/x.jsonl", b"{}")
    put(bucket, "b/rows.jsonl.gz", gzip.compress(LINES))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    put(bucket, "b/rows.parquet", (tmp_path / "rows.parquet").read_bytes())
    assert values("s3://rows/a/train.jsonl") == ROWS
    assert values("s3://rows/a") == ROWS
    assert values("s3://rows/a", split="test") == [{"prompt": "held", "completion": "out"}]
    assert values("s3://rows/b/*.gz") == ROWS
    assert values("s3://rows/b/rows.parquet") == ROWS
    assert values("s3://rows/b/") == ROWS + ROWS
    remarks = Remarks()
    assert len(list(read_rows("s3://rows/a/", remarks=remarks))) == len(ROWS)
    assert remarks.sentences() == ["s3://rows/a/: files of the split test are left out: test.jsonl"]


def test_an_object_counts_by_its_entity_tag(bucket: Any) -> None:
    put(bucket, "rows.jsonl", LINES)
    first = of("s3://rows/rows.jsonl")
    put(bucket, "rows.jsonl", LINES)
    assert of("s3://rows/rows.jsonl") == first
    put(bucket, "rows.jsonl", LINES + b"{}\n")
    assert of("s3://rows/rows.jsonl") != first
    assert date_of("s3://rows/rows.jsonl", None).year >= 2026


def test_what_s3_refuses_is_a_sentence(
    bucket: Any, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"there is no s3://rows/none\.jsonl.*check the bucket"):
        values("s3://rows/none.jsonl")
    with pytest.raises(DataError, match=r"there is no s3://other/rows"):
        values("s3://other/rows.jsonl")
    with pytest.raises(DataError, match=r"s3://rows/x\*\.jsonl has no file that can be read"):
        values("s3://rows/x*.jsonl")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(CredentialsError, match=r"set AWS_ACCESS_KEY_ID.*placement\.secrets"):
        values("s3://rows/rows.jsonl")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(HubError, match=r"s3://rows/rows\.jsonl cannot be reached"):
        values("s3://rows/rows.jsonl")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ftp://host/rows.jsonl", r"unknown scheme: known are s3://"),
        ("s3://rows/rows.xlsx", r"there is no"),
    ],
)
def test_addresses_that_cannot_be_read(bucket: Any, source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        values(source)


class Web(http.server.BaseHTTPRequestHandler):
    """Serves LINES without ranges; the connection of the first answer breaks in the middle."""

    num_breaks = 0
    login = "token"

    def do_HEAD(self) -> None:
        self.answer(send=False)

    def do_GET(self) -> None:
        self.answer(send=True)

    def answer(self, *, send: bool) -> None:
        path, _, query = self.path.partition("?")
        status = {"/rows.jsonl": 200, "/secret.jsonl": 403}.get(path, 404)
        if path == "/signed.jsonl":
            status = 200 if query == "token=abcdefgh" else 403
        self.send_response(status)
        self.send_header("Content-Length", str(len(LINES) if status == 200 else 0))
        if status == 200:
            self.send_header("ETag", '"v1"')
        self.end_headers()
        if send and status == 200:
            breaks = Web.num_breaks > 0
            Web.num_breaks -= 1
            self.wfile.write(LINES[: len(LINES) // 2] if breaks else LINES)
        self.close_connection = True

    def log_message(self, *unused: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_file_of_the_web(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert values(f"{web}/rows.jsonl") == ROWS
    assert of(f"{web}/rows.jsonl") == of(f"{web}/rows.jsonl")
    assert values(f"{web}/signed.jsonl?token=abcdefgh") == ROWS
    with pytest.raises(DataError, match="there is no http://127"):
        values(f"{web}/none.jsonl")
    with pytest.raises(CredentialsError, match="the address needs a login"):
        values(f"{web}/secret.jsonl")
    with pytest.raises(CredentialsError) as refused:
        values(f"{web}/signed.jsonl?token=wrongwrong")
    assert "wrongwrong" not in str(refused.value)


def test_a_read_that_breaks_goes_on_where_it_was(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuneline.runtime.retries.random.uniform", lambda low, high: 0.01)
    Web.num_breaks = 3
    assert values(f"{web}/rows.jsonl") == ROWS
    assert Web.num_breaks < 0
    monkeypatch.setenv(SECONDS_VARIABLE, "0")
    Web.num_breaks = 5
    with pytest.raises(HubError, match=r"read http://127.*Check the network and the store"):
        values(f"{web}/rows.jsonl")
    Web.num_breaks = 0
