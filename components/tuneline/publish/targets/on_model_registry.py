"""Register what a run published in Kubeflow's Model Registry, which stores addresses, not files.

    model-registry:NAME      the registered models NAME, NAME-lora, NAME-gguf, ..., each with v1, v2

A version has one artifact with the address at another target of the run, so this target is pushed
last. Nothing is deleted, and no version is changed.
"""

import asyncio
import logging
import os
import urllib.parse
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tuneline.artifacts import PublishedRepo
from tuneline.errors import (
    CredentialsError,
    DataError,
    HubError,
    ProofError,
    RecipeError,
    TunelineError,
)
from tuneline.kinds import RepoKind
from tuneline.publish.config import PublishConfig
from tuneline.publish.previous import MARKER_FILE, model_sha256, read_bundle
from tuneline.publish.staging import StagedRepo
from tuneline.publish.target import MODEL_REGISTRY_PREFIX
from tuneline.publish.targets.versions import check_versions, name_for, newest_first, next_tag
from tuneline.runtime.redaction import redacted
from tuneline.runtime.retries import http_status, passing_fault, retrying
from tuneline.serving.storage import UNKNOWN_STORAGE, storage_uri

if TYPE_CHECKING:
    from model_registry.core import ModelRegistryAPIClient
    from model_registry.types import ModelVersion, RegisteredModel

logger = logging.getLogger(__name__)

T = TypeVar("T")

ADDRESS_VARIABLE = "MODEL_REGISTRY_URL"
TOKEN_VARIABLE = "MODEL_REGISTRY_TOKEN"
KIND_PROPERTY = "tuneline.kind"
"""Custom property of a version that tuneline made, with the kind of its repository."""
_MODEL_PROPERTY = "tuneline.model_sha256"
"""Custom property by which a repeat knows the same model."""
_POD_TOKENS = (
    "/var/run/secrets/kubeflow/pipelines/token",
    "/var/run/secrets/kubernetes.io/serviceaccount/token",
)
_ADVICE = f"Check the network and {ADDRESS_VARIABLE}, and run the step again later"


