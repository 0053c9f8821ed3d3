"""Store checked rows on disk, readable in any order, with only 8 bytes per row in memory."""

from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path


class Spool:
    """An append-only file of JSON lines; the offset of each line is held in memory."""

    def __init__(self, path: Path):
        self._file = open(path, "w+b")
        self._offsets = array("q")
        self._end = 0

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *unused: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._offsets)

    def append(self, line: bytes) -> None:
        """Append a line of JSON that ends with a line feed."""
        self._file.write(line)
        self._offsets.append(self._end)
        self._end += len(line)

    def read(self, indices: Iterable[int]) -> Iterator[bytes]:
        """Yield the lines with the given indices, in the given order."""
        self._file.flush()
        for index in indices:
            self._file.seek(self._offsets[index])
            yield self._file.readline()
