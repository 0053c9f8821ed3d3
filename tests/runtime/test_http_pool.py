"""Requests through the proxy of the environment, to a real server that is one."""

import os
from collections.abc import Iterator

import pytest
import urllib3
from local_http import LocalHandler, serving

from tuneline.notify.config import NotifyConfig
from tuneline.notify.message import Message
from tuneline.notify.send import send
from tuneline.pipelines.plan.registry import Unknown, has_image
from tuneline.runtime.http_pool import http_pool

seen: list[tuple[str, str | None]] = []


class Proxy(LocalHandler):
    """Answers what it is asked to fetch; opens no tunnel."""

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        seen.append((f"{self.command} {self.path}", self.headers.get("Proxy-Authorization")))
        self.send_response(502 if self.command == "CONNECT" else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST = do_HEAD = do_CONNECT = answer  # noqa: N815


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    seen.clear()
    with serving(Proxy) as host:
        yield host


def test_without_a_proxy_the_server_itself_is_asked(proxy: str) -> None:
    with http_pool(f"http://{proxy}/direct") as pool:
        assert pool.request("GET", f"http://{proxy}/direct").status == 200
    assert seen == [("GET /direct", None)]


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_request_goes_through_the_proxy(
    name: str, proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, f"http://me:word%20s@{proxy}")
    url = "http://hub.invalid/a?b=c"
    with http_pool(url) as pool:
        assert pool.request("GET", url).status == 200
    # base64("me:word s")
    assert seen == [("GET http://hub.invalid/a?b=c", "Basic bWU6d29yZCBz")]


def test_hosts_of_no_proxy_are_asked_directly(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.invalid:3128")
    monkeypatch.setenv("NO_PROXY", ".svc,127.0.0.1")
    with http_pool(f"http://{proxy}/direct") as pool:
        assert pool.request("GET", f"http://{proxy}/direct").status == 200
    assert seen == [("GET /direct", None)]


def test_webhooks_and_the_look_at_a_registry_use_the_proxy(
    proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    monkeypatch.setenv("HOOK", "https://hooks.invalid/x")
    monkeypatch.setattr("tuneline.notify.send.MAX_ATTEMPTS", 1)
    message = Message(event="failed", run="r", recipe="r", text="x")
    (problem,) = send([NotifyConfig(webhook="HOOK")], message)
    assert "HOOK was not told" in problem
    with pytest.raises(Unknown, match="registry.invalid cannot be reached"):
        has_image("registry.invalid/team/light:1")
    # The registry is asked four times.
    asked = list(dict.fromkeys(request for request, _ in seen))
    assert asked == ["CONNECT hooks.invalid:443", "CONNECT registry.invalid:443"]


def test_urllib3_alone_uses_no_proxy(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason for http_pool: if this fails, urllib3 reads the environment and it can go."""
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.invalid:3128")
    with urllib3.PoolManager() as pool:
        assert pool.request("GET", f"http://{proxy}/direct").status == 200