class OnModelRegistry:
    """Kubeflow's Model Registry as a place."""

    def __init__(self, target: str, config: PublishConfig) -> None:
        self._target = target
        self._name = target.removeprefix(MODEL_REGISTRY_PREFIX)
        self._max_attempts = config.max_attempts
        self._opened: ModelRegistryAPIClient | None = None

    def check(self, staged: Sequence[StagedRepo]) -> None:
        """Check that no registered model has versions of others alone; see `Place`."""
        # The client takes the 404 of a server without this API for "no such model".
        self.check_access()
        for repo in staged:
            self._look_up(name_for(repo, staged, self._name), repo.kind)

    def check_access(self) -> None:
        """Check that the registry answers, and that these credentials may look up models.

        Raises:
            TunelineError: it does not, or they may not.
        """
        from model_registry.types import ListOptions

        self._call("look up models", lambda api: api.get_registered_models(ListOptions(limit=1)))

    def push(
        self, staged: Sequence[StagedRepo], elsewhere: Sequence[PublishedRepo] = ()
    ) -> list[PublishedRepo]:
        """Register the address of every repository as a new version; see `Place`."""
        return [
            self._push_one(repo, name_for(repo, staged, self._name), elsewhere) for repo in staged
        ]

    def read_last(self, name: str) -> None:
        """Return None: the target whose address is registered has tuneline.json, and is read."""

    def _push_one(
        self, repo: StagedRepo, name: str, elsewhere: Sequence[PublishedRepo]
    ) -> PublishedRepo:
        address = _address(repo, elsewhere)
        if address is None:
            raise HubError(
                f"{self._target} was not changed, because no other target of the run has "
                f"{repo.folder.name}, whose address would be registered"
            )
        bundle = read_bundle((repo.folder / MARKER_FILE).read_text(encoding="utf-8"))
        model, versions = self._look_up(name, repo.kind)
        key = model_sha256(bundle)
        for version in versions:
            if _properties(version).get(_MODEL_PROPERTY) != key:
                continue
            registered = self._addresses(version)
            if registered == [address]:
                logger.info("%s %s has the same model already", name, version.name)
                return self._published(repo, name, version.name)
            if not registered:
                logger.info("%s %s is continued", name, version.name)
                self._add_artifact(version, name, repo.kind, address)
                return self._published(repo, name, version.name)
        version = self._new_version(model, name, repo.kind, bundle, versions)
        self._add_artifact(version, name, repo.kind, address)
        return self._published(repo, name, version.name)

    def _published(self, repo: StagedRepo, name: str, tag: str) -> PublishedRepo:
        # The registry holds no file.
        return PublishedRepo(
            repo=f"{MODEL_REGISTRY_PREFIX}{name}",
            kind=repo.kind,
            url=f"{MODEL_REGISTRY_PREFIX}{name}/{tag}",
            tag=tag,
            num_files=0,
            num_bytes=0,
        )

    def _new_version(
        self,
        model: "RegisteredModel | None",
        name: str,
        kind: RepoKind,
        bundle: dict[str, Any],
        versions: Sequence["ModelVersion"],
    ) -> "ModelVersion":
        """Make a version without an artifact, and its registered model if there is none.

        Args:
            model: the registered model; None: it does not exist.
            name: its name.
            kind: kind of the repository.
            bundle: its tuneline.json.
            versions: the versions that exist.
        """
        from model_registry.types import ModelVersion, RegisteredModel

        if model is None:
            made = RegisteredModel(name=name, description="published by tuneline")
            model = self._call(f"register {name}", lambda api: api.upsert_registered_model(made))
        known = ("recipe", "base_revision", "base_sha256", "dataset_sha256", "tuneline")
        properties = {f"tuneline.{key}": str(bundle[key]) for key in known if bundle.get(key)}
        version = ModelVersion(
            name=next_tag(each.name for each in versions),
            author="tuneline",
            description=f"{kind} by tuneline, recipe {bundle.get('recipe', '')}",
            custom_properties={
                **properties,
                KIND_PROPERTY: kind,
                _MODEL_PROPERTY: model_sha256(bundle),
            },
        )
        return self._call(
            f"make the version {version.name} of {name}",
            lambda api: api.upsert_model_version(version, str(model.id)),
        )

    def _add_artifact(
        self, version: "ModelVersion", name: str, kind: RepoKind, address: str
    ) -> None:
        """Add the address to a version, and read it back.

        Raises:
            ProofError: the registry has another address.
        """
        from model_registry.types import ModelArtifact

        format = "gguf" if kind == "gguf" else "safetensors"
        artifact = ModelArtifact(
            name=name, uri=address, model_format_name=format, model_format_version="1"
        )
        self._call(
            f"register {address} as {name} {version.name}",
            lambda api: api.upsert_model_version_artifact(artifact, str(version.id)),
        )
        found = self._addresses(version)
        if found != [address]:
            raise ProofError(
                f"{self._target}: {name} {version.name} has the address {', '.join(found)} instead "
                f"of {address}. Look at the version in the registry; another run may have made it"
            )

    def _look_up(
        self, name: str, kind: str
    ) -> tuple["RegisteredModel | None", list["ModelVersion"]]:
        """Return a registered model, and its versions, the newest of tuneline's first.

        Raises:
            OutputExistsError: all versions are of others, or ours are of another kind.
        """
        model = self._call(
            f"look up {name}", lambda api: api.get_registered_model_by_params(name=name)
        )
        versions = self._versions(str(model.id)) if model else []
        ours = {each.name: each for each in versions if KIND_PROPERTY in _properties(each)}
        newest = [ours[tag] for tag in newest_first(ours)]
        check_versions(
            f"the registered model {name} of {self._target}",
            names=[each.name for each in versions],
            has_ours=bool(newest),
            last={"kind": _properties(newest[0])[KIND_PROPERTY]} if newest else {},
            kind=kind,
        )
        return model, [*newest, *(each for each in versions if each not in newest)]

    def _versions(self, model_id: str) -> list["ModelVersion"]:
        from model_registry.types import ListOptions

        options = ListOptions(limit=100)
        versions: list[ModelVersion] = []
        while True:
            versions += self._call(
                "look up versions", lambda api: api.get_model_versions(model_id, options)
            )
            if not options.next_page_token:
                return versions

    def _addresses(self, version: "ModelVersion") -> list[str]:
        artifacts = self._call(
            f"look up {version.name}",
            lambda api: api.get_model_version_artifacts(str(version.id)),
        )
        return [str(getattr(artifact, "uri", "")) for artifact in artifacts]

    def _client(self) -> "ModelRegistryAPIClient":
        if self._opened is None:
            url = os.environ.get(ADDRESS_VARIABLE, "").rstrip("/")
            parts = urllib.parse.urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise RecipeError(
                    f"publish_to is {self._target}, but {ADDRESS_VARIABLE} is "
                    f"'{redacted(url)}'. Set it to the registry's address, e.g. "
                    "http://model-registry-service.kubeflow:8080; on a cluster, by a Kubernetes "
                    "secret under placement.secrets"
                )
            try:
                from model_registry.core import ModelRegistryAPIClient
            except ImportError as error:
                raise DataError(
                    f"{self._target} needs the package model-registry, which is not installed "
                    f"({error}): install it with pip install 'tuneline[registries]'"
                ) from None
            token = _token()
            if parts.scheme == "http":
                port = parts.port or 8080
                self._opened = ModelRegistryAPIClient.insecure_connection(url, port, token)
            else:
                self._opened = ModelRegistryAPIClient.secure_connection(
                    url,
                    parts.port or 443,
                    user_token=token or "",
                    custom_ca=os.environ.get("SSL_CERT_FILE"),
                )
        return self._opened

    def _call(
        self, what: str, request: "Callable[[ModelRegistryAPIClient], Coroutine[Any, Any, T]]"
    ) -> T:
        """Send a request; repeat it after a fault that may not last, see `retries`.

        Args:
            what: description of the request, for messages.
            request: function that returns the coroutine which sends it.

        Raises:
            TunelineError: the request failed after all attempts, or was refused.
        """
        api = self._client()
        where = f"{what} at {self._target}"
        try:
            return retrying(
                where,
                lambda: asyncio.run(request(api)),
                max_attempts=self._max_attempts,
                advice=_ADVICE,
            )
        except TunelineError:
            raise
        except Exception as error:
            raise _explained(where, error) from error


