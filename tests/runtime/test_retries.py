"""What passes is waited for, what would come again is not: real clients against a real server.

The clients run in a process of their own, because they read their environment when they are
imported. Its clock does not wait: it records the pauses.
"""

import errno
import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace

import httpx2
import hub_server
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from tuneline.errors import HubError
from tuneline.runtime import retries
from tuneline.runtime.retries import Retries, passing_fault, retrying

CLIENTS = """
import json, sys, time, types
from huggingface_hub.utils import _http
from tuneline.errors import TunelineError
from tuneline.fetch.hub import commit_of, download
from tuneline.prepare.sources import hub as rows
from tuneline.prepare.sources.row import Remarks, Selection
from tuneline.runtime import retries

waits, inner = [], []
retries.time = types.SimpleNamespace(sleep=waits.append)
_http.time = types.SimpleNamespace(**{**vars(time), "sleep": inner.append})

def attempt(request):
    waits.clear()
    try:
        result = request()
    except TunelineError as error:
        result = f"{type(error).__name__}: {error}"
    return {"result": result, "waits": list(waits)}

print(json.dumps({
    "busy": attempt(lambda: sorted(
        path.name for path in download("org/busy", revision=None, with_code=False).path.iterdir()
    )),
    "none": attempt(lambda: commit_of("org/none", revision=None)),
    "refused": attempt(lambda: commit_of("org/refused", revision=None)),
    "down": attempt(lambda: commit_of("org/down", revision=None)),
    "rows": attempt(lambda: [
        (row.line, row.values["n"]) for row in rows.read("org/rows", Selection(), Remarks())
    ]),
    "fingerprint": attempt(lambda: rows.fingerprint("org/rows", None)),
}))
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[hub_server.Hub]:
    server = hub_server.Hub()
    yield server
    server.close()


@pytest.fixture(scope="module")
def found(hub, tmp_path_factory) -> dict:
    model = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"weights"}
    lines = [json.dumps({"n": number}).encode() + b"\n" for number in range(40)]
    for repo in ("org/busy", "org/refused", "org/down"):
        hub.repos[repo] = hub_server.new_repo(**model)
    hub.repos["org/rows"] = hub_server.new_repo(
        **{"a.jsonl": b"".join(lines[:20]), "b.jsonl": b"".join(lines[20:])}
    )
    hub.retry_after = "7"
    hub.faults = [
        ("GET /api/models/org/busy$", 429, 1),
        ("GET /api/models/org/busy$", "cut", 1),
        ("GET /org/busy/resolve/.*/model.safetensors", 503, 1),
        ("GET /api/models/org/refused", 403, 99),
        ("GET /api/models/org/down", 503, 999),
        # The second of two files, so that the rows of the first have been passed on. The client
        # repeats this request five times by itself.
        ("GET /datasets/org/rows/resolve/.*/b.jsonl", 500, 7),
        ("GET /api/datasets/org/rows$", "cut", 2),
    ]
    environment = hub_server.client_environment(hub.url, tmp_path_factory.mktemp("hf"))
    environment["HF_TOKEN"] = hub_server.TOKEN
    environment.pop(retries.SECONDS_VARIABLE, None)
    done = subprocess.run(
        [sys.executable, "-c", CLIENTS], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result: dict = json.loads(done.stdout.splitlines()[-1])
    return result


def test_a_download_waits_as_long_as_the_server_asks(found, hub) -> None:
    assert found["busy"]["result"] == ["config.json", "model.safetensors", "tokenizer.json"]
    waits = found["busy"]["waits"]
    # 429 with Retry-After, a cut connection, and 503.
    assert waits[0] == 7 and 2 <= waits[1] <= 4 and waits[2] == 7 and len(waits) == 3
    assert all(times == 0 for pattern, _, times in hub.faults if "busy" in pattern)


def test_what_would_come_again_is_asked_once(found, hub) -> None:
    assert found["none"]["result"].startswith("ModelError: ") and found["none"]["waits"] == []
    assert found["refused"]["result"].startswith("CredentialsError: ")
    assert found["refused"]["waits"] == []
    for repo in ("none", "refused"):
        assert hub.requests.count(f"GET /api/models/org/{repo}") == 1


def test_a_fault_that_lasts_ends_after_ten_minutes(found, hub) -> None:
    assert found["down"]["result"].startswith(
        f"HubError: look up org/down at {hub.url}: the server answered 503, and asks to "
        "wait 7 s, after 86 attempts and 595 s of waiting. "
    )
    assert sum(found["down"]["waits"]) == 85 * 7


def test_rows_go_on_where_reading_failed(found, hub) -> None:
    assert found["rows"]["result"] == [[number + 1, number] for number in range(40)]
    # Two cut connections when the dataset was looked up, and the file.
    assert len(found["rows"]["waits"]) == 3
    assert found["fingerprint"] == {"result": "0" * 40, "waits": []}
    assert all(times == 0 for pattern, _, times in hub.faults if "rows" in pattern)


def answer(status: int, **headers: str) -> HfHubHTTPError:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    request = httpx2.Request("GET", "http://localhost")
    return HfHubHTTPError("", response=httpx2.Response(status, headers=names, request=request))


def wrapped(cause: Exception) -> Exception:
    error = LocalEntryNotFoundError("not in the cache, and the Hub cannot be reached")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (answer(503), "the server answered 503"),
        (answer(408), "the server answered 408"),
        (wrapped(answer(502)), "the server answered 502"),
        (wrapped(httpx2.ConnectTimeout("slow")), "ConnectTimeout: slow"),
        (ConnectionResetError("reset"), "ConnectionResetError: reset"),
        (TimeoutError("late"), "TimeoutError: late"),
        (
            RuntimeError("CAS: HTTP status server error (503 Service Unavailable) for url"),
            "the server answered 503",
        ),
        *((answer(status), None) for status in (400, 401, 403, 404, 409, 412, 422, 501)),
        (wrapped(answer(404)), None),
        (wrapped(OfflineModeIsEnabled("HF_HUB_OFFLINE")), None),
        (ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)"), None),
        (ConnectionError("Unauthorized: 401"), None),
        (httpx2.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed"), None),
        (httpx2.UnsupportedProtocol("no scheme"), None),
        (OSError(errno.ENOSPC, "No space left on device"), None),
        (ValueError("timeout"), None),
    ],
)
def test_faults_that_may_pass(error: Exception, text: str | None) -> None:
    fault = passing_fault(error)
    assert (fault and fault.text) == text


def test_the_server_says_when() -> None:
    def seconds(**headers: str) -> float | None:
        fault = passing_fault(answer(429, **headers))
        assert fault is not None
        return fault.retry_after

    assert seconds(Retry_After="120") == 120
    later = datetime.now(UTC) + timedelta(seconds=90)
    assert seconds(Retry_After=format_datetime(later, usegmt=True)) == pytest.approx(90, abs=2)
    assert seconds(Retry_After="Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert seconds(RateLimit='"api";r=0;t=55') == 55
    assert seconds(RateLimit='"api";r=3;t=55') is None
    assert seconds(Retry_After="soon") is None and seconds() is None


def test_time_and_attempts_are_limited(monkeypatch) -> None:
    pauses: list[float] = []
    # The module's name, not time.sleep itself: threads of other tests may be sleeping.
    monkeypatch.setattr(retries, "time", SimpleNamespace(sleep=pauses.append))

    def request() -> None:
        raise answer(503)

    with pytest.raises(
        HubError, match=r"ask: the server answered 503, after 8 attempts and \d+ s of"
    ):
        retrying("ask", request, max_attempts=8)
    expected = [min(60.0, 2.0**number) for number in range(1, 8)]
    assert all(limit / 2 <= pause <= limit for pause, limit in zip(pauses, expected, strict=True))
    with pytest.raises(HubError, match="503, and asks to wait 601 s, after 1 attempt and 0 s"):
        Retries("ask").wait(answer(503, Retry_After="601"))
    monkeypatch.setenv(retries.SECONDS_VARIABLE, "0")
    with pytest.raises(HubError, match="after 1 attempt and 0 s"):
        retrying("ask", request)
