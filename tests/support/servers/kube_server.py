"""A small server for the part of the Kubernetes API that tuneline uses.

It stands in for a cluster. Requests come from unmodified clients: the Python client, and kubectl,
which discovers the API, applies, waits and deletes (kubectl's access reviews are not served: they
are protobuf). Objects are stored as the API writes them, are selected by label and
field selectors, and can be watched. A missing object or a missing permission is answered with a
Status object that has the code of a real server. No controller acts on the objects.
"""

import contextlib
import copy
import datetime
import json
import re
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import yaml

# plural -> (group, version, kind, namespaced)
RESOURCES = {
    "pods": ("", "v1", "Pod", True),
    "events": ("", "v1", "Event", True),
    "secrets": ("", "v1", "Secret", True),
    "configmaps": ("", "v1", "ConfigMap", True),
    "nodes": ("", "v1", "Node", False),
    "persistentvolumeclaims": ("", "v1", "PersistentVolumeClaim", True),
    "resourcequotas": ("", "v1", "ResourceQuota", True),
    "limitranges": ("", "v1", "LimitRange", True),
    "serviceaccounts": ("", "v1", "ServiceAccount", True),
    "roles": ("rbac.authorization.k8s.io", "v1", "Role", True),
    "rolebindings": ("rbac.authorization.k8s.io", "v1", "RoleBinding", True),
    "networkpolicies": ("networking.k8s.io", "v1", "NetworkPolicy", True),
    "priorityclasses": ("scheduling.k8s.io", "v1", "PriorityClass", False),
    "workflows": ("argoproj.io", "v1alpha1", "Workflow", True),
    "trainjobs": ("trainer.kubeflow.org", "v1alpha1", "TrainJob", True),
    "jobsets": ("jobset.x-k8s.io", "v1alpha2", "JobSet", True),
    "trainingruntimes": ("trainer.kubeflow.org", "v1alpha1", "TrainingRuntime", True),
    "localqueues": ("kueue.x-k8s.io", "v1beta2", "LocalQueue", True),
    "customresourcedefinitions": ("apiextensions.k8s.io", "v1", "CustomResourceDefinition", False),
}
REVIEWS = re.compile(
    r"/apis/authorization\.k8s\.io/v1/"
    r"(?:selfsubjectaccessreviews|namespaces/[^/]+/localsubjectaccessreviews)"
)
PATCHES = ("application/merge-patch+json", "application/strategic-merge-patch+json")
APPLY = "application/apply-patch+yaml"
VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]
TRAINER = "trainer.kubeflow.org/v1alpha1"
REASONS = {
    400: "BadRequest",
    403: "Forbidden",
    404: "NotFound",
    409: "AlreadyExists",
    422: "Invalid",
    405: "MethodNotAllowed",
    415: "UnsupportedMediaType",
    503: "ServiceUnavailable",
}


