"""Small files that `tuneline submit` sends with a run: pack, unpack and find them.

A run's parameters reach a step as one argument of a process, which Linux limits to 128 KiB, and are
part of the workflow, which Kubernetes limits to about 1 MiB, in several copies. Therefore only
files that compress to a few dozen KiB are sent this way.
"""

import base64
import io
import lzma
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from tuneline.errors import DataError
from tuneline.prepare.config import DatasetConfig, PrepareConfig
from tuneline.runtime.source_names import UPLOAD_PREFIX

MAX_CHARACTERS = 64 * 1024
"""Largest text that is sent with a run; it holds 48 KiB of compressed files."""
_SECONDS_PER_DAY = 24 * 60 * 60


def pack(files: Mapping[str, Path]) -> str:
    """Return files, by their name in the archive, as text: an archive in xz and Base64.

    The text is the same for the same files on the same day, so that KFP's cache recognises it.
    """
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, path in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            content = path.read_bytes()
            entry.size = len(content)
            entry.mtime = int(path.stat().st_mtime) // _SECONDS_PER_DAY * _SECONDS_PER_DAY
            tar.addfile(entry, io.BytesIO(content))
    return base64.b64encode(lzma.compress(archive.getvalue(), preset=9)).decode()


def unpack(text: str, directory: str | Path) -> None:
    """Write the files of an archive that `pack` made to a directory.

    Raises:
        DataError: the text is not such an archive.
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    try:
        content = lzma.decompress(base64.b64decode(text, validate=True))
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for entry in tar:
                _write(tar, entry, Path(directory))
    except (ValueError, lzma.LZMAError, tarfile.TarError) as error:
        raise DataError(
            f"the files that were sent with this run are damaged ({error}): submit the recipe again"
        ) from None


def _write(tar: tarfile.TarFile, entry: tarfile.TarInfo, directory: Path) -> None:
    """Write one file of an archive, with its date.

    `TarFile.extractall` is safe only with its `filter`, which Python has since 3.11.4. The Python
    3.11.2 of Debian 12 lacks it.
    """
    content = tar.extractfile(entry) if entry.isfile() else None
    path = PurePosixPath(entry.name)
    if content is None or path.is_absolute() or ".." in path.parts:
        raise tarfile.TarError(f"{entry.name!r} is not a file below the archive")
    target = directory / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content.read())
    os.utime(target, (entry.mtime, entry.mtime))


def locate(
    datasets: list[DatasetConfig], config: PrepareConfig, uploads_dir: str | None
) -> tuple[list[DatasetConfig], PrepareConfig]:
    """Return the datasets and the config with the paths of uploaded files for `upload:NAME`."""
    if uploads_dir is None:
        return datasets, config

    def path(source: str) -> str:
        if not source.startswith(UPLOAD_PREFIX):
            return source
        return f"{uploads_dir}/{source.removeprefix(UPLOAD_PREFIX)}"

    placed = [entry.model_copy(update={"source": path(entry.source)}) for entry in datasets]
    heldout, general = config.heldout, config.general
    if heldout.source is not None:
        heldout = heldout.model_copy(update={"source": path(heldout.source)})
    if general is not None:
        general = general.model_copy(update={"source": path(general.source)})
    return placed, config.model_copy(update={"heldout": heldout, "general": general})
