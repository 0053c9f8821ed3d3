"""Tell a full disk from other failures of a program, which may have no word for it."""

import errno
import os
import shutil
from pathlib import Path

FULL_BYTES = 1 << 20


def raise_if_full(file: Path) -> None:
    """Check, after a program failed to write a file, whether there is room left beside it.

    llama.cpp says "basic_ios::clear: iostream error", and its converter how many bytes it wrote.

    Raises:
        OSError: there is none.
    """
    if shutil.disk_usage(file.parent).free < FULL_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
