"""Read what a base model is made of, without its weights: config.json and the weights' headers.

A safetensors file begins with the names and shapes of its tensors, so that a request for its first
bytes is enough. urllib3 makes the requests, because this package needs no huggingface_hub.
"""

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import urllib3

from tuneline.models.weight_files import INDEX_FILE, MAX_HEADER_BYTES, SINGLE_FILE
from tuneline.runtime.http_pool import http_pool
from tuneline.runtime.source_names import builtin_name, is_hub_id, looks_like_a_path

DEFAULT_ENDPOINT = "https://huggingface.co"
TIMEOUT_SECONDS = 5.0

_FIRST_BYTES = 200_000
"""Bytes of the first request for a header; the headers of most files are shorter."""
_NUM_REQUESTS = 8
"""Requests for headers at a time."""


class Unknown(Exception):
    """Nothing can be read of the model; the message is the reason."""


@dataclass(frozen=True)
class ModelFiles:
    """The config and the tensors of a model."""

    config: dict[str, Any]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    """Number format and shape of each tensor, by its name."""
    problem: str = ""
    """Why the tensors are not known, in words; empty if they are."""


def read_model(source: str, *, revision: str | None = None) -> ModelFiles:
    """Read a base model's config.json and the headers of its weight files.

    HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE apply as in huggingface_hub.

    Args:
        source: the recipe's `base_model`: a directory, or an ID on the Hub.
        revision: branch, tag or commit on the Hub; None: the default branch.

    Raises:
        Unknown: the source is of another kind, or its config.json cannot be read from here.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _read(lambda name, first, size: _read_file(path / name, first, size))
    if builtin_name(source) is not None:
        raise Unknown("plan does not open built-in models")
    if looks_like_a_path(source) or not is_hub_id(source):
        raise Unknown("it is not a directory on this machine, nor an ID on the Hub")
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        raise Unknown("HF_HUB_OFFLINE is set")
    hub = _Hub(source, revision or "main")
    return _read(hub.read)


def _read(read: Callable[[str, int, int | None], bytes | None]) -> ModelFiles:
    """Read a model with a function that returns a part of a file, or None if there is no file."""
    raw = read("config.json", 0, None)
    if raw is None:
        raise Unknown("it has no config.json")
    config = _object(raw, "config.json")
    try:
        return ModelFiles(config=config, tensors=_tensors(read))
    except Unknown as reason:
        return ModelFiles(config=config, tensors={}, problem=str(reason))


def _tensors(
    read: Callable[[str, int, int | None], bytes | None],
) -> dict[str, tuple[str, tuple[int, ...]]]:
    index = read(INDEX_FILE, 0, None)
    files = [SINGLE_FILE]
    if index is not None:
        weight_map = _object(index, INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict):
            raise Unknown(f"its {INDEX_FILE} names no files")
        files = sorted({str(file) for file in weight_map.values()})
    with ThreadPoolExecutor(_NUM_REQUESTS) as pool:
        headers = list(pool.map(lambda file: _header(file, read), files))
    return {
        name: (str(entry["dtype"]), tuple(map(int, entry["shape"])))
        for header in headers
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _header(file: str, read: Callable[[str, int, int | None], bytes | None]) -> dict[str, Any]:
    start = read(file, 0, _FIRST_BYTES)
    if start is None:
        raise Unknown(f"it has no {file}")
    length = int.from_bytes(start[:8], "little")
    if not 0 < length <= MAX_HEADER_BYTES:
        raise Unknown(f"{file} is not a safetensors file")
    missing = 8 + length - len(start)
    if missing > 0:
        start += read(file, len(start), missing) or b""
    return _object(start[8 : 8 + length], file)


def _object(raw: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise Unknown(f"its {name} is broken")
    return value


def _read_file(path: Path, first: int, size: int | None) -> bytes | None:
    try:
        with open(path, "rb") as stream:
            stream.seek(first)
            return stream.read(size if size is not None else -1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Unknown(f"{path.name} cannot be read: {error.strerror}") from None


class _Hub:
    """The files of a repository on the Hub."""

    def __init__(self, repo: str, revision: str) -> None:
        self._endpoint = os.environ.get("HF_ENDPOINT", DEFAULT_ENDPOINT).rstrip("/")
        self._address = f"{self._endpoint}/{repo}/resolve/{revision}"
        retries = urllib3.Retry(2, connect=0, backoff_factor=0.5, redirect=5)
        self._http = http_pool(
            self._endpoint, timeout=TIMEOUT_SECONDS, retries=retries, maxsize=_NUM_REQUESTS
        )

    def read(self, name: str, first: int, size: int | None) -> bytes | None:
        """Return a part of a file, or None if there is no file.

        Raises:
            Unknown: the Hub cannot be reached, or does not give the file.
        """
        headers = {}
        if size is not None:
            headers["Range"] = f"bytes={first}-{first + size - 1}"
        token = os.environ.get("HF_TOKEN", "").strip()
        if token:
            headers["Authorization"] = f"Bearer {token}"
        try:
            # A server that ignores Range would send the whole file: read no more than asked for.
            answer = self._http.request(
                "GET", f"{self._address}/{name}", headers=headers, preload_content=False
            )
            status = answer.status
            wanted = size if size is not None and status == 206 else None
            limit = MAX_HEADER_BYTES if wanted is None else wanted
            ignored = first if size is not None and status == 200 else 0
            body = answer.read(min(limit, ignored + size) if size is not None else limit)
            answer.close()
        except urllib3.exceptions.HTTPError as error:
            raise Unknown(
                f"{self._endpoint} cannot be reached from here ({type(error).__name__})"
            ) from None
        if status in (200, 206):
            return bytes(body[ignored:])
        if status == 404:
            return None
        if status in (401, 403):
            raise Unknown(f"{self._endpoint} has no such model that HF_TOKEN may read")
        raise Unknown(f"{self._endpoint} answered {status}")
