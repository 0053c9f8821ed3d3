"""A server on localhost that passes requests on to another, and answers some with faults."""

import contextlib
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Fault:
    """An answer that a server gives instead of its own."""

    method: str
    part: str
    """Part of the paths that get it."""
    status: int
    """Status; 0 cuts the connection."""
    body: str = "injected"
    times: int = 99


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

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # headers and body in one packet
    disable_nagle_algorithm = True
    proxy: FaultProxy

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b"".join(iter(self._chunk, b""))
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        for fault in self.proxy.faults:
            if fault.times and self.command == fault.method and fault.part in self.path:
                fault.times -= 1
                if not fault.status:
                    self.close_connection = True
                    self.connection.close()
                    return
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
