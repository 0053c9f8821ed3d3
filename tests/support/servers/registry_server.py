"""An OCI registry on localhost, in memory, for what publish requests.

Its answers are those of CNCF Distribution 3 (`registry serve`), which were recorded: statuses,
headers, and the codes of errors. tests/publish/targets/test_in_registry.py runs the same tests
against that registry where its binary is installed.
"""

import base64
import hashlib
import json
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

import local_http
from local_http import LocalHandler

USER, PASSWORD = "robot", "s3cr3t-of-a-registry"
TOKEN = "t0ken-of-a-registry"


@dataclass
class Fault(local_http.Fault):
    """An error that the registry answers instead of its own answer; `body` is its code."""

    body: str = "UNKNOWN"
    message: str = "injected"


@dataclass
class RegistryServer:
    """A registry, and what it holds."""

    blobs: dict[tuple[str, str], bytes] = field(default_factory=dict)
    """Content by repository and digest."""
    tags: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Manifests by repository and tag."""
    faults: list[Fault] = field(default_factory=list)
    auth: str = ""
    """What it asks for: "", "Basic" or "Bearer"."""
    written: list[str] = field(default_factory=list)
    """What was written: digests of blobs and tags."""
    host: str = ""

    def files(self, repository: str, tag: str) -> dict[str, bytes]:
        """Return the files of a version, as `oras pull` writes them."""
        layers = json.loads(self.tags[repository][tag])["layers"]
        title = "org.opencontainers.image.title"
        return {
            layer["annotations"][title]: self.blobs[repository, layer["digest"]] for layer in layers
        }


@contextmanager
def serving() -> Iterator[RegistryServer]:
    """Run a registry while the body runs."""
    state = RegistryServer()

    class Handler(_Handler):
        registry = state

    with local_http.serving(Handler) as address:
        state.host = address
        yield state


class _Handler(LocalHandler):
    registry: RegistryServer

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        path, query = address.path, parse_qs(address.query)
        if fault := self.take(self.registry.faults):
            if not fault.status:
                return self.cut()
            return self._error(fault.status, fault.body, fault.message)
        if path == "/token":
            is_known = self.headers.get("Authorization") == _basic()
            return self._answer(200 if is_known else 401, json.dumps({"token": TOKEN}).encode())
        if self.registry.auth and not self._is_allowed():
            return self._challenge()
        found = re.fullmatch(r"/v2/(.+)/(tags|manifests|blobs)/(.+)", path)
        if not found:
            return self._answer(200, b"{}")
        name, kind, rest = found.groups()
        getattr(self, f"_{kind}")(name, rest, query, body)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _is_allowed(self) -> bool:
        given = self.headers.get("Authorization")
        return given == (_basic() if self.registry.auth == "Basic" else f"Bearer {TOKEN}")

    def _challenge(self) -> None:
        values = 'realm="any"'
        if self.registry.auth == "Bearer":
            values = f'realm="http://{self.registry.host}/token",service="x",scope="y"'
        challenge = {"WWW-Authenticate": f"{self.registry.auth} {values}"}
        self._error(401, "UNAUTHORIZED", "authentication required", challenge)

    def _tags(self, name: str, rest: str, query: dict[str, Any], body: bytes) -> None:
        if name not in self.registry.tags:
            return self._error(404, "NAME_UNKNOWN", "repository name not known to registry")
        tags = sorted(self.registry.tags[name])
        self._answer(200, json.dumps({"name": name, "tags": tags}).encode())

    def _manifests(self, name: str, tag: str, query: dict[str, Any], body: bytes) -> None:
        tags = self.registry.tags.setdefault(name, {}) if self.command == "PUT" else {}
        if self.command == "PUT":
            manifest = json.loads(body)
            for layer in (manifest["config"], *manifest["layers"]):
                if (name, layer["digest"]) not in self.registry.blobs:
                    return self._error(400, "MANIFEST_BLOB_UNKNOWN", "blob unknown to registry")
            tags[tag] = body
            self.registry.written.append(tag)
            return self._answer(201, b"", {"Docker-Content-Digest": _digest(body)})
        data = self.registry.tags.get(name, {}).get(tag)
        if data is None:
            return self._error(404, "MANIFEST_UNKNOWN", "manifest unknown")
        self._answer(200, data, {"Content-Type": "application/vnd.oci.image.manifest.v1+json"})

    def _blobs(self, name: str, rest: str, query: dict[str, Any], body: bytes) -> None:
        if self.command == "POST":
            session = f"http://{self.registry.host}/v2/{name}/blobs/uploads/{uuid.uuid4()}?_state=x"
            return self._answer(202, b"", {"Location": session})
        if self.command == "DELETE":
            return self._answer(204, b"")
        if self.command == "PUT":
            digest = query["digest"][0]
            if digest != _digest(body):
                words = "provided digest did not match uploaded content"
                return self._error(400, "DIGEST_INVALID", words)
            self.registry.blobs[name, digest] = body
            self.registry.written.append(digest)
            return self._answer(201, b"", {"Docker-Content-Digest": digest})
        data = self.registry.blobs.get((name, rest))
        if data is None:
            return self._error(404, "BLOB_UNKNOWN", "blob unknown to registry")
        self._answer(200, data)

    def _error(
        self, status: int, code: str, message: str, headers: dict[str, str] | None = None
    ) -> None:
        body = json.dumps({"errors": [{"code": code, "message": message}]}).encode()
        self._answer(status, body, {"Content-Type": "application/json", **(headers or {})})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _basic() -> str:
    return f"Basic {base64.b64encode(f'{USER}:{PASSWORD}'.encode()).decode()}"
