"""A small server that speaks the reading part of Kubernetes' API that tuneline uses.

No cluster was there to test with. Requests come from the unmodified clients, the Python one and
kubectl, which finds its way by discovery (its reviews of rights are not served: they come as
protobuf). Objects are kept as the API writes them, picked by label
and field selectors; answers to what is not there or not allowed are Status objects with the codes
that the real one gives.
"""

import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

# plural -> (group, version, kind, namespaced)
RESOURCES = {
    "pods": ("", "v1", "Pod", True),
    "events": ("", "v1", "Event", True),
    "secrets": ("", "v1", "Secret", True),
    "nodes": ("", "v1", "Node", False),
    "persistentvolumeclaims": ("", "v1", "PersistentVolumeClaim", True),
    "resourcequotas": ("", "v1", "ResourceQuota", True),
    "workflows": ("argoproj.io", "v1alpha1", "Workflow", True),
    "localqueues": ("kueue.x-k8s.io", "v1beta1", "LocalQueue", True),
    "customresourcedefinitions": ("apiextensions.k8s.io", "v1", "CustomResourceDefinition", False),
}
REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
REASONS = {
    403: "Forbidden",
    404: "NotFound",
    405: "MethodNotAllowed",
    415: "UnsupportedMediaType",
    503: "ServiceUnavailable",
}


class KubeServer:
    """Objects by (plural, namespace, name), logs by (pod, container).

    `forbidden` holds "verb plural" that these credentials may not; `down` is how many requests
    are still answered 503.
    """

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str, str], dict[str, Any]] = {}
        self.logs: dict[tuple[str, str], str] = {}
        self.forbidden: set[str] = set()
        self.down = 0
        self.requests: list[str] = []
        self._httpd = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._httpd.serve_forever, args=(0.01,), daemon=True)
        self.host = f"http://127.0.0.1:{self._httpd.server_port}"

    def __enter__(self) -> "KubeServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._httpd.shutdown()
        self._httpd.server_close()
        self._thread.join()

    def put(self, plural: str, name: str, *, namespace: str = "", **parts: Any) -> dict[str, Any]:
        """Keep an object; metadata in `parts` is added to its name and namespace."""
        group, version, kind, namespaced = RESOURCES[plural]
        namespace = (namespace or "kubeflow") if namespaced else ""
        metadata = {"name": name, **({"namespace": namespace} if namespaced else {})}
        made = {
            "apiVersion": f"{group}/{version}" if group else version,
            "kind": kind,
            **parts,
            "metadata": {**metadata, **parts.get("metadata", {})},
        }
        self.objects[plural, namespace, name] = made
        return made

    def write_kubeconfig(self, path: Path) -> Path:
        cluster = {"name": "here", "cluster": {"server": self.host}}
        context = {"name": "here", "context": {"cluster": "here", "user": "me"}}
        user = {"name": "me", "user": {"token": "not-checked"}}
        kinds = {"apiVersion": "v1", "kind": "Config", "current-context": "here"}
        lists = {"clusters": [cluster], "contexts": [context], "users": [user]}
        path.write_text(json.dumps(kinds | lists))
        return path

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Any:
        if self.down > 0:
            self.down -= 1
            raise Refused(503, "the server is currently unable to handle the request")
        if path == "/version":
            return {
                name: "" for name in ("buildDate", "compiler", "gitCommit", "gitTreeState")
            } | {
                "gitVersion": "v1.32.4", "goVersion": "", "major": "1", "minor": "32",
                "platform": "",
            }  # fmt: skip
        if (method, path) == ("POST", REVIEWS):
            wanted = body["spec"]["resourceAttributes"]
            parts = [wanted["resource"], wanted.get("subresource")]
            name = "/".join(part for part in parts if part)
            allowed = f"{wanted['verb']} {name}" not in self.forbidden
            return {**body, "status": {"allowed": allowed}}
        if method != "GET":
            raise Refused(405, f"{method} is not served here")
        if path in ("/api", "/apis") or re.fullmatch(r"/api/v1|/apis/[^/]+/[^/]+", path):
            return _discovery(path)
        return self._read(path, query)

    def _read(self, path: str, query: dict[str, str]) -> Any:
        match = re.fullmatch(
            r"/(?:api|apis/([^/]+))/([^/]+)(?:/namespaces/([^/]+))?/([a-z]+)(?:/([^/]+))?(/log)?",
            path,
        )
        plural = match[4] if match else ""
        if match is None or RESOURCES.get(plural, ("?",))[:2] != (match[1] or "", match[2]):
            raise Refused(404, "the server could not find the requested resource")
        group, version, kind, _ = RESOURCES[plural]
        namespace, name = match[3] or "", match[5]
        verb = f"{'get' if name else 'list'} {plural}{match[6] or ''}"
        if verb in self.forbidden:
            raise Refused(403, f'{plural} is forbidden: User "me" cannot {verb}')
        if match[6]:
            text = self.logs.get((name, query.get("container", "")))
            if text is None:
                raise Refused(404, f'pods "{name}" not found')
            lines = text.splitlines(keepends=True)
            return "".join(lines[-int(query.get("tailLines", len(lines))) :])
        if name:
            if (plural, namespace, name) not in self.objects:
                raise Refused(404, f'{plural} "{name}" not found')
            return self.objects[plural, namespace, name]
        items = [
            each
            for (kept, where, _), each in self.objects.items()
            if kept == plural and where == namespace and _is_picked(each, query)
        ]
        api = f"{group}/{version}" if group else version
        return {"apiVersion": api, "kind": f"{kind}List", "metadata": {}, "items": items}


