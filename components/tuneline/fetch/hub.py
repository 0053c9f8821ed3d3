"""Download the files of a Hub model that tuning needs, at one commit."""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub import errors as hub_errors

from tuneline.errors import CredentialsError, HubError, ModelError
from tuneline.fetch.directory import explain_missing_weights
from tuneline.fetch.model_card import licence_in, licence_of
from tuneline.runtime.retries import retrying

logger = logging.getLogger(__name__)

# Base class of the HTTP client's errors. huggingface_hub imports it but does not export it.
_HTTPError: type[Exception] = vars(hub_errors)["HTTPError"]

_KEPT = (
    *("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken"),
    *("LICENSE*", "NOTICE*", "README.md"),
)
# Files not to download. Subdirectories contain other formats (onnx/, original/), except
# additional_chat_templates/. consolidated*.safetensors contains the same weights again, under
# Mistral's own names.
_IGNORED = ("[!a]*/*", "a[!d]*/*", "ad[!d]*/*", "consolidated*")


@dataclass(frozen=True)
class Snapshot:
    """A model in the Hub's local cache."""

    path: Path
    commit: str
    licence: str | None


def download(
    repo: str, *, revision: str | None, with_code: bool, commit: str | None = None
) -> Snapshot:
    """Download `repo` to the Hub's local cache.

    The environment variables of huggingface_hub apply: HF_ENDPOINT, HF_TOKEN, HF_HOME and
    HF_HUB_OFFLINE (1: use only what is in the cache).

    Args:
        repo: Hub ID of the model.
        revision: branch, tag or commit; None: the default branch.
        with_code: whether to download Python files too.
        commit: the commit that was looked up before, if one was. It is downloaded even if the
            revision names another one by now, because it is part of the cache key of the step.

    Raises:
        ModelError: there is no such model or revision, or it has no safetensors.
        CredentialsError: the model is gated or private.
        HubError: the Hub could not be reached, or answered with an error.
    """
    wanted = _wanted(revision, with_code)
    if constants.HF_HUB_OFFLINE:
        path = _in_cache(repo, revision, wanted)
        return Snapshot(path, commit=path.name, licence=licence_of(path))
    with translated_errors(repo, revision):
        info = retrying(
            f"look up {repo} at {constants.ENDPOINT}",
            lambda: HfApi().model_info(repo, revision=revision),
        )
        names = [sibling.rfilename for sibling in info.siblings or []]
        if not any(_is_weight(name) for name in names):
            raise ModelError(explain_missing_weights(repo, names))
        # Download by the revision's name, so that the cache can resolve the name offline.
        # An attempt continues with the files that the attempts before it left incomplete.
        path = _snapshot(repo, wanted)
        if commit is not None and path.name != commit:
            logger.warning(
                "%s at %s has changed since it was looked up: commit %s is taken, not %s",
                repo, revision or "main", commit, path.name,
            )  # fmt: skip
            wanted["revision"] = commit
            path = _snapshot(repo, wanted)
    logger.info("%s at %s is commit %s", repo, revision or "main", path.name)
    card = info.card_data
    return Snapshot(path, commit=path.name, licence=licence_in(vars(card) if card else {}))


def commit_of(repo: str, *, revision: str | None) -> str:
    """Return the commit that a model's revision names now; if offline, the commit in the cache.

    Raises:
        ModelError: there is no such model or revision.
        CredentialsError: the model is gated or private.
        HubError: the Hub could not be reached, or answered with an error.
    """
    if constants.HF_HUB_OFFLINE:
        return _in_cache(repo, revision, _wanted(revision, with_code=False)).name
    with translated_errors(repo, revision):
        info = retrying(
            f"look up {repo} at {constants.ENDPOINT}",
            lambda: HfApi().model_info(repo, revision=revision),
        )
        return str(info.sha)


def download_tokenizer(repo: str, *, revision: str | None) -> Path:
    """Download the tokenizer and the config of `repo` to the Hub's local cache.

    Raises:
        ModelError: there is no such model or revision.
        CredentialsError: the model is gated or private.
        HubError: the Hub could not be reached, or answered with an error.
    """
    wanted = {**_wanted(revision, with_code=False), "ignore_patterns": [*_IGNORED, "*.safetensors"]}
    if constants.HF_HUB_OFFLINE:
        return _in_cache(repo, revision, wanted)
    with translated_errors(repo, revision):
        return _snapshot(repo, wanted, called="the tokenizer of ")


def _wanted(revision: str | None, with_code: bool) -> dict[str, Any]:
    return {
        "revision": revision,
        "allow_patterns": [*_KEPT, "*.py"] if with_code else list(_KEPT),
        "ignore_patterns": list(_IGNORED),
    }


def _snapshot(repo: str, wanted: dict[str, Any], *, called: str = "") -> Path:
    return Path(
        retrying(
            f"download {called}{repo} from {constants.ENDPOINT}",
            lambda: snapshot_download(repo, **wanted),
        )
    )


def _in_cache(repo: str, revision: str | None, wanted: dict[str, Any]) -> Path:
    try:
        return Path(snapshot_download(repo, local_files_only=True, **wanted))
    except hub_errors.LocalEntryNotFoundError:
        raise HubError(
            f"{repo} at {revision or 'main'} is not complete in the cache "
            f"{constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids downloads: unset "
            "HF_HUB_OFFLINE, or fill the cache first"
        ) from None


@contextlib.contextmanager
def translated_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Convert errors of huggingface_hub that the body raises to errors of tuneline."""
    try:
        yield
    except HubError:
        raise  # of `retrying`
    except hub_errors.GatedRepoError:
        raise CredentialsError(
            f"{repo} is gated: ask for access on its page at {constants.ENDPOINT}/{repo}, then "
            "set HF_TOKEN to a token of the account that was granted it"
            + ("" if os.environ.get("HF_TOKEN") else " (HF_TOKEN is not set now)")
        ) from None
    except hub_errors.RevisionNotFoundError:
        raise ModelError(
            f"{repo} has no revision '{revision}': give a branch, a tag or a full commit hash"
        ) from None
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError):
        raise ModelError(
            f"{constants.ENDPOINT} has no model '{repo}' that this token may read: check the "
            "spelling, and set HF_TOKEN if it is private"
        ) from None
    except hub_errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise CredentialsError(
                f"{constants.ENDPOINT} refused access to {repo} ({status}): HF_TOKEN is missing, "
                "expired or has no read permission"
            ) from None
        raise HubError(
            f"{constants.ENDPOINT} answered {status} for {repo}: try again later"
        ) from error
    except (_HTTPError, hub_errors.LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename:
            raise  # an error of the local disk, not of the network
        raise HubError(
            f"{constants.ENDPOINT} cannot be reached for {repo} ({type(error).__name__}): check "
            "the network and HF_ENDPOINT, or set HF_HUB_OFFLINE=1 if the model is in the cache"
        ) from error


def _is_weight(name: str) -> bool:
    return name.endswith(".safetensors") and not any(fnmatch(name, pattern) for pattern in _IGNORED)
