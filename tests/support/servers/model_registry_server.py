"""A small Model Registry on localhost: what publish asks of Kubeflow's, in memory.

It follows the registry's OpenAPI document, of which the client's package `mr_openapi` is generated:
requests are parsed and answers are written by that package's models, so a field that the document
does not have, or that lacks, is an error here too.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

import local_http
import mr_openapi
from local_http import LocalHandler
from pydantic import ValidationError

ROOT = "/api/model_registry/v1"


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

    def addresses(self, name: str) -> dict[str, list[str]]:
        """Return the addresses of each version of a registered model."""
        ids = [key for key, model in self.models.items() if model["name"] == name]
        return {
            version["name"]: [each["uri"] for each in self.artifacts.get(key, [])]
            for key, version in self.versions.items()
            if version["registeredModelId"] in ids
        }

    def new_id(self) -> str:
        return str(1 + len(self.models) + len(self.versions))


@contextlib.contextmanager
def serving() -> Iterator[ModelRegistryServer]:
    """Run a registry while the body runs."""
    state = ModelRegistryServer()

    class Handler(_Handler):
        registry = state

    with local_http.serving(Handler) as address:
        state.url = f"http://{address}"
        yield state


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
        try:
            if found := re.fullmatch(r"/registered_models/(\w+)/versions", path):
                versions = self.registry.versions.values()
                kept = [each for each in versions if each["registeredModelId"] == found[1]]
                self._page(mr_openapi.ModelVersionList, kept, query)
            elif found := re.fullmatch(r"/model_versions/(\w+)/artifacts", path):
                self._artifacts(found[1], body, query)
            else:
                getattr(self, f"_{path.strip('/')}")(query, body)
        except AttributeError:
            self._error(404, f"no route {path}")
        except (ValidationError, ValueError) as error:
            self._error(422, str(error))

    do_POST = do_GET

    def _registered_models(self, query: dict[str, str], body: str) -> None:
        if self.command == "GET":
            models = list(self.registry.models.values())
            return self._page(mr_openapi.RegisteredModelList, models, query)
        made = mr_openapi.RegisteredModelCreate.from_json(body)
        if any(each["name"] == made.name for each in self.registry.models.values()):
            return self._error(409, f"registered model {made.name} already exists")
        key = self.registry.new_id()
        model = mr_openapi.RegisteredModel.from_dict({**made.to_dict(), "id": key})
        self.registry.models[key] = model.to_dict()
        self._answer(201, model.to_dict())

    def _registered_model(self, query: dict[str, str], body: str) -> None:
        models = self.registry.models.values()
        self._one([each for each in models if each["name"] == query["name"]])

    def _model_versions(self, query: dict[str, str], body: str) -> None:
        made = mr_openapi.ModelVersionCreate.from_json(body)
        parent = made.registered_model_id
        if parent not in self.registry.models:
            return self._error(404, f"no registered model {parent}")
        versions = self.registry.versions.values()
        if any(
            (each["registeredModelId"], each["name"]) == (parent, made.name) for each in versions
        ):
            return self._error(409, f"model version {made.name} already exists")
        key = self.registry.new_id()
        version = mr_openapi.ModelVersion.from_dict({**made.to_dict(), "id": key})
        self.registry.versions[key] = version.to_dict()
        self._answer(201, version.to_dict())

    def _artifacts(self, version: str, body: str, query: dict[str, str]) -> None:
        kept = self.registry.artifacts.setdefault(version, [])
        if self.command == "GET":
            return self._page(mr_openapi.ArtifactList, kept, query)
        artifact = mr_openapi.Artifact.from_json(body).actual_instance
        kept.append({**artifact.to_dict(), "id": f"{version}{len(kept)}"})
        self._answer(201, kept[-1])

    def _one(self, found: list[dict[str, Any]]) -> None:
        if not found:
            return self._error(404, "not found")
        self._answer(200, found[0])

    def _page(self, kind: Any, items: list[dict[str, Any]], query: dict[str, str]) -> None:
        """Answer with a page of two at most, so that the client has to ask for the next."""
        start = int(query.get("nextPageToken", 0))
        page = items[start : start + 2]
        token = str(start + 2) if start + 2 < len(items) else ""
        values = {"nextPageToken": token, "pageSize": 2, "size": len(page), "items": page}
        self._answer(200, kind.from_dict(values).to_dict())

    def _error(self, status: int, message: str) -> None:
        self._answer(status, mr_openapi.Error(code=str(status), message=message).to_dict())

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
