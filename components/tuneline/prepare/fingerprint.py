"""Say what stands behind the names of a recipe's rows now, without reading the rows."""

import hashlib
import logging

from tuneline.errors import DataError, HubError
from tuneline.prepare.config import PrepareConfig
from tuneline.prepare.source import find_files

logger = logging.getLogger(__name__)


def fingerprint(config: PrepareConfig, *, source: str) -> str:
    """Return a text that changes when the rows do: a hash of files, commits and names.

    KFP takes a finished step from its cache when the step's inputs are the same, and a name is the
    same whatever was put there since; this text is an input beside it.

    Raises:
        DataError: there is no such file or data set.
        HubError: the Hub could not be reached.
    """
    named = [(source, config.revision)]
    if config.heldout.source is not None:
        named.append((config.heldout.source, config.revision))
    if config.general is not None:
        named.append((config.general.source, config.general.revision))
    digest = hashlib.sha256()
    for name, revision in named:
        digest.update(f"{name}\0{_fingerprint_of(name, revision)}\0".encode())
    return digest.hexdigest()


def _fingerprint_of(source: str, revision: str | None) -> str:
    if source.startswith("builtin:"):
        # Its rows are part of the image, whose name is in the cache's key.
        find_files(source)
        return source
    files = find_files(source)
    if not files:
        return _commit_of(source, revision)
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0".encode())
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _commit_of(source: str, revision: str | None) -> str:
    from huggingface_hub import HfApi, constants
    from huggingface_hub import errors as hub_errors

    if constants.HF_HUB_OFFLINE:
        logger.warning(
            "HF_HUB_OFFLINE: whether the data set %s has changed since the last run is not looked "
            "up, and prepared rows may come from the cache",
            source,
        )
        return f"offline {revision}"
    try:
        return str(HfApi().dataset_info(source, revision=revision).sha)
    except hub_errors.RevisionNotFoundError:
        raise DataError(
            f"data set {source} has no revision '{revision}': give a branch, a tag or a commit"
        ) from None
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError):
        raise DataError(
            f"{constants.ENDPOINT} has no data set '{source}' that this token may see, or it is "
            "gated: check the spelling, set HF_TOKEN"
        ) from None
    except (hub_errors.HfHubHTTPError, hub_errors.HTTPError, OSError) as error:
        raise HubError(
            f"{constants.ENDPOINT} cannot be reached for the data set '{source}' "
            f"({type(error).__name__}): check the network and HF_ENDPOINT, or name a local file"
        ) from error
