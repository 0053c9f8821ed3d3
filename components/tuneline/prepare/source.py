"""Find out what a source is, and read its rows one at a time, each with its place."""

import glob
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

from tuneline.errors import DataError, HubError
from tuneline.hub_id import HUB_ID
from tuneline.prepare.files import SUFFIXES, SourceRow, read_file

logger = logging.getLogger(__name__)

BUILTINS = ("kubernetes-quantities",)


def read_rows(
    source: str, *, split: str = "train", subset: str | None = None, revision: str | None = None
) -> Iterator[SourceRow]:
    """Yield the rows of a Hub data set, a file, a directory, a glob of files or a built-in.

    Raises:
        DataError: the source does not exist, or is of no known kind.
        HubError: the Hub could not be reached.
    """
    files = find_files(source)
    if source.startswith("builtin:"):
        return _read_builtin(source)
    if files:
        return itertools.chain.from_iterable(read_file(file) for file in files)
    return _read_hub(source, split=split, subset=subset, revision=revision)


def find_files(source: str) -> list[Path]:
    """Return the files that `source` names, sorted; none where it is a Hub id or a built-in.

    Raises:
        DataError: it names files, and there are none, or none of a known kind.
    """
    if source.startswith("builtin:"):
        _check_builtin(source)
        return []
    path = Path(source).expanduser()
    known = ", ".join(SUFFIXES)
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{source} is of no kind that can be read: known are {known}")
        return [path]
    if path.is_dir():
        found = [file for file in sorted(path.rglob("*")) if file.is_file()]
    elif any(mark in source for mark in "*?["):
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    elif source.startswith(("/", ".", "~")) or path.suffix.lower() in SUFFIXES:
        raise DataError(f"there is no file or directory {source}")
    elif not HUB_ID.fullmatch(source):
        raise DataError(
            f"'{source}' is no file, no directory and no Hub id: name e.g. rows.jsonl, "
            "data/*.parquet, openai/gsm8k or builtin:kubernetes-quantities"
        )
    else:
        return []
    files = [file for file in found if file.is_file() and file.suffix.lower() in SUFFIXES]
    ignored = sorted({file.name for file in found if file.is_file()} - {f.name for f in files})
    if not files:
        raise DataError(f"{source} holds no file that can be read: known are {known}")
    if ignored:
        logger.warning("%s: %d files of other kinds are left: %s", source, len(ignored), ignored[0])
    return files


def _check_builtin(source: str) -> None:
    name = source.removeprefix("builtin:")
    if name not in BUILTINS:
        raise DataError(
            f"there is no builtin data set '{name}': known are "
            + ", ".join(f"builtin:{known}" for known in BUILTINS)
        )


def _read_builtin(source: str) -> Iterator[SourceRow]:
    from tuneline.prepare import quantities

    for number, values in enumerate(quantities.rows(), 1):
        yield SourceRow(source, number, values)


def _read_hub(
    source: str, *, split: str, subset: str | None, revision: str | None
) -> Iterator[SourceRow]:
    from datasets import exceptions, load_dataset
    from huggingface_hub import constants
    from huggingface_hub import errors as hub_errors

    try:
        rows = load_dataset(source, subset, split=split, revision=revision, streaming=True)
        for number, values in enumerate(rows, 1):
            yield SourceRow(source, number, values)
    except exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"{constants.ENDPOINT} has no data set '{source}' that this token may see, or it is "
            f"gated ({' '.join(str(error).split())[:200]}): check the spelling, set HF_TOKEN"
        ) from None
    except (hub_errors.HTTPError, hub_errors.HfHubHTTPError, ConnectionError) as error:
        raise HubError(
            f"{constants.ENDPOINT} cannot be reached for the data set '{source}' "
            f"({type(error).__name__}): check the network and HF_ENDPOINT, or name a local file"
        ) from error
    except ValueError as error:
        # Unknown splits and subsets; the message lists those that there are.
        raise DataError(f"data set '{source}': {' '.join(str(error).split())[:300]}") from None
