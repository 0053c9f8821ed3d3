"""The read-only routes of a Hub, for the unmodified client; its repositories have one directory."""

import hashlib
import http.server
import json
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# repository -> (error code, status) for those that cannot be read
REFUSED = {"org/gated": ("GatedRepo", 403), "org/none": ("RepoNotFound", 404)}


class HubHandler(http.server.BaseHTTPRequestHandler):
    model_dir: Path
    requests: list[str]
    head = COMMIT
    """The commit that each branch and tag names."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *unused: object) -> None:
        pass

    def _answer(self, with_body: bool) -> None:
        path = unquote(self.path.split("?")[0])
        self.requests.append(path)
        repo = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2])
        names = sorted(file.name for file in self.model_dir.iterdir())
        if repo in REFUSED:
            code, status = REFUSED[repo]
            self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code}, with_body)
        elif path.startswith("/api/models/"):
            revision = path.split("/revision/")[1] if "/revision/" in path else "main"
            if revision not in ("main", "v1", COMMIT, self.head):
                self._send(404, b"", {"X-Error-Code": "RevisionNotFound"}, with_body)
                return
            if "/tree/" in path:
                body: object = [
                    {"type": "file", "path": name, "oid": "0" * 40, "size": 1} for name in names
                ]
            else:
                body = {
                    "id": repo,
                    "sha": COMMIT if revision == COMMIT else self.head,
                    "cardData": {"license": "llama3"},
                    "siblings": [{"rfilename": name} for name in names],
                }
            headers = {"Content-Type": "application/json"}
            self._send(200, json.dumps(body).encode(), headers, with_body)
        elif "/resolve/" not in path:
            self._send(404, b"", {}, with_body)
        else:
            content = (self.model_dir / path.rsplit("/", 1)[1]).read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            commit = path.split("/resolve/")[1].split("/")[0]
            headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}
            self._send(200, content, headers, with_body)

    def _send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)
