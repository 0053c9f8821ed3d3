"""Check the counts in the header of a GGUF file before a reader trusts them, and read its values.

The readers of gguf and transformers allocate and loop by the counts that a file states. A file of a
hundred bytes may state 2^60 values. For a vocabulary of 150,000 tokens, gguf's reader takes about
ten seconds; the check, which skips it, less than one.
"""

import os
import struct
from collections.abc import Container
from pathlib import Path
from typing import Any, BinaryIO

from tuneline.errors import ModelError
from tuneline.fetch.weight_headers import check_complete

_CODES = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""Code by which struct reads a number, by the number of its type."""
_SIZES = {kind: struct.calcsize(f"<{code}") for kind, code in _CODES.items()}
"""Bytes of a number, by the number of its type."""
_STRING, _ARRAY = 8, 9
_SMALLEST_ENTRY = 13
"""Fewest bytes of a key with its value: a length, a type and one byte."""
_SMALLEST_TENSOR = 24
"""Fewest bytes of a tensor's entry: a name's length, a number of dimensions, a type, an offset."""
_MAX_ARRAY_DEPTH = 8
_MAX_VALUE_BYTES = 1 << 20
"""Longest value that is returned."""


def check_header(path: Path, arrays: Container[str] = ()) -> dict[str, Any]:
    """Check that every count in the header fits into the file; return its numbers and texts by key.

    Args:
        path: the GGUF file.
        arrays: keys of arrays that are returned too, as lists of numbers or texts. Other arrays,
            such as the vocabulary, are left out.

    Raises:
        ModelError: the file is a pointer of Git LFS or not GGUF, or states more than it holds.
    """
    check_complete([path], str(path.parent))
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file: it does not begin with the letters GGUF")
        try:
            return _walk(file, size, arrays)
        except (ValueError, struct.error) as error:
            raise ModelError(
                f"{path} is not a whole GGUF file ({error}): download it again, or name the "
                "safetensors model that it was made from"
            ) from None


def _walk(file: BinaryIO, size: int, arrays: Container[str]) -> dict[str, Any]:
    """Read the header after its first four letters; return its values by key."""
    _, num_tensors, num_entries = struct.unpack("<IQQ", file.read(20))
    if num_tensors * _SMALLEST_TENSOR + num_entries * _SMALLEST_ENTRY > size:
        raise ValueError(
            f"its header states {num_tensors} tensors and {num_entries} keys, more than its {size} "
            "bytes can hold"
        )
    values: dict[str, Any] = {}
    for _ in range(num_entries):
        start = file.tell()
        _skip_value(file, _STRING, size, depth=0)
        key = _value(_again(file, start), _STRING)
        (kind,) = struct.unpack("<I", file.read(4))
        start = file.tell()
        _skip_value(file, kind, size, depth=0)
        if kind != _ARRAY and file.tell() - start <= _MAX_VALUE_BYTES:
            values[key] = _value(_again(file, start), kind)
        elif key in arrays:
            values[key] = _items(_again(file, start))
    return values


def _again(file: BinaryIO, start: int) -> bytes:
    """Return the bytes from `start` to where the file is."""
    num_bytes = file.tell() - start
    file.seek(start)
    return file.read(num_bytes)


def _value(stored: bytes, kind: int) -> Any:
    """Return a number, or a text, which has its length in front."""
    if kind == _STRING:
        return stored[8:].decode("utf-8", "replace")
    return struct.unpack(f"<{_CODES[kind]}", stored)[0]


def _items(stored: bytes) -> list[Any]:
    """Return the numbers or texts of an array, which `_skip_value` has measured.

    Raises:
        ValueError: it is an array of arrays.
    """
    kind, count = struct.unpack_from("<IQ", stored)
    start = 12
    if kind in _SIZES:
        return list(struct.unpack_from(f"<{count}{_CODES[kind]}", stored, start))
    if kind != _STRING:
        raise ValueError("it holds arrays of arrays where texts or numbers belong")
    texts = []
    for _ in range(count):
        (num_bytes,) = struct.unpack_from("<Q", stored, start)
        start += 8
        texts.append(stored[start : start + num_bytes].decode("utf-8", "replace"))
        start += num_bytes
    return texts


def _skip_value(file: BinaryIO, kind: int, size: int, *, depth: int) -> None:
    """Move behind a value.

    Args:
        file: the file, at the value.
        kind: number of the value's type.
        size: size of the file in bytes.
        depth: number of arrays that the value is in.
    """
    if kind == _STRING:
        _skip(file, struct.unpack("<Q", file.read(8))[0], size)
    elif kind == _ARRAY:
        inner, count = struct.unpack("<IQ", file.read(12))
        if depth > _MAX_ARRAY_DEPTH:
            raise ValueError(f"its arrays are nested deeper than {_MAX_ARRAY_DEPTH}")
        if inner in _SIZES:
            _skip(file, count * _SIZES[inner], size)
            return
        # A string or an array has at least the 8 bytes of its length.
        if file.tell() + 8 * count > size:
            raise ValueError(f"an array states {count} values, more than the file can hold")
        for _ in range(count):
            _skip_value(file, inner, size, depth=depth + 1)
    elif kind in _SIZES:
        _skip(file, _SIZES[kind], size)
    else:
        raise ValueError(f"a value has the unknown type {kind}")


def _skip(file: BinaryIO, num_bytes: int, size: int) -> None:
    """Move ahead within the file."""
    if file.tell() + num_bytes > size:
        raise ValueError(f"a value states {num_bytes} bytes, more than the file has left")
    file.seek(num_bytes, os.SEEK_CUR)
