"""Push staged repositories to the Hub: one commit each, ours only, patient with a busy server."""

import logging
import os
import random
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError

from tuneline.artifacts import PublishedRepo
from tuneline.errors import CredentialsError, HubError, UserError
from tuneline.publish.config import PublishConfig
from tuneline.publish.staging import MARKER_FILE, StagedRepo

logger = logging.getLogger(__name__)

MAX_WAIT_SECONDS = 60.0

T = TypeVar("T")


def push(staged: list[StagedRepo], *, token: str, config: PublishConfig) -> list[PublishedRepo]:
    """Push every repository; content that is there already makes no new commit.

    Raises:
        CredentialsError: the Hub does not know the token, or it may not write there.
        UserError: a repository exists and was not made by tuneline.
        HubError: the Hub did not answer as it should after all tries.
    """
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    _call("who am I", api.whoami, config.max_attempts)
    # All names are checked before the first byte is sent: nothing is half published.
    absent = [repo for repo in staged if not _is_ours(api, repo.repo, config)]
    for repo in absent:
        _call(
            f"create {repo.repo}",
            # exist_ok: a try whose answer was lost may have made it.
            partial(api.create_repo, repo.repo, private=config.private, exist_ok=True),
            config.max_attempts,
        )
    published = []
    for repo in staged:
        commit = _call(
            f"push {repo.repo}",
            partial(
                api.upload_folder,
                repo_id=repo.repo,
                folder_path=repo.folder,
                commit_message=f"{repo.kind} by tuneline",
                delete_patterns="*",
            ),
            config.max_attempts,
        )
        published.append(
            PublishedRepo(
                repo=repo.repo,
                kind=repo.kind,
                url=f"{api.endpoint}/{repo.repo}",
                commit=commit.oid,
                num_files=len(repo.files()),
                num_bytes=sum(path.stat().st_size for path in repo.files()),
            )
        )
    return published


def _is_ours(api: HfApi, repo: str, config: PublishConfig) -> bool:
    """Return whether the repository exists with our marker; False when there is none.

    Raises:
        UserError: it exists without the marker, and is not empty.
    """
    try:
        info = _call(f"look up {repo}", partial(api.model_info, repo), config.max_attempts)
    except RepositoryNotFoundError:
        return False
    names = {sibling.rfilename for sibling in info.siblings or []}
    if MARKER_FILE not in names and names - {".gitattributes"}:
        raise UserError(
            f"the repository {repo} exists and was not made by tuneline (it has no {MARKER_FILE}): "
            "choose another name in publish_to, or remove it yourself"
        )
    return True


def _call(what: str, request: Callable[[], T], max_attempts: int) -> T:
    """Send a request; wait and repeat on 429, 5xx and a broken connection."""
    for attempt in range(1, max_attempts + 1):
        try:
            return request()
        except RepositoryNotFoundError as error:
            # The Hub answers 401 for a private repository that a wrong token may not see.
            if error.response.status_code == 404:
                raise
            raise _refused(what, 401) from None
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403):
                raise _refused(what, status) from None
            if status == 409:
                raise UserError(
                    f"{what}: the Hub says 409, the repository exists or was changed meanwhile; "
                    "see that no other run publishes to the same name, then run again"
                ) from None
            if status != 429 and status < 500:
                raise HubError(f"{what}: the Hub says {status}: {error.server_message}") from None
            cause, wait = f"the Hub says {status}", _retry_after(error)
        except (HTTPError, ConnectionError) as error:
            cause, wait = f"{type(error).__name__}: {error}", None
        if attempt == max_attempts:
            raise HubError(
                f"{what}: {cause}, after {max_attempts} tries; run the step again later, "
                "what arrived is not sent again"
            )
        backoff = 2.0**attempt * random.uniform(0.5, 1)
        pause = min(MAX_WAIT_SECONDS, backoff if wait is None else wait)
        logger.warning("%s: %s; next of %d tries in %.1f s", what, cause, max_attempts, pause)
        time.sleep(pause)
    raise AssertionError("max_attempts is at least 1")


def _refused(what: str, status: int) -> CredentialsError:
    if status == 401:
        return CredentialsError(
            f"{what}: the Hub does not accept the token in HF_TOKEN (401): make a new one with "
            "write access"
        )
    return CredentialsError(
        f"{what}: the token in HF_TOKEN may not do that (403): it needs write access to this "
        "namespace"
    )


def _retry_after(error: HfHubHTTPError) -> float | None:
    try:
        return float(error.response.headers["Retry-After"])
    except (KeyError, ValueError):
        return None
