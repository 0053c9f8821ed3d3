"""Publish to a store of files: s3://, gs:// or abfs://, through fsspec.

Each version is a directory of its own, which is never changed once it is complete:

    s3://BUCKET/PATH/NAME/v1/...
    s3://BUCKET/PATH/NAME/v2/...

A version is complete when it has tuneline.json, which is written last. Until then it has
tuneline.upload.json, by which the next push of the same model continues it. Every file is read back
and compared with the SHA-256 that was proven. Nothing is deleted but tuneline.upload.json.
"""

import contextlib
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tuneline.artifacts import PublishedRepo
from tuneline.errors import OutputExistsError, ProofError, TunelineError
from tuneline.publish.config import PublishConfig
from tuneline.publish.previous import MARKER_FILE, MAX_READ_BYTES, read_bundle, same_model
from tuneline.publish.staging import StagedRepo
from tuneline.publish.targets.versions import check_versions, newest_first, next_tag
from tuneline.record import sha256_of_file
from tuneline.runtime.retries import http_status, retrying
from tuneline.runtime.source_names import store_options
from tuneline.runtime.store_errors import explained

logger = logging.getLogger(__name__)

T = TypeVar("T")

UPLOAD_FILE = "tuneline.upload.json"
"""Copy of tuneline.json that a version has until it is complete."""
_BLOCK_BYTES = 8 << 20
_ADVICE = (
    "Check the network and the store, and run the step again later; files that arrived are not "
    "sent again"
)


@dataclass(frozen=True)
class _Held:
    """What a repository in a store holds."""

    tags: list[str]
    """The versions, complete or not, the newest first."""
    complete: str | None
    """The newest complete version."""
    bundle: dict[str, Any]
    """Its tuneline.json; empty without one."""
    unfinished: dict[str, dict[str, Any]]
    """tuneline.upload.json of each version that is not complete."""


