"""Checked rows on disk, read back in any order; memory holds 16 bytes a row for them."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


class Spool:
    """An append-only file of JSON values with their offsets."""

    def __init__(self, path: Path):
        self._file = open(path, "w+b")
        self._offsets = array("q")
        self._digests = array("Q")
        self._end = 0

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *unused: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._offsets)

    def append(self, value: dict[str, Any]) -> None:
        """Add a value behind the others."""
        line = json.dumps(value, ensure_ascii=False).encode("utf-8") + b"\n"
        self._file.write(line)
        self._offsets.append(self._end)
        self._digests.append(
            int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "little")
        )
        self._end += len(line)

    def digest(self, index: int) -> int:
        """Return a 64-bit hash of the value; equal values have equal ones."""
        return self._digests[index]

    def read(self, indices: Iterable[int]) -> Iterator[tuple[bytes, dict[str, Any]]]:
        """Yield each value as the bytes in the file and as it was given."""
        self._file.flush()
        for index in indices:
            self._file.seek(self._offsets[index])
            line = self._file.readline()
            yield line, json.loads(line)