def _explained(where: str, error: Exception) -> TunelineError:
    """Return an error whose message says what to try after the registry refused a request."""
    status = http_status(error)
    body = getattr(error, "body", None) or getattr(error, "reason", None) or error
    says = redacted(" ".join(f"{status or type(error).__name__} {body}".split()))[:300]
    if status in (401, 403):
        return CredentialsError(
            f"{where} is not allowed ({says}): set {TOKEN_VARIABLE}, or give the service account "
            "of the run access to the registry"
        )
    if status == 404:
        return DataError(
            f"{where}: the registry does not find it ({says}). Check {ADDRESS_VARIABLE}, and that "
            "the registry has the API v1: servers of version 0.3.14 and older have only v1alpha3"
        )
    if status in (409, 412):
        return HubError(
            f"{where}: it exists ({says}); another run may have made it at this moment. Run this "
            "step again"
        )
    if passing_fault(error) or (status or 0) >= 500:
        return HubError(f"{where} failed ({says}). {_ADVICE}")
    return DataError(f"{where} was refused: {says}")


def _properties(version: "ModelVersion") -> dict[str, Any]:
    # The client gives None, against its own types, for an empty object.
    return version.custom_properties or {}


def _token() -> str | None:
    """Return the token of the variable, or else of the pod's service account."""
    if given := os.environ.get(TOKEN_VARIABLE):
        return given
    path = next((Path(each) for each in _POD_TOKENS if Path(each).is_file()), None)
    return path.read_text(encoding="utf-8").strip() if path else None


def _address(repo: StagedRepo, elsewhere: Sequence[PublishedRepo]) -> str | None:
    """Return the address of a repository at the first target that others can read it from.

    A claim is the last choice, because it has one address for all versions.
    """
    addresses = []
    for each in elsewhere:
        if each.repo.rpartition("/")[2].lower() != repo.folder.name.lower():
            continue
        if "://" in each.repo:  # a store or an OCI registry, with the version
            addresses.append(each.url)
        else:
            addresses.append(storage_uri(each.repo, commit=each.commit, version=each.tag))
    known = [each for each in addresses if not each.startswith(UNKNOWN_STORAGE)]
    return min(known, key=lambda each: each.startswith("pvc://"), default=None)
