"""A server on localhost that passes requests on to another, and answers some with faults."""

import contextlib
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field

import local_http
from local_http import Fault, LocalHandler


@dataclass
class FaultProxy:
    """The address of the proxy, its faults, and what it passed on."""

    upstream: str
    url: str = ""
    faults: list[Fault] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    """Method and path of each request that was passed on."""


@contextlib.contextmanager
def proxying(upstream: str) -> Iterator[FaultProxy]:
    """Run the proxy while the body runs.

    Args:
        upstream: address of the other server, without a slash at its end.
    """
    state = FaultProxy(upstream)

    class Handler(_Handler):
        proxy = state

    with local_http.serving(Handler) as address:
        state.url = f"http://{address}"
        yield state


class _Handler(LocalHandler):
    proxy: FaultProxy

    def do_GET(self) -> None:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b"".join(iter(self._chunk, b""))
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault := self.take(self.proxy.faults):
            if not fault.status:
                return self.cut()
            return self._answer(fault.status, fault.body.encode(), "text/plain")
        self.proxy.passed.append(f"{self.command} {self.path}")
        kept = {"Content-Type", "Authorization", "Accept"}
        request = urllib.request.Request(
            self.proxy.upstream + self.path,
            data=body or None,
            headers={key: value for key, value in self.headers.items() if key.title() in kept},
            method=self.command,
        )
        try:
            with urllib.request.urlopen(request) as answer:
                self._answer(answer.status, answer.read(), answer.headers.get("Content-Type"))
        except urllib.error.HTTPError as error:
            self._answer(error.code, error.read(), error.headers.get("Content-Type"))

    do_PUT = do_POST = do_PATCH = do_DELETE = do_HEAD = do_GET

    def _chunk(self) -> bytes:
        data = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return data

    def _answer(self, status: int, body: bytes, content_type: str | None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type or "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
