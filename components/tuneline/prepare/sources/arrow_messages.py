"""Check the lengths that an Arrow stream states, before its content is read.

pyarrow reserves what a message states, also where the file is far smaller. A message is a length,
metadata in FlatBuffers and a body of buffers; a buffer of a compressed body begins with its length
after decompression. The fields are those of Message.fbs in the Arrow format.
"""

import io
import struct
from typing import BinaryIO

from tuneline.errors import DataError
from tuneline.prepare.sources.arrow_sizes import OTHER_BYTES, check_size

FILE_MARK = b"ARROW1"
_STREAM_OF_FILE = 8
"""Position at which the stream begins in an Arrow file."""
_CONTINUES = 0xFFFFFFFF
"""What stands before the length of a message's metadata since version 0.15 of the format."""
_MAX_BATCH_BYTES = 4 << 30
"""Largest size of a decompressed batch, which is in memory as a whole."""
_HEADER_TYPE, _HEADER, _BODY_LENGTH = 1, 2, 3
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3
_DATA_OF_DICTIONARY = 1
_NODES, _BUFFERS, _COMPRESSION = 1, 2, 3


class Messages:
    """The messages of a stream or a file, each checked before pyarrow reads it."""

    def __init__(self, name: str, opened: BinaryIO) -> None:
        """Leave the file at the stream's beginning.

        Args:
            name: the file's name, for messages.
            opened: the file; it can be read at any position.
        """
        self._name, self._opened = name, opened
        self._end = opened.seek(0, io.SEEK_END)
        opened.seek(0)
        self._checked = _STREAM_OF_FILE if opened.read(len(FILE_MARK)) == FILE_MARK else 0
        opened.seek(self._checked)
        self._num_values = self._num_bytes = 0

    def check_next(self) -> None:
        """Check the messages up to the next batch of rows, and leave the file where it is.

        Raises:
            DataError: the lengths are out of proportion to the file, or the file is damaged.
        """
        place = self._opened.tell()
        if place < self._checked:
            return
        is_batch = False
        while self._checked < self._end and not is_batch:
            try:
                is_batch = self._check()
            except (struct.error, IndexError):
                raise self._incomplete("cannot be read") from None
        self._opened.seek(place)

    def _check(self) -> bool:
        """Check one message, and return whether it is a batch of rows or the last one."""
        metadata, body = _read_metadata(self._opened, self._checked, self._end)
        if not metadata:
            return True
        message = _target(metadata, 0)
        length = _number(metadata, message, _BODY_LENGTH, "<q")
        if not 0 <= length <= self._end - body:
            raise self._incomplete(
                f"states {length:,} bytes, and the file has {self._end - body:,} more"
            )
        self._checked = body + length
        batch = _batch_of(metadata, message)
        if batch is None:
            return False
        size = _decompressed(self._opened, metadata, batch, body, length)
        if size > max(_MAX_BATCH_BYTES, length):
            raise DataError(
                f"{self._name} has a batch of rows of {size:,} bytes after decompression, where "
                f"at most {_MAX_BATCH_BYTES:,} are read at once: write the file in smaller batches"
            )
        self._num_bytes += size
        self._num_values += sum(num_values for num_values, _ in _pairs(metadata, batch, _NODES))
        check_size(self._name, max(self._num_values * OTHER_BYTES, self._num_bytes), self._end)
        return _number(metadata, message, _HEADER_TYPE, "<B") == _RECORD_BATCH

    def _incomplete(self, why: str) -> DataError:
        return DataError(
            f"{self._name} is not a complete Arrow file: the message at byte {self._checked} "
            f"{why}. Create or download it again"
        )


def _read_metadata(opened: BinaryIO, place: int, end: int) -> tuple[bytes, int]:
    """Return a message's metadata and the place of its body; empty metadata end the stream."""
    opened.seek(place)
    (length,) = struct.unpack("<I", opened.read(4))
    if length == _CONTINUES:
        (length,) = struct.unpack("<I", opened.read(4))
    if length > end - opened.tell():
        raise IndexError
    return opened.read(length), opened.tell()


def _decompressed(opened: BinaryIO, metadata: bytes, batch: int, body: int, length: int) -> int:
    """Return the size of a batch's buffers after decompression."""
    buffers = _pairs(metadata, batch, _BUFFERS)
    if _field(metadata, batch, _COMPRESSION) is None:
        return sum(size for _, size in buffers)
    total = 0
    for offset, size in buffers:
        if not size:
            continue
        if not 0 <= offset <= length - 8:
            raise IndexError
        opened.seek(body + offset)
        (stated,) = struct.unpack("<q", opened.read(8))
        # -1 says that this buffer is not compressed.
        total += size if stated < 0 else stated
    return total


def _batch_of(metadata: bytes, message: int) -> int | None:
    """Return the position of the record batch of a message; None for a schema."""
    header = _field(metadata, message, _HEADER)
    kind = _number(metadata, message, _HEADER_TYPE, "<B")
    if header is None or kind not in (_RECORD_BATCH, _DICTIONARY_BATCH):
        return None
    table = _target(metadata, header)
    if kind == _DICTIONARY_BATCH:
        data = _field(metadata, table, _DATA_OF_DICTIONARY)
        return None if data is None else _target(metadata, data)
    return table


def _pairs(metadata: bytes, table: int, number: int) -> list[tuple[int, int]]:
    """Return a vector of pairs of 64-bit integers: nodes or buffers."""
    field = _field(metadata, table, number)
    if field is None:
        return []
    start = _target(metadata, field)
    (count,) = struct.unpack_from("<I", metadata, start)
    pairs = metadata[start + 4 : start + 4 + 16 * count]
    if len(pairs) < 16 * count:
        raise IndexError
    return list(struct.iter_unpack("<qq", pairs))


def _target(metadata: bytes, place: int) -> int:
    (offset,) = struct.unpack_from("<I", metadata, place)
    return place + int(offset)


def _number(metadata: bytes, table: int, number: int, layout: str) -> int:
    field = _field(metadata, table, number)
    return 0 if field is None else int(struct.unpack_from(layout, metadata, field)[0])


def _field(metadata: bytes, table: int, number: int) -> int | None:
    """Return the position of a table's field; None if it has its default."""
    (back,) = struct.unpack_from("<i", metadata, table)
    slots = table - back
    if slots < 0:
        raise IndexError
    (size,) = struct.unpack_from("<H", metadata, slots)
    slot = 4 + 2 * number
    if slot >= size:
        return None
    (offset,) = struct.unpack_from("<H", metadata, slots + slot)
    return table + int(offset) if offset else None