class KubeServer:
    """Objects by (plural, namespace, name), logs by (pod, container).

    `forbidden` holds "verb plural" for requests that are denied to these credentials, and "account
    verb plural" for those denied to a service account. The next `down` requests are answered with
    503. `trainjob_schema` is the schema of the TrainJob definition, or None; a field that it does
    not know is refused, as with fieldValidation=Strict. `resources` are the kinds that are served.
    A line of a log may begin with a timestamp, which is returned only if the request asks for
    timestamps; `now` is the clock. With `finalizers`, a deleted object stays until the test removes
    it. `deletions` are the propagation policies of the requests to delete something.
    """

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str, str], dict[str, Any]] = {}
        self.resources = dict(RESOURCES)
        self.journal: list[tuple[str, str, dict[str, Any]]] = []
        self.logs: dict[tuple[str, str], str] = {}
        self.forbidden: set[str] = set()
        self.down = 0
        self.trainjob_schema: dict[str, Any] | None = None
        self.finalizers = False
        self.closed = False
        self.now: Callable[[], float] = time.time
        self.requests: list[str] = []
        self.deletions: list[str] = []
        self._httpd = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._httpd.serve_forever, args=(0.01,), daemon=True)
        self.host = f"http://127.0.0.1:{self._httpd.server_port}"

    def __enter__(self) -> "KubeServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True
        self._httpd.shutdown()
        self._httpd.server_close()
        self._thread.join()

    def put(self, plural: str, name: str, *, namespace: str = "", **parts: Any) -> dict[str, Any]:
        """Store an object; metadata in `parts` is added to its name and namespace."""
        group, version, kind, namespaced = self.resources[plural]
        namespace = (namespace or "kubeflow") if namespaced else ""
        metadata = {"name": name, **({"namespace": namespace} if namespaced else {})}
        made = {
            "apiVersion": f"{group}/{version}" if group else version,
            "kind": kind,
            **parts,
            "metadata": {**metadata, **parts.get("metadata", {})},
        }
        self._keep(plural, made, "ADDED")
        return made

    def _keep(self, plural: str, made: dict[str, Any], event: str) -> None:
        metadata = made["metadata"]
        metadata.setdefault("uid", str(uuid.uuid4()))
        key = (plural, metadata.get("namespace", ""), metadata["name"])
        if event == "DELETED":
            self.objects.pop(key, None)
        else:
            self.objects[key] = made
        metadata["resourceVersion"] = str(len(self.journal) + 1)
        self.journal.append((event, plural, copy.deepcopy(made)))

    def write_kubeconfig(self, path: Path) -> Path:
        cluster = {"name": "here", "cluster": {"server": self.host}}
        context = {"name": "here", "context": {"cluster": "here", "user": "me"}}
        user = {"name": "me", "user": {"token": "not-checked"}}
        kinds = {"apiVersion": "v1", "kind": "Config", "current-context": "here"}
        lists = {"clusters": [cluster], "contexts": [context], "users": [user]}
        path.write_text(json.dumps(kinds | lists))
        return path

    def answer(
        self, method: str, path: str, query: dict[str, str], body: Any, content: str = ""
    ) -> Any:
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
        if method == "POST" and REVIEWS.fullmatch(path):
            wanted = body["spec"]["resourceAttributes"]
            parts = [wanted["resource"], wanted.get("subresource")]
            name = "/".join(part for part in parts if part)
            account = body["spec"].get("user", "").rpartition(":")[2]
            asked = f"{account} {wanted['verb']} {name}".strip()
            return {**body, "status": {"allowed": asked not in self.forbidden}}
        if path == f"/openapi/v3/apis/{TRAINER}":
            return self._schemas()
        if method != "GET":
            return self._write(method, path, query, body, content)
        if path in ("/api", "/apis") or re.fullmatch(r"/api/v1|/apis/[^/]+/[^/]+", path):
            return _discovery(path, self.resources)
        return self._read(path, query)

    def _locate(self, path: str) -> tuple[str, str, str, str]:
        """Return plural, namespace, name and subresource."""
        match = re.fullmatch(
            r"/(?:api|apis/([^/]+))/([^/]+)(?:/namespaces/([^/]+))?/([a-z]+)(?:/([^/]+))?(/log)?",
            path,
        )
        plural = match[4] if match else ""
        if match is None or self.resources.get(plural, ("?",))[:2] != (match[1] or "", match[2]):
            raise Refused(404, "the server could not find the requested resource")
        return plural, match[3] or "", match[5] or "", match[6] or ""

    def _read(self, path: str, query: dict[str, str]) -> Any:
        plural, namespace, name, subresource = self._locate(path)
        group, version, kind, _ = self.resources[plural]
        verb = f"{'get' if name else 'list'} {plural}{subresource}"
        if verb in self.forbidden:
            raise Refused(403, f'{plural} is forbidden: User "me" cannot {verb}')
        if query.get("watch") in ("true", "1"):
            if "sendInitialEvents" in query:
                # As before Kubernetes 1.32, so that clients list first.
                raise Refused(422, "sendInitialEvents: Forbidden: the WatchList gate is off")
            return self._watch(plural, namespace, query)
        if subresource:
            text = self.logs.get((name, query.get("container", "")))
            if text is None:
                raise Refused(404, f'pods "{name}" not found')
            lines = [self._log_line(line, query) for line in text.splitlines(keepends=True)]
            lines = [line for line in lines if line]
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
        metadata = {"resourceVersion": str(len(self.journal))}
        return {"apiVersion": api, "kind": f"{kind}List", "metadata": metadata, "items": items}

    def _watch(self, plural: str, namespace: str, query: dict[str, str]) -> Iterator[bytes]:
        """Yield every change since a resource version, as it happens."""
        self.requests.append(f"WATCH {plural}")
        number = int(query.get("resourceVersion") or 0)
        deadline = time.monotonic() + float(query.get("timeoutSeconds") or 60)
        while time.monotonic() < deadline and not self.closed:
            for event, kept, found in self.journal[number:]:
                number += 1
                where = found["metadata"].get("namespace", "")
                if kept == plural and where == namespace and _is_picked(found, query):
                    yield json.dumps({"type": event, "object": found}).encode() + b"\n"
            time.sleep(0.02)

    def _log_line(self, line: str, query: dict[str, str]) -> str:
        moment, _, text = line.partition(" ")
        if not re.fullmatch(r"\d{4}-\d\d-\d\dT[0-9:.]+Z", moment):
            return line
        seconds = datetime.datetime.fromisoformat(moment[:19] + "+00:00").timestamp()
        if seconds < self.now() - float(query.get("sinceSeconds", "inf")):
            return ""
        return line if query.get("timestamps") == "True" else text

    def _schemas(self) -> Any:
        if self.trainjob_schema is None:
            raise Refused(404, "the server could not find the requested resource")
        group, _, version = TRAINER.partition("/")
        kind = {"group": group, "kind": "TrainJob", "version": version}
        named = {**self.trainjob_schema, "x-kubernetes-group-version-kind": [kind]}
        return {"openapi": "3.0.0", "components": {"schemas": {"org.kubeflow.TrainJob": named}}}

    def _write(self, method: str, path: str, query: dict[str, str], body: Any, content: str) -> Any:
        plural, namespace, name, _ = self._locate(path)
        verb = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}[method]
        if f"{verb} {plural}" in self.forbidden:
            raise Refused(403, f'{plural} is forbidden: "me" cannot {verb} {plural}')
        name = name or body["metadata"]["name"]
        present = self.objects.get((plural, namespace, name))
        if method == "POST" and present is not None:
            raise Refused(409, f'{plural} "{name}" already exists')
        if method != "POST" and present is None and content != APPLY:
            raise Refused(404, f'{plural} "{name}" not found')
        if method == "DELETE":
            assert present is not None
            self.deletions.append(query.get("propagationPolicy", ""))
            if not self.finalizers and "dryRun" not in query:
                self._keep(plural, present, "DELETED")
            return present
        if method == "PATCH":
            if content not in (*PATCHES, APPLY):
                raise Refused(415, f"{content} is not understood here")
            body = merged(present or {}, body)
        if plural == "trainjobs":
            try:
                jsonschema.validate(body, strict(self.trainjob_schema or {}))
            except jsonschema.ValidationError as error:
                raise Refused(400, f"strict decoding error: {error.message}") from None
        if self.resources[plural][3]:
            body["metadata"]["namespace"] = namespace
        if "dryRun" not in query:
            # In place, so that a test that holds the object sees the change.
            made = present if present is not None else {}
            made.update(body)
            self._keep(plural, made, "MODIFIED" if present is not None else "ADDED")
            return made
        return body


