"""Files on this machine or in a store: list them, open them, and explain why that fails.

Stores are read through fsspec, with the credentials that each store's own library finds. A path on
this machine is read without fsspec.
"""

import email.utils
import io
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import aiohttp
import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.utils import glob_translate

from tuneline.errors import DataError
from tuneline.prepare.sources.local import files_below, matching_files
from tuneline.runtime.retries import Retries
from tuneline.runtime.source_names import (
    fixed_part,
    is_web_address,
    store_of,
    store_options,
    without_query,
)
from tuneline.runtime.store_errors import explained, readable_errors

_BLOCK_BYTES = 1 << 20
_RANGE_BYTES = 8 << 20
"""Size of a request to a store."""
_SECONDS_TO_CONNECT, _SECONDS_TO_READ = 30, 120
_RETRY_ADVICE = "Check the network and the store, and run the step again later"


@dataclass(frozen=True)
class StoredFile:
    """One file."""

    name: str
    """Name within the source, for messages."""
    path: str
    """Path on this machine, or address in a store."""
    size: int | None
    version: str
    """Text that changes when the content does; "" if the store reports none."""
    modified: float | None
    """Time of the last change, in seconds since 1970; None if the store reports none."""

    def open(self) -> io.BufferedReader:
        """Open the file for reading its bytes in order."""
        if store_of(self.path) is None:
            return open(self.path, "rb")
        return io.BufferedReader(_StoreReader(self), _BLOCK_BYTES)

    def open_seekable(self) -> BinaryIO:
        """Open the file for reading at any position; a file on the web is copied to a disk."""
        if not is_web_address(self.path):
            return self.open()
        copy: IO[bytes] = tempfile.TemporaryFile()
        with self.open() as opened:
            shutil.copyfileobj(opened, copy, _BLOCK_BYTES)
        copy.seek(0)
        return cast(BinaryIO, copy)


@dataclass(frozen=True)
class Listing:
    """The files of a source."""

    files: list[StoredFile]
    """The files, sorted by name."""
    is_directory: bool
    """Whether the source is a directory, and not a file or a glob."""
    is_file: bool
    """Whether the source is a single file."""


def list_source(source: str) -> Listing:
    """Return the files of a file, a directory or a glob, on this machine or in a store.

    Raises:
        DataError: there is nothing at that place.
        CredentialsError: the store refused the credentials, or there are none.
        HubError: the store could not be reached.
    """
    return _list_local(source) if store_of(source) is None else _list_store(source)


def has_magic(source: str) -> bool:
    """Return whether a source is a pattern of file names."""
    return not is_web_address(source) and any(mark in source for mark in "*?[")


def _list_local(source: str) -> Listing:
    path = Path(source).expanduser()
    if path.is_file():
        return Listing([_local_file(path.name, str(path))], False, True)
    if path.is_dir():
        names = sorted(str(file.relative_to(path)) for file in files_below(path))
        return Listing([_local_file(name, str(path / name)) for name in names], True, False)
    if not has_magic(source):
        raise DataError(f"there is no file or directory {source}")
    fixed = fixed_part(str(path))
    names = sorted(os.path.relpath(file, fixed or ".") for file in matching_files(str(path)))
    return Listing([_local_file(name, os.path.join(fixed, name)) for name in names], False, False)


def _local_file(name: str, path: str) -> StoredFile:
    status = os.stat(path)
    version = f"{status.st_size} {status.st_mtime_ns}"
    return StoredFile(name, path, status.st_size, version, status.st_mtime)


def _list_store(source: str) -> Listing:
    if is_web_address(source):
        return Listing([_web_file(source)], False, True)
    with readable_errors(source):
        fs, path = _file_system(source)
        fs.invalidate_cache()
        if has_magic(path):
            fixed = fixed_part(path)
            pattern = glob_translate(path)
            found = _files(fs, fixed, fixed, pattern)
            return Listing(found, False, False)
        information = fs.info(path)
        if information["type"] == "file":
            name = path.rpartition("/")[2]
            return Listing([_store_file(fs, name, path, information)], False, True)
        return Listing(_files(fs, path, path, None), True, False)


