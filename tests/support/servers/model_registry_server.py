"""A small Model Registry on localhost: what publish asks of Kubeflow's, in memory.

Its answers are those that Kubeflow's own server with the API v1 gave (opendatahub-io's copy of
2026-08-07 on MariaDB), which were recorded: tests/data/model-registry. Requests are parsed, and
answers are checked, by the models of `mr_openapi`, the package that the client generates from the
registry's OpenAPI document.
"""

import base64
import contextlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs, urlsplit

import local_http
import mr_openapi
from local_http import LocalHandler
from pydantic import ValidationError

ROOT = "/api/model_registry/v1"
TIME = "1795858921875"
"""When everything was made, in milliseconds."""


@dataclass
class ModelRegistryServer:
    """What the registry holds, by IDs that it gives."""

    url: str = ""
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, dict[str, Any]] = field(default_factory=dict)
    artifacts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Artifacts of each version."""
    token: str = ""
    """Token that it asks for; empty: none."""
    max_page_size: int = 100
    """Most items of a page; the real server gives as many as a request names."""
    ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    """IDs of models and versions; a request that is refused for its name takes one too."""

    def addresses(self, name: str) -> dict[str, list[str]]:
        """Return the addresses of each version of a registered model."""
        ids = [key for key, model in self.models.items() if model["name"] == name]
        return {
            version["name"]: [each["uri"] for each in self.artifacts.get(key, [])]
            for key, version in self.versions.items()
            if version["registeredModelId"] in ids
        }


@contextlib.contextmanager
def serving() -> Iterator[ModelRegistryServer]:
    """Run a registry while the body runs."""
    state = ModelRegistryServer()

    class Handler(_Handler):
        registry = state

    with local_http.serving(Handler) as address:
        state.url = f"http://{address}"
        yield state


class _Refused(Exception):
    """A request that the server refuses for its body."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Handler(LocalHandler):
    registry: ModelRegistryServer

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(address.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        given = self.headers.get("Authorization")
        if self.registry.token and given != f"Bearer {self.registry.token}":
            return self._error(401, "authentication required")
        path = address.path.removeprefix(ROOT)
        if not address.path.startswith(ROOT):
            return self._no_route()
        try:
            if found := re.fullmatch(r"/registered_models/(\w+)/versions", path):
                versions = self.registry.versions.values()
                kept = [each for each in versions if each["registeredModelId"] == found[1]]
                self._page(mr_openapi.ModelVersionList, kept, query)
            elif found := re.fullmatch(r"/model_versions/(\w+)/artifacts", path):
                self._artifacts(found[1], body, query)
            elif path == "/registered_models":
                self._registered_models(query, body)
            elif path == "/registered_model":
                self._registered_model(query)
            elif path == "/model_versions":
                self._model_versions(body)
            else:
                self._no_route()
        except _Refused as refused:
            self._error(refused.status, str(refused), code="Bad Request")

    do_POST = do_GET

    def _registered_models(self, query: dict[str, str], body: str) -> None:
        if self.command == "GET":
            models = list(self.registry.models.values())
            return self._page(mr_openapi.RegisteredModelList, models, query)
        made = _parsed(mr_openapi.RegisteredModelCreate, body)
        key = str(next(self.registry.ids))
        if any(each["name"] == made.name for each in self.registry.models.values()):
            return self._exists("registered model", made.name)
        model = mr_openapi.RegisteredModel.from_dict({**made.to_dict(), "id": key})
        self.registry.models[key] = _completed(model.to_dict())
        self._answer(201, self.registry.models[key])

    def _registered_model(self, query: dict[str, str]) -> None:
        name = query["name"]
        for each in self.registry.models.values():
            if each["name"] == name:
                return self._answer(200, each)
        self._error(404, f"no registered models found for name={name}, externalId=: not found")

    def _model_versions(self, body: str) -> None:
        # Whether there is such a registered model is not asked.
        made = _parsed(mr_openapi.ModelVersionCreate, body)
        key = str(next(self.registry.ids))
        versions = self.registry.versions.values()
        if any(
            (each["registeredModelId"], each["name"]) == (made.registered_model_id, made.name)
            for each in versions
        ):
            return self._exists("model version", made.name)
        version = mr_openapi.ModelVersion.from_dict({**made.to_dict(), "id": key})
        self.registry.versions[key] = _completed(version.to_dict())
        self._answer(201, self.registry.versions[key])

    def _artifacts(self, version: str, body: str, query: dict[str, str]) -> None:
        kept = self.registry.artifacts.get(version, [])
        if self.command == "GET":
            return self._page(mr_openapi.ArtifactList, kept, query)
        artifact = _parsed(mr_openapi.ModelArtifact, body)
        if version not in self.registry.versions:
            return self._error(404, f"no model version found for id {version}: not found")
        if any(each["name"] == artifact.name for each in kept):
            return self._exists("model artifact", artifact.name)
        count = sum(len(each) for each in self.registry.artifacts.values())
        made = _completed({**artifact.to_dict(), "id": str(count + 1)})
        self.registry.artifacts[version] = [*kept, made]
        self._answer(201, made)

    def _page(self, kind: Any, items: list[dict[str, Any]], query: dict[str, str]) -> None:
        """Answer with one page; its token names the last item of the page before, as `ID:ID`."""
        asked = int(query.get("pageSize", 0))
        after = base64.b64decode(query.get("nextPageToken", "")).decode().partition(":")[0]
        ids = [each["id"] for each in items]
        start = ids.index(after) + 1 if after else 0
        page = items[start : start + min(asked or len(items), self.registry.max_page_size)]
        rest = start + len(page) < len(items)
        token = base64.b64encode(f"{page[-1]['id']}:{page[-1]['id']}".encode()) if rest else b""
        values = {"nextPageToken": token.decode(), "pageSize": asked, "size": len(page)}
        kind.from_dict({**values, "items": page})  # checks them; leaves out the times
        self._answer(200, {**values, "items": page})

    def _no_route(self) -> None:
        self._send(404, "404 page not found\n", "text/plain; charset=utf-8")

    def _exists(self, kind: str, name: str) -> None:
        self._error(409, f"{kind} with name {name} already exists: conflict")

    def _error(self, status: int, message: str, *, code: str | None = None) -> None:
        code = code or HTTPStatus(status).phrase
        self._answer(status, mr_openapi.Error(code=code, message=message).to_dict())

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        self._send(status, json.dumps(content), "application/json; charset=UTF-8")

    def _send(self, status: int, text: str, content_type: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _parsed(kind: Any, body: str) -> Any:
    """Return the body of a request as a model of `mr_openapi`, which ignores unknown fields."""
    content = json.loads(body)
    known = {each.alias or name for name, each in kind.model_fields.items()}
    for key in content:
        if key not in known:
            raise _Refused(400, f'json: unknown field "{key}"')
    try:
        return kind.from_dict(content)
    except ValidationError as error:
        (lack,) = [each["loc"][0] for each in error.errors() if each["input"] is None]
        raise _Refused(422, f"required field '{lack}' is zero value.") from None


def _completed(made: dict[str, Any]) -> dict[str, Any]:
    """Return what the server keeps of something that a request makes."""
    times = {"createTimeSinceEpoch": TIME, "lastUpdateTimeSinceEpoch": TIME}
    return {"customProperties": {}, **made, **times}