class InStore:
    """A store of files as a place."""

    def __init__(self, address: str, config: PublishConfig) -> None:
        self._address = address
        self._max_attempts = config.max_attempts
        self._opened: Any = None

    def check(self, staged: Sequence[StagedRepo]) -> None:
        """Check that no repository has content of others; see `Place`."""
        self.check_access()
        for repo in staged:
            self._look_up(repo.folder.name, repo.kind)

    def check_access(self) -> None:
        """Check that the bucket exists and that these credentials may list the address.

        Raises:
            TunelineError: it does not, or they may not.
        """
        self._call("look up the address", self._list_bucket)

    def _list_bucket(self) -> None:
        fs = self._fs()
        path = fs._strip_protocol(self._address)
        try:
            fs.ls(path, detail=False)
        except FileNotFoundError:
            # Nothing is at the path yet, or there is no bucket.
            with contextlib.suppress(PermissionError):
                fs.ls(path.partition("/")[0], detail=False)

    def push(
        self, staged: Sequence[StagedRepo], elsewhere: Sequence[PublishedRepo] = ()
    ) -> list[PublishedRepo]:
        """Push every repository as a new version; see `Place`."""
        return [self._push_one(repo) for repo in staged]

    def read_last(self, name: str) -> str | None:
        """Return tuneline.json of the newest complete version; see `Place`."""
        for tag in newest_first(self._names(name)):
            if (text := self._read(f"{name}/{tag}/{MARKER_FILE}")) is not None:
                return text
        return None

    def _push_one(self, repo: StagedRepo) -> PublishedRepo:
        name = repo.folder.name
        held = self._look_up(name, repo.kind)
        files = repo.files()
        bundle = read_bundle(files[MARKER_FILE].read_text(encoding="utf-8"))
        is_same = held.complete is not None and same_model(bundle, held.bundle)
        if held.complete and is_same and self._is_whole(f"{name}/{held.complete}", bundle):
            tag = held.complete
            logger.info("%s/%s/%s holds the same model already", self._address, name, tag)
        else:
            begun = self._continue(name, held, bundle)
            tag = begun or self._begin(name, held, files[MARKER_FILE])
            # What an earlier push sent stays; the card has measured speeds, so it is sent again.
            kept = set(bundle["files"]) if begun else set()
            for relative in sorted(files, key=lambda each: (each == MARKER_FILE, each)):
                self._send(
                    files[relative],
                    f"{name}/{tag}/{relative}",
                    bundle["files"].get(relative),
                    may_be_there=relative in kept,
                )
            self._remove_upload_file(f"{name}/{tag}/{UPLOAD_FILE}")
        return PublishedRepo(
            repo=f"{self._address}/{name}",
            kind=repo.kind,
            url=f"{self._address}/{name}/{tag}",
            tag=tag,
            num_files=len(files),
            num_bytes=sum(path.stat().st_size for path in files.values()),
        )

    def _look_up(self, name: str, kind: str) -> _Held:
        """Return what a repository holds, if this run may publish to it.

        Raises:
            OutputExistsError: tuneline did not make it, or it holds another kind.
        """
        names = self._names(name)
        tags = newest_first(names)
        unfinished = {}
        complete, bundle = None, {}
        for tag in tags:
            if (text := self._read(f"{name}/{tag}/{MARKER_FILE}")) is not None:
                complete, bundle = tag, read_bundle(text)
                break
            if (text := self._read(f"{name}/{tag}/{UPLOAD_FILE}")) is not None:
                unfinished[tag] = read_bundle(text)
        check_versions(
            f"{self._address}/{name}",
            names=names,
            has_ours=bool(complete or unfinished),
            last=bundle,
            kind=kind,
        )
        return _Held(tags, complete, bundle, unfinished)

    def _is_whole(self, version: str, bundle: dict[str, Any]) -> bool:
        """Return whether a version still has all files of its tuneline.json."""
        root = self._full(version)
        found = self._call(f"look up {version}", lambda: self._fs().find(root))
        names = {str(path).removeprefix(f"{root}/") for path in found}
        if missing := sorted(bundle["files"].keys() - names):
            logger.warning(
                "%s/%s lacks %s, which somebody removed, so this run makes a new version",
                *(self._address, version, ", ".join(missing[:3])),
            )
        return not missing

    def _continue(self, name: str, held: _Held, bundle: dict[str, Any]) -> str | None:
        """Return the tag of an unfinished version of this model; None without one."""
        for tag, begun in held.unfinished.items():
            if same_model(bundle, begun):
                logger.info("%s/%s/%s is continued", self._address, name, tag)
                return tag
            logger.warning(
                "%s/%s/%s is an unfinished upload of another model and is left as it is: delete it "
                "if no other run is uploading it",
                *(self._address, name, tag),
            )
        return None

    def _begin(self, name: str, held: _Held, marker: Path) -> str:
        """Begin a new version, and return its tag.

        Raises:
            OutputExistsError: another run has begun it.
        """
        tag = next_tag(held.tags)
        path = f"{name}/{tag}/{UPLOAD_FILE}"
        try:
            create = partial(self._create, path, marker.read_bytes())
            self._call(f"begin {name}/{tag}", create, verb="written")
        except FileExistsError:
            raise OutputExistsError(
                f"{self._address}/{name}/{tag} was begun by another run at this moment, so nothing "
                "was sent there. Run this step again when the other run has ended"
            ) from None
        return tag

    def _create(self, path: str, data: bytes) -> None:
        """Write a file that must not exist yet.

        Raises:
            FileExistsError: the file exists.
        """
        fs, full = self._fs(), self._full(path)
        try:
            fs.pipe_file(full, data, mode="create")
        except Exception as error:
            # An attempt whose response was lost may have created it.
            if isinstance(error, FileExistsError) or http_status(error) in (409, 412):
                if fs.cat_file(full) == data:
                    return
                raise FileExistsError(full) from error
            raise

    def _send(self, path: Path, relative: str, sha256: str | None, *, may_be_there: bool) -> None:
        """Send a file unless the store has it, and check what the store has.

        Args:
            path: the staged file.
            relative: path in the store, below the address.
            sha256: its proven hash; None: of a file that publish itself wrote.
            may_be_there: whether an earlier push may have sent the file.

        Raises:
            ProofError: the store holds other bytes.
        """
        expected = sha256 or sha256_of_file(path)
        if may_be_there and self._hash(relative, path.stat().st_size) == expected:
            logger.info("%s/%s is there already", self._address, relative)
            return
        put = partial(self._fs().put_file, str(path), self._full(relative))
        self._call(f"send {relative}", put, verb="written")
        found = self._hash(relative, path.stat().st_size)
        if found != expected:
            raise ProofError(
                f"{self._address}/{relative} is not what was proven: its SHA-256 is "
                f"{(found or 'of another size')[:15]} instead of {expected[:12]}. The version has "
                f"no {MARKER_FILE}, so it is not complete. Run this step again"
            )

    def _hash(self, relative: str, size: int) -> str | None:
        """Return the SHA-256 of a file in the store; None if it is absent or has another size."""

        def read() -> str | None:
            fs, full = self._fs(), self._full(relative)
            try:
                if fs.info(full)["size"] != size:
                    return None
            except FileNotFoundError:
                return None
            hashed = hashlib.sha256()
            for start in range(0, size, _BLOCK_BYTES):
                hashed.update(fs.cat_file(full, start=start, end=min(size, start + _BLOCK_BYTES)))
            return hashed.hexdigest()

        return self._call(f"read back {relative}", read)

    def _names(self, name: str) -> set[str]:
        """Return the names of what is directly in a repository; none if it does not exist."""

        def read() -> set[str]:
            try:
                entries = self._fs().ls(self._full(name), detail=False)
            except FileNotFoundError:
                return set()
            # A store may list the directory itself, as an empty object.
            names = {str(entry).rstrip("/").rpartition("/")[2] for entry in entries}
            return names - {name, ""}

        return self._call(f"look up {name}", read)

    def _read(self, relative: str) -> str | None:
        """Return the text of a small file; None if it does not exist or is too large to be ours."""

        def read() -> str | None:
            fs, full = self._fs(), self._full(relative)
            try:
                if fs.info(full)["size"] > MAX_READ_BYTES:
                    return None
                return str(fs.cat_file(full).decode("utf-8", errors="replace"))
            except FileNotFoundError:
                return None

        return self._call(f"look up {relative}", read)

    def _remove_upload_file(self, relative: str) -> None:
        try:
            remove = partial(self._fs().rm_file, self._full(relative))
            self._call(f"remove {relative}", remove, verb="written")
        except TunelineError as error:
            # The version is complete, and credentials need not be allowed to delete.
            logger.warning("%s stays beside the complete version: %s", relative, error)

    def _fs(self) -> Any:
        if self._opened is None:
            import fsspec

            self._opened, _ = fsspec.url_to_fs(
                self._address, use_listings_cache=False, **store_options(self._address)
            )
        return self._opened

    def _full(self, relative: str) -> str:
        return str(self._fs()._strip_protocol(f"{self._address}/{relative}"))

    def _call(self, what: str, request: Callable[[], T], *, verb: str = "read") -> T:
        """Send a request; repeat it after a fault that may not last, see `retries`.

        Args:
            what: description of the request, for messages.
            request: function that sends it.
            verb: what it does with the store, "read" or "written".

        Raises:
            FileExistsError: `request` raised it.
            TunelineError: the request failed after all attempts, or was refused.
        """
        what = f"{what} at {self._address}"
        try:
            return retrying(what, request, max_attempts=self._max_attempts, advice=_ADVICE)
        except (TunelineError, FileExistsError):
            raise
        except Exception as error:
            raise explained(self._address, error, verb=verb) from error
