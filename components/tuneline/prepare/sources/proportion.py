"""Bounds for the content of a file, which may be far larger than the file."""

from tuneline.errors import DataError

MAX_ROW_BYTES = 64 << 20
"""Largest row that is read, in bytes. A step holds a row in memory several times."""
MAX_RATIO = 500
"""Largest accepted size of a file's content, as a multiple of the file's own size. Text is seldom
more than 30 times its compressed size."""
FREE_BYTES = 256 << 20
"""Number of bytes of content from which `MAX_RATIO` counts."""


def check_proportion(file: str, num_bytes: int, stored: str, num_stored: int, advice: str) -> None:
    """Refuse a file whose content is out of proportion to the file's own size.

    Args:
        file: the file's name, for the message.
        num_bytes: number of bytes of content, so far or in all.
        stored: what holds the content, with its size, e.g. "its 512 bytes".
        num_stored: number of bytes that hold the content.
        advice: what to do if the file is right.

    Raises:
        DataError: the content is larger than FREE_BYTES and than MAX_RATIO times `num_stored`.
    """
    if num_bytes > FREE_BYTES and num_bytes > MAX_RATIO * num_stored:
        raise DataError(
            f"{file} has {num_bytes:,} bytes of content in {stored}, more than {MAX_RATIO} times "
            f"as many, as only files that are made to fill a machine have: if the file is right, "
            f"{advice}"
        )


TOO_LARGE = f"larger than the {MAX_ROW_BYTES:,} bytes that one row can have; divide its text"
"""Why a row cannot be used."""
