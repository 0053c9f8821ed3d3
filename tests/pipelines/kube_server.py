"""A small server that speaks the part of Kubernetes' API that tuneline uses.

No cluster was there to test with. Requests come from the unmodified clients, the Python one and
kubectl, which finds its way by discovery (its reviews of rights are not served: they come as
protobuf). Objects are kept as the API writes them, picked by label
and field selectors; answers to what is not there or not allowed are Status objects with the codes
that the real one gives.
"""

import datetime
import json
import re
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jsonschema

# plural -> (group, version, kind, namespaced)
RESOURCES = {
    "pods": ("", "v1", "Pod", True),
    "events": ("", "v1", "Event", True),
    "secrets": ("", "v1", "Secret", True),
    "nodes": ("", "v1", "Node", False),
    "persistentvolumeclaims": ("", "v1", "PersistentVolumeClaim", True),
    "resourcequotas": ("", "v1", "ResourceQuota", True),
    "workflows": ("argoproj.io", "v1alpha1", "Workflow", True),
    "trainjobs": ("trainer.kubeflow.org", "v1alpha1", "TrainJob", True),
    "localqueues": ("kueue.x-k8s.io", "v1beta1", "LocalQueue", True),
    "customresourcedefinitions": ("apiextensions.k8s.io", "v1", "CustomResourceDefinition", False),
}
REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
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

    `forbidden` holds "verb plural" that these credentials may not; `down` is how many requests
    are still answered 503. TrainJobs can be written, where `trainjob_schema` is the schema of their
    definition: a field that it does not know is refused, as with fieldValidation=Strict. Lines of
    logs may begin with a time, which is given where it is asked for; `now` is the clock. With
    `finalizers` what is deleted stays until the test takes it away.
    """

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str, str], dict[str, Any]] = {}
        self.logs: dict[tuple[str, str], str] = {}
        self.forbidden: set[str] = set()
        self.down = 0
        self.trainjob_schema: dict[str, Any] | None = None
        self.finalizers = False
        self.now: Callable[[], float] = time.time
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
        if path == f"/openapi/v3/apis/{TRAINER}":
            return self._schemas()
        if method != "GET":
            return self._write(method, path, body)
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
        return {"apiVersion": api, "kind": f"{kind}List", "metadata": {}, "items": items}

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

    def _write(self, method: str, path: str, body: Any) -> Any:
        match = re.fullmatch(rf"/apis/{TRAINER}/namespaces/([^/]+)/trainjobs(?:/([^/]+))?", path)
        if match is None:
            raise Refused(405, f"{method} is not served here")
        verb = {"POST": "create", "PATCH": "patch", "DELETE": "delete"}[method]
        if f"{verb} trainjobs" in self.forbidden:
            message = f'trainjobs.trainer.kubeflow.org is forbidden: "me" cannot {verb} trainjobs'
            raise Refused(403, message)
        name = match[2] or body["metadata"]["name"]
        key = ("trainjobs", match[1], name)
        if method == "POST":
            if key in self.objects:
                raise Refused(409, f'trainjobs "{name}" already exists')
            try:
                jsonschema.validate(body, strict(self.trainjob_schema or {}))
            except jsonschema.ValidationError as error:
                raise Refused(400, f"strict decoding error: {error.message}") from None
            body["metadata"] |= {"uid": str(uuid.uuid4()), "namespace": match[1]}
            self.objects[key] = body
            return body
        if key not in self.objects:
            raise Refused(404, f'trainjobs "{name}" not found')
        if method == "DELETE":
            return self.objects[key] if self.finalizers else self.objects.pop(key)
        annotations = self.objects[key]["metadata"].setdefault("annotations", {})
        annotations |= body["metadata"]["annotations"]
        return self.objects[key]


def strict(schema: Any) -> Any:
    """Return a schema that takes no field that it does not name."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    # `properties` may itself be the name of a field; a schema has a type beside it.
    names = made.get("properties")
    if isinstance(names, dict) and names and made.get("type") == "object":
        if not made.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    return made


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
                kinds = ("application/json", "application/merge-patch+json")
                if data and self.headers.get("Content-Type") not in kinds:
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
