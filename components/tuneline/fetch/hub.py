"""Download a model from the Hub, at one commit, only the files that tuning needs."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from tuneline.errors import CredentialsError, HubError, ModelError

logger = logging.getLogger(__name__)

_KEPT_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja", ".tiktoken")
_KEPT_NAMES = ("LICENSE", "NOTICE", "README.md")


@dataclass(frozen=True)
class Snapshot:
    """A model in the local cache."""

    path: Path
    commit: str
    licence: str | None


def download(repo: str, *, revision: str | None, with_code: bool) -> Snapshot:
    """Bring `repo` into the cache, once a commit; HF_ENDPOINT, HF_TOKEN and HF_HOME apply.

    With HF_HUB_OFFLINE=1 the cache is all that is looked at.

    Raises:
        ModelError: no such model or revision, or it has no safetensors.
        CredentialsError: the model is gated or private.
        HubError: the Hub could not be reached, or answered with an error.
    """
    import httpx
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub import errors as hub_errors

    from tuneline.fetch.directory import licence_of

    if constants.HF_HUB_OFFLINE:
        try:
            path = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        except hub_errors.LocalEntryNotFoundError:
            raise HubError(
                f"{repo} at {revision or 'main'} is not in the cache {constants.HF_HUB_CACHE}, and "
                "HF_HUB_OFFLINE forbids the network: unset it, or fill the cache first"
            ) from None
        return Snapshot(path, commit=path.name, licence=licence_of(path))
    try:
        info = HfApi().model_info(repo, revision=revision)
        names = [sibling.rfilename for sibling in info.siblings or []]
        _refuse_other_weights(repo, names)
        path = Path(
            snapshot_download(
                repo,
                revision=info.sha,
                allow_patterns=[name for name in names if _is_kept(name, with_code)],
            )
        )
    except hub_errors.GatedRepoError:
        raise CredentialsError(
            f"{repo} is gated: ask for access on its page at {constants.ENDPOINT}/{repo}, then "
            "set HF_TOKEN to a token of the account that was given it"
            + ("" if os.environ.get("HF_TOKEN") else " (HF_TOKEN is not set now)")
        ) from None
    except hub_errors.RevisionNotFoundError:
        raise ModelError(
            f"{repo} has no revision '{revision}': give a branch, a tag or a full commit hash"
        ) from None
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError):
        raise ModelError(
            f"{constants.ENDPOINT} has no model '{repo}' that this token may see: check the "
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
    except (httpx.HTTPError, hub_errors.LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename:
            raise  # a local disk, not the network
        raise HubError(
            f"{constants.ENDPOINT} cannot be reached for {repo} ({type(error).__name__}): check "
            "the network and HF_ENDPOINT; with the model in the cache set HF_HUB_OFFLINE=1"
        ) from error
    commit = info.sha or path.name
    logger.info("%s at %s is commit %s", repo, revision or "main", commit)
    card = info.card_data
    return Snapshot(path, commit=commit, licence=_licence(card.to_dict() if card else {}))


def _is_kept(name: str, with_code: bool) -> bool:
    # Subdirectories hold other formats (onnx/, original/); consolidated*.safetensors holds the
    # weights a second time in Mistral's own names.
    if "/" in name or name.startswith("consolidated"):
        return False
    return (
        name.endswith(_KEPT_SUFFIXES)
        or name.startswith(_KEPT_NAMES)
        or (with_code and name.endswith(".py"))
    )


def _refuse_other_weights(repo: str, names: list[str]) -> None:
    from tuneline.fetch.directory import explain_missing_weights

    if not any(name.endswith(".safetensors") and _is_kept(name, False) for name in names):
        raise ModelError(explain_missing_weights(repo, names))


def _licence(card: dict) -> str | None:
    licence = card.get("license")
    # "other" comes with the name that the licence goes by.
    return card.get("license_name") or licence if licence == "other" else licence
