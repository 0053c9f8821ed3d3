"""A server on localhost that takes what is posted to it, as a webhook does."""

import json
import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WebhookServer:
    """Records the bodies, and answers with the given statuses in turn, then with the last one."""

    def __init__(self, statuses: Iterable[int] = (200,)) -> None:
        self.bodies: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        left = list(statuses)
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                text = self.rfile.read(int(self.headers["Content-Length"]))
                is_json = self.headers["Content-Type"] == "application/json"
                server.bodies.append(json.loads(text) if is_json else text.decode())
                server.paths.append(self.path)
                server.headers.append(dict(self.headers))
                status = left.pop(0) if len(left) > 1 else left[0]
                self.send_response(status)
                if status == 429:
                    self.send_header("Retry-After", "0")
                self.end_headers()
                self.wfile.write(b"ok")

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.secret = "T012/B345/s3cr3tpath"
        self.url = f"http://127.0.0.1:{self._http.server_port}/services/{self.secret}"

    def __enter__(self) -> "WebhookServer":
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