class Refused(Exception):
    """An error answer, as a Status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def _is_picked(found: dict[str, Any], query: dict[str, str]) -> bool:
    labels = found["metadata"].get("labels", {})
    for part in filter(None, query.get("labelSelector", "").split(",")):
        key, _, value = part.partition("=")
        if labels.get(key) != value:
            return False
    for part in filter(None, query.get("fieldSelector", "").split(",")):
        key, _, value = part.partition("=")
        node: Any = found
        for name in key.split("."):
            node = node.get(name, {})
        if node != value:
            return False
    return True


def _discovery(path: str) -> dict[str, Any]:
    groups = sorted({entry[:2] for entry in RESOURCES.values() if entry[0]})
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        listed = []
        for group, version in groups:
            served = {"groupVersion": f"{group}/{version}", "version": version}
            listed.append({"name": group, "versions": [served], "preferredVersion": served})
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
    wanted = path.removeprefix("/apis/").removeprefix("/api/")
    resources = [
        {"name": plural, "kind": kind, "namespaced": namespaced, "verbs": ["get", "list"]}
        for plural, (group, version, kind, namespaced) in RESOURCES.items()
        if (f"{group}/{version}" if group else version) == wanted
    ]
    return {"kind": "APIResourceList", "groupVersion": wanted, "resources": resources}


def _handler(server: KubeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            address = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(address.query))
            length = int(self.headers.get("Content-Length") or 0)
            data = self.rfile.read(length)
            server.requests.append(f"{self.command} {address.path}")
            try:
                if data and self.headers.get("Content-Type") != "application/json":
                    raise Refused(415, "only JSON is understood here")
                body = json.loads(data) if data else None
                path = address.path.rstrip("/")
                answer, code = server.answer(self.command, path, query, body), 200
            except Refused as error:
                code = error.status
                answer = {
                    "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code,
                    "reason": REASONS[code], "message": str(error),
                }  # fmt: skip
            text = isinstance(answer, str)
            data = (answer if text else json.dumps(answer)).encode()
            self.send_response(code)
            self.send_header("Content-Type", "text/plain" if text else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

        def log_message(self, *_: object) -> None:
            pass

    return Handler