def merged(present: Any, patch: Any) -> Any:
    """Apply a merge patch (RFC 7396); a strategic patch replaces lists too."""
    if not isinstance(patch, dict):
        return patch
    made = dict(present) if isinstance(present, dict) else {}
    for key, value in patch.items():
        if value is None:
            made.pop(key, None)
        else:
            made[key] = merged(made.get(key), value)
    return made


def strict(schema: Any) -> Any:
    """Return a copy of a schema that refuses unknown fields."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    # `properties` may itself be the name of a field; in a schema it has a type beside it.
    names = made.get("properties")
    if isinstance(names, dict) and names and made.get("type") == "object":
        if not made.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    return made


class Refused(Exception):
    """An error response, sent as a Status object."""

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


def _discovery(path: str, served: dict[str, tuple[str, str, str, bool]]) -> dict[str, Any]:
    groups = sorted({entry[:2] for entry in served.values() if entry[0]})
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        listed = []
        for group, version in groups:
            entry = {"groupVersion": f"{group}/{version}", "version": version}
            listed.append({"name": group, "versions": [entry], "preferredVersion": entry})
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
    wanted = path.removeprefix("/apis/").removeprefix("/api/")
    resources = [
        {"name": plural, "kind": kind, "namespaced": namespaced, "verbs": VERBS}
        for plural, (group, version, kind, namespaced) in served.items()
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
                content = self.headers.get("Content-Type") or ""
                if data and content not in ("application/json", *PATCHES, APPLY):
                    raise Refused(415, "only JSON is understood here")
                # Server-side apply sends YAML, of which JSON is a part.
                body = yaml.safe_load(data) if data else None
                path = address.path.rstrip("/")
                answer, code = server.answer(self.command, path, query, body, content), 200
                if isinstance(answer, Iterator):
                    self._stream(answer)
                    return
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

        def _stream(self, lines: Iterator[bytes]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                for line in lines:
                    self.wfile.write(line)

        do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

        def log_message(self, *_: object) -> None:
            pass

    return Handler
