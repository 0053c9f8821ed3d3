"""What the small HTTP servers of the tests share: a thread that serves, and faults."""

import contextlib
import ssl
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar


@dataclass
class Fault:
    """An answer that a server gives instead of its own."""

    method: str
    part: str
    """Part of the paths that get it."""
    status: int
    """Status; 0 cuts the connection."""
    body: str = "injected"
    times: int = field(default=99, kw_only=True)


SomeFault = TypeVar("SomeFault", bound=Fault)


class LocalHandler(BaseHTTPRequestHandler):
    """A handler that keeps its connections and is silent."""

    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # headers and body in one packet
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None:
        """Log nothing."""

    def take(self, faults: Sequence[SomeFault]) -> SomeFault | None:
        """Return the first fault for this request, which has one time less from now on."""
        for fault in faults:
            if fault.times and self.command == fault.method and fault.part in self.path:
                fault.times -= 1
                return fault
        return None

    def cut(self) -> None:
        """Close the connection without an answer."""
        self.close_connection = True
        self.connection.close()


@contextlib.contextmanager
def serving(
    handler: type[BaseHTTPRequestHandler], *, tls: ssl.SSLContext | None = None
) -> Iterator[str]:
    """Serve on localhost while the body runs; yield host and port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