def _files(fs: Any, root: str, base: str, pattern: str | None) -> list[StoredFile]:
    files = []
    for path, information in sorted(fs.find(root, detail=True).items()):
        if pattern is None or re.fullmatch(pattern, path):
            name = path[len(base.rstrip("/")) :].lstrip("/") if base else path
            files.append(_store_file(fs, name, path, information))
    return files


def _store_file(fs: Any, name: str, path: str, information: dict[str, Any]) -> StoredFile:
    version = next(
        (
            str(information[key])
            for key in ("ETag", "etag", "md5Hash", "crc32c", "content_md5", "blob_id", "lfs")
            if information.get(key)
        ),
        "",
    )
    modified: Any = next(
        (
            information[key]
            for key in ("LastModified", "last_modified", "updated", "mtime", "timeModified")
            if information.get(key)
        ),
        None,
    )
    seconds = modified.timestamp() if hasattr(modified, "timestamp") else None
    version = version or str(modified or "")
    size = information.get("size")
    if version:
        version = f"{size} {version}"
    return StoredFile(name, fs.unstrip_protocol(path), size, version, seconds)


def _web_file(source: str) -> StoredFile:
    name = without_query(source).rpartition("/")[2]
    with readable_errors(source):
        fs, path = _file_system(source)
        information = fs.info(path)
    entity = str(information.get("ETag") or "")
    date = information.get("Last-Modified") or information.get("last_modified")
    try:
        seconds = email.utils.parsedate_to_datetime(str(date)).timestamp() if date else None
    except ValueError:
        seconds = None
    return StoredFile(name, source, information.get("size"), entity, seconds)


def _file_system(source: str) -> tuple[Any, str]:
    """Return the file system of a store, and the path of a source in it."""
    options = store_options(source)
    if is_web_address(source):
        # The default ends a download after five minutes, however it proceeds.
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=_SECONDS_TO_CONNECT, sock_read=_SECONDS_TO_READ
        )
        # Proxies are those of HTTP_PROXY, HTTPS_PROXY and NO_PROXY.
        options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
    fs, path = fsspec.url_to_fs(source, **options)
    return fs, path


class _StoreReader(io.RawIOBase):
    """Read a file of a store from its beginning to its end; a read that failed is repeated."""

    def __init__(self, file: StoredFile) -> None:
        self._stored = file
        self._opened: Any = None
        self._position = 0
        self._retries = Retries(f"read {without_query(file.path)}", advice=_RETRY_ADVICE)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return not is_web_address(self._stored.path)

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._stored.size or 0}
        self._position = start[whence] + offset
        if self._opened is not None:
            self._opened.seek(self._position)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        while True:
            try:
                data = self._read(len(view))
                break
            except Exception as error:
                self._close_opened()
                try:
                    self._retries.wait(error)
                except Exception as last:
                    raise explained(self._stored.path, last) from last
        self._retries.start_again()
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _read(self, size: int) -> bytes:
        if self._opened is None:
            self._opened = self._open()
        data: bytes = self._opened.read(size)
        whole = self._stored.size
        if not data and size and whole is not None and self._position < whole and self.seekable():
            raise ConnectionError(f"the file ends after {self._position} of {whole} bytes")
        return data

    def _open(self) -> Any:
        fs, path = _file_system(self._stored.path)
        if isinstance(fs, AsyncFileSystem) and is_web_address(self._stored.path):
            opened = fs.open(path, "rb", block_size=0)
            skipped = 0
            while skipped < self._position:
                block = opened.read(min(_BLOCK_BYTES, self._position - skipped))
                if not block:
                    raise ConnectionError("the file is shorter than before")
                skipped += len(block)
            return opened
        opened = fs.open(path, "rb", block_size=_RANGE_BYTES, cache_type="readahead")
        opened.seek(self._position)
        return opened

    def _close_opened(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            try:
                opened.close()
            except Exception:  # noqa: BLE001, the connection is broken anyway
                pass

    def close(self) -> None:
        self._close_opened()
        super().close()
