"""Publish to an OCI registry: each version is an artifact with a tag, through oras.

    oci://HOST/PATH/NAME:v1
    oci://HOST/PATH/NAME:v2

Every file is a layer of its own with the file's name in its annotation, so that `oras pull` writes
the tree. The tag is set last, when every layer was read back and compared with the SHA-256 that was
proven. Without it, a registry has only blobs, which the next push of the same model uses.
Nothing is deleted.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tuneline.artifacts import PublishedRepo
from tuneline.errors import (
    CredentialsError,
    DataError,
    HubError,
    OutputExistsError,
    ProofError,
    RecipeError,
    StorageError,
    TunelineError,
)
from tuneline.publish.config import PublishConfig
from tuneline.publish.previous import MARKER_FILE, MAX_READ_BYTES, read_bundle, same_model
from tuneline.publish.staging import StagedRepo
from tuneline.publish.target import OCI_PREFIX, OCI_REPOSITORY
from tuneline.publish.targets.versions import check_versions, newest_first, next_tag
from tuneline.record import sha256_of_file
from tuneline.runtime.redaction import redacted
from tuneline.runtime.retries import http_status, passing_fault, retrying

if TYPE_CHECKING:
    from oras.container import Container

    from tuneline.publish.targets.registry_client import Client

logger = logging.getLogger(__name__)

T = TypeVar("T")

ARTIFACT_TYPE = "application/vnd.tuneline"
"""What the types of our artifacts begin with; the kind of the repository follows."""
TITLE = "org.opencontainers.image.title"
"""Annotation of a layer with the name of its file, as OCI and oras define it."""
_MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
_EMPTY = b"{}"
_ADVICE = (
    "Check the network and the registry, and run the step again later; files that arrived are not "
    "sent again"
)
_NO_SPACE = re.compile(r"quota|no space|storage.*exceed|exceed.*(limit|storage)", re.IGNORECASE)
_CREDENTIALS = (
    "set ORAS_USER and ORAS_PASS, or DOCKER_CONFIG to the directory of a config.json that `docker "
    "login` wrote. On a cluster, name the Kubernetes secret that holds them under placement.secrets"
)


class InRegistry:
    """A path in an OCI registry as a place."""

    def __init__(self, address: str, config: PublishConfig) -> None:
        self._address = address
        self._max_attempts = config.max_attempts
        self._opened: Client | None = None

    def check(self, staged: Sequence[StagedRepo]) -> None:
        """Check that no repository has artifacts of others, and that it may be written.

        See `Place`.
        """
        for repo in staged:
            self._look_up(repo.folder.name, repo.kind)
            self.check_access(repo.folder.name)

    def check_access(self, name: str) -> None:
        """Check that a repository may be written: begin an upload, and end it without a file.

        Args:
            name: name of the repository, below the address.

        Raises:
            TunelineError: it may not.
        """
        at = self._container(name)
        session = self._call(f"begin an upload to {name}", lambda c: c.begin_upload(at))
        try:
            self._client().do_request(session, "DELETE")
        except Exception as error:
            # Not every registry can end an upload; all of them forget it after some time.
            logger.debug("the upload that was begun as a check stays: %s", error)

    def push(
        self, staged: Sequence[StagedRepo], elsewhere: Sequence[PublishedRepo] = ()
    ) -> list[PublishedRepo]:
        """Push every repository as a new version; see `Place`."""
        return [self._push_one(repo) for repo in staged]

    def read_last(self, name: str) -> str | None:
        """Return tuneline.json of the newest version; see `Place`."""
        return self._newest(name, self._tags(name))[1]

    def _push_one(self, repo: StagedRepo) -> PublishedRepo:
        name = repo.folder.name
        tags, held, text = self._look_up(name, repo.kind)
        files = repo.files()
        bundle = read_bundle(files[MARKER_FILE].read_text(encoding="utf-8"))
        shown = f"{self._address}/{_repository(name)}"
        if held and same_model(bundle, read_bundle(text)) and self._is_whole(name, held):
            logger.info("%s:%s holds the same model already", shown, held)
            tag = held
        else:
            tag = next_tag(tags)
            layers = [
                self._send(name, relative, path, bundle["files"].get(relative))
                for relative, path in sorted(files.items())
            ]
            self._set_tag(name, tag, repo.kind, layers)
        return PublishedRepo(
            repo=shown,
            kind=repo.kind,
            url=f"{shown}:{tag}",
            tag=tag,
            num_files=len(files),
            num_bytes=sum(path.stat().st_size for path in files.values()),
        )

    def _look_up(self, name: str, kind: str) -> tuple[list[str], str | None, str | None]:
        """Return the tags of a repository, its newest version of ours, and its tuneline.json.

        Raises:
            OutputExistsError: tuneline did not make the repository, or it holds another kind.
        """
        tags = self._tags(name)
        version, text = self._newest(name, tags)
        check_versions(
            f"{self._address}/{_repository(name)}",
            names=tags,
            has_ours=version is not None,
            last=read_bundle(text),
            kind=kind,
        )
        return tags, version, text

    def _newest(self, name: str, tags: list[str]) -> tuple[str | None, str | None]:
        """Return the newest version that tuneline made, and its tuneline.json."""
        for tag in newest_first(tags):
            layers = _layers(self._manifest(name, tag) or b"")
            layer = layers.get(MARKER_FILE)
            if layer and layer["size"] <= MAX_READ_BYTES:
                data = self._read(name, layer["digest"])
                if hashlib.sha256(data).hexdigest() != layer["digest"].removeprefix("sha256:"):
                    raise ProofError(
                        f"{MARKER_FILE} of {self._address}/{name}:{tag} differs from its digest. "
                        "Check the registry's storage"
                    )
                return tag, data.decode("utf-8", errors="replace")
        return None, None

    def _tags(self, name: str) -> list[str]:
        """Return the tags of a repository; none if it does not exist."""
        at = self._container(name)
        return self._call_unless_absent(f"look up {name}", lambda c: list(c.get_tags(at))) or []

    def _manifest(self, name: str, tag: str) -> bytes | None:
        """Return the manifest of a tag; None without one."""
        url = self._container(name).manifest_url(tag)
        headers = {"Accept": _MANIFEST_TYPE}

        def read(client: "Client") -> bytes:
            response = client.do_request(f"{client.prefix}://{url}", headers=headers)
            return bytes(response.content)

        return self._call_unless_absent(f"look up {name}:{tag}", read)

    def _read(self, name: str, digest: str) -> bytes:
        at = self._container(name)
        return self._call(
            f"read {digest[:19]} of {name}", lambda c: bytes(c.get_blob(at, digest).content)
        )

    def _is_whole(self, name: str, tag: str) -> bool:
        """Return whether a registry still has all files of a version."""
        layers = _layers(self._manifest(name, tag) or b"")
        missing = [title for title, layer in sorted(layers.items()) if not self._has(name, layer)]
        if missing:
            logger.warning(
                "%s/%s:%s lacks %s, which somebody removed, so this run makes a new version",
                *(self._address, name, tag, ", ".join(missing[:3])),
            )
        return not missing

    def _has(self, name: str, layer: Mapping[str, Any]) -> bool:
        at = self._container(name)
        return self._call(f"look up a file of {name}", lambda c: bool(c.blob_exists(layer, at)))

    def _send(self, name: str, relative: str, path: Path, sha256: str | None) -> dict[str, Any]:
        """Send a file unless the registry has it, check what it has, and return the layer.

        Args:
            name: name of the repository.
            relative: path of the file in it.
            path: the staged file.
            sha256: its proven hash; None: of a file that publish itself wrote.

        Raises:
            ProofError: the registry holds other bytes, or received other ones.
        """
        digest = f"sha256:{sha256 or sha256_of_file(path)}"
        layer = {
            "mediaType": "application/octet-stream",
            "digest": digest,
            "size": path.stat().st_size,
            "annotations": {TITLE: relative},
        }
        at = self._container(name)
        try:
            self._call(f"send {relative}", lambda c: c.upload_blob(str(path), at, layer))
        except DataError as error:
            if "DIGEST_INVALID" in str(error):
                raise self._differs(name, relative) from error
            raise

        def hash_there(client: "Client") -> str:
            hashed = hashlib.sha256()
            with client.get_blob(at, digest, stream=True) as response:
                for block in response.iter_content(8 << 20):
                    hashed.update(block)
            return f"sha256:{hashed.hexdigest()}"

        if self._call(f"read back {relative}", hash_there) != digest:
            raise self._differs(name, relative)
        return layer

    def _differs(self, name: str, relative: str) -> ProofError:
        return ProofError(
            f"{relative} at {self._address}/{name} is not what was proven: the registry has or "
            "received other bytes. No version has it. Run this step again; if it fails again, "
            "check the network and the registry's storage"
        )

    def _set_tag(self, name: str, tag: str, kind: str, layers: list[dict[str, Any]]) -> None:
        """Write the manifest under a tag that is free, and read it back.

        Raises:
            OutputExistsError: another run set the tag at this moment.
        """
        empty = {
            "mediaType": "application/vnd.oci.empty.v1+json",
            "digest": f"sha256:{hashlib.sha256(_EMPTY).hexdigest()}",
            "size": len(_EMPTY),
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST_TYPE,
            "artifactType": f"{ARTIFACT_TYPE}.{kind}",
            "config": empty,
            "layers": layers,
        }
        data = json.dumps(manifest, sort_keys=True).encode()
        at = self._container(name)
        self._call("send the empty config", lambda c: _send_bytes(c, at, _EMPTY, empty))
        url, headers = at.manifest_url(tag), {"Content-Type": _MANIFEST_TYPE}
        taken = OutputExistsError(
            f"{self._address}/{name}:{tag} was set by another run at this moment, so this model "
            "has no version. Run this step again when the other run has ended"
        )
        if self._manifest(name, tag) is not None:
            raise taken
        try:
            self._call(
                f"set the tag {tag} of {name}",
                lambda c: c.do_request(f"{c.prefix}://{url}", "PUT", data, headers),
            )
        except OutputExistsError:
            # An attempt whose answer was lost may have set it, in a registry whose tags are fixed.
            if self._manifest(name, tag) != data:
                raise
        if self._manifest(name, tag) != data:
            raise taken

    def _container(self, name: str) -> "Container":
        self._client()
        from oras.container import Container

        return Container(f"{self._address.removeprefix(OCI_PREFIX)}/{_repository(name)}")

    def _client(self) -> "Client":
        if self._opened is None:
            try:
                from tuneline.publish.targets.registry_client import Client
            except ImportError as error:
                raise DataError(
                    f"{self._address} needs the package oras, which is not installed ({error}): "
                    "install it with pip install 'tuneline[registries]'"
                ) from None
            self._opened = Client(self._address.removeprefix(OCI_PREFIX).partition("/")[0])
        return self._opened

    def _call(self, what: str, request: "Callable[[Client], T]") -> T:
        """Send a request; repeat it after a fault that may not last, see `retries`.

        Args:
            what: description of the request, for messages.
            request: function that sends it.

        Raises:
            TunelineError: the request failed after all attempts, or was refused.
        """
        client = self._client()
        try:
            return retrying(
                f"{what} at {self._address}",
                lambda: request(client),
                max_attempts=self._max_attempts,
                advice=_ADVICE,
            )
        except TunelineError:
            raise
        except Exception as error:
            raise self._explained(what, error) from error

    def _call_unless_absent(self, what: str, request: "Callable[[Client], T]") -> T | None:
        """Send a request as `_call` does; return None if the registry answers 404."""
        try:
            return self._call(what, request)
        except DataError as error:
            if http_status(error) == 404:
                return None
            raise

    def _explained(self, what: str, error: Exception) -> TunelineError:
        """Return an error whose message says what to try after a registry refused a request."""
        status = http_status(error)
        says = redacted(" ".join(str(error).split()))[:200]
        where = f"{what} at {self._address}"
        if status in (413, 507) or _NO_SPACE.search(says):
            return StorageError(
                f"{where}: the registry is full, a quota is used up or the file is too large for "
                f"it ({says}). Make space, raise the limit, or lower merge.max_shard_bytes"
            )
        if status in (401, 403):
            return CredentialsError(f"{where} is not allowed ({says}): {_CREDENTIALS}")
        if status == 404:
            return DataError(
                f"{where}: the registry does not find it ({says}). Check the address; some "
                "registries need the project or the repository to be made first"
            )
        if status == 405:
            return DataError(f"{where}: the registry is read-only ({says}). Make it writable")
        if status in (409, 412) or "TAG_INVALID" in says:
            return OutputExistsError(
                f"{where}: the registry does not replace what exists ({says}). Another run may "
                "have set the tag; run this step again"
            )
        if fault := passing_fault(error):
            return HubError(f"{where} failed ({fault.text}). {_ADVICE}")
        return DataError(f"{where} was refused: {says}. Check that the address is a registry's")


def _repository(name: str) -> str:
    """Return a model's name as the last part of a repository's path, which has small letters only.

    Raises:
        RecipeError: the name has characters that no repository may have.
    """
    lower = name.lower()
    if not re.fullmatch(OCI_REPOSITORY, lower):
        raise RecipeError(
            f"'{name}' cannot be the name of a repository in an OCI registry: between letters and "
            "digits there may be '.', '_', '__' or dashes. Choose another name"
        )
    return lower


def _layers(manifest: bytes) -> Mapping[str, Any]:
    """Return the layers of an artifact that tuneline made by their files; none of another's."""
    try:
        content = json.loads(manifest or b"{}")
        if not str(content.get("artifactType", "")).startswith(f"{ARTIFACT_TYPE}."):
            return {}
        return {layer["annotations"][TITLE]: layer for layer in content["layers"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _send_bytes(client: "Client", at: "Container", data: bytes, layer: Mapping[str, Any]) -> None:
    from oras.utils import append_url_params

    if not client.blob_exists(layer, at):
        address = append_url_params(client.begin_upload(at), {"digest": layer["digest"]})
        client.do_request(address, "PUT", data, {"Content-Type": "application/octet-stream"})
