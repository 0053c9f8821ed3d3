"""Datasets on the Hub: stream the rows, and find the commit that a revision names now."""

import datetime
import logging
from collections.abc import Iterable, Iterator
from typing import Any

from datasets import IterableDataset, exceptions, load_dataset
from huggingface_hub import DatasetInfo, HfApi, constants
from huggingface_hub import errors as hub_errors

from tuneline.errors import DataError, HubError
from tuneline.prepare.sources.row import Remarks, Selection, SourceRow
from tuneline.runtime.retries import Retries, retrying
from tuneline.runtime.torch_free import show_torch

logger = logging.getLogger(__name__)

# Base class of the HTTP client's errors. huggingface_hub imports it but does not export it.
_HTTPError: type[Exception] = vars(hub_errors)["HTTPError"]


def read(source: str, selection: Selection, remarks: Remarks) -> Iterator[SourceRow]:
    """Yield the rows of a dataset.

    Raises:
        DataError: there is no such dataset, split or subset, or no access to it.
        HubError: the Hub could not be reached.
    """
    # `datasets` imports torch if sys.modules has the name, and the step has it there to hide torch.
    show_torch()
    retries = Retries(f"read {source} from {constants.ENDPOINT}")
    number = 0
    try:
        while True:
            try:
                for values in _open(source, selection, number):
                    number += 1
                    retries.start_again()
                    yield SourceRow(source, number, values)
                return
            except Exception as error:
                retries.wait(error)
    except exceptions.DatasetNotFoundError as error:
        raise DataError(_not_found(source, f" ({' '.join(str(error).split())[:200]})")) from None
    except (_HTTPError, ConnectionError) as error:
        raise _unreachable(source, error) from error
    except ValueError as error:
        # The split or subset is unknown; the message of `error` lists the known ones.
        raise DataError(f"dataset '{source}': {' '.join(str(error).split())[:300]}") from None


def _open(source: str, selection: Selection, num_read: int) -> Iterable[dict[str, Any]]:
    """Return the rows of a dataset without the first ones, which have been read already."""
    rows: IterableDataset = load_dataset(
        source,
        selection.subset,
        split=selection.split or selection.default_split,
        revision=selection.revision,
        streaming=True,
    )
    remaining: Iterable[dict[str, Any]] = rows.skip(num_read) if num_read else rows
    return remaining


def fingerprint(source: str, revision: str | None) -> str:
    """Return the commit that a revision of a dataset names now.

    Raises:
        DataError: there is no such dataset or revision, or no access to it.
        HubError: the Hub could not be reached.
    """
    if constants.HF_HUB_OFFLINE:
        logger.warning(
            "HF_HUB_OFFLINE is set, so changes of the dataset %s since the last run are not "
            "detected: prepared rows may come from the cache",
            source,
        )
        return f"offline {revision}"
    return str(_look_up(source, revision).sha)


def date_of(source: str, revision: str | None) -> datetime.date | None:
    """Return the date (UTC) of the commit that a revision of a dataset names now.

    Returns:
        The date; None if the Hub is not used (HF_HUB_OFFLINE) or does not know it.

    Raises:
        DataError: there is no such dataset or revision, or no access to it.
        HubError: the Hub could not be reached.
    """
    modified = None if constants.HF_HUB_OFFLINE else _look_up(source, revision).last_modified
    return None if modified is None else modified.astimezone(datetime.UTC).date()


def _look_up(source: str, revision: str | None) -> DatasetInfo:
    try:
        return retrying(
            f"look up {source} at {constants.ENDPOINT}",
            lambda: HfApi().dataset_info(source, revision=revision),
        )
    except hub_errors.RevisionNotFoundError:
        raise DataError(
            f"dataset {source} has no revision '{revision}': give a branch, a tag or a commit"
        ) from None
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError):
        raise DataError(_not_found(source)) from None
    except (_HTTPError, OSError) as error:
        raise _unreachable(source, error) from error


def _not_found(source: str, details: str = "") -> str:
    return (
        f"{constants.ENDPOINT} has no dataset '{source}' that this token may read, or the dataset "
        f"is gated{details}: check the spelling, accept the dataset's terms on its page, and set "
        "HF_TOKEN"
    )


def _unreachable(source: str, error: Exception) -> HubError:
    return HubError(
        f"{constants.ENDPOINT} cannot be reached for the dataset '{source}' "
        f"({type(error).__name__}): check the network and HF_ENDPOINT, or name a local file"
    )
