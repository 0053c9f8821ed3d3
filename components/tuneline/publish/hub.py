"""Push staged repositories to the Hub: one commit each, only to repositories tuneline made."""

import hashlib
import logging
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import (  # type: ignore[attr-defined, unused-ignore]
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from tuneline.artifacts import PublishedRepo
from tuneline.errors import CredentialsError, HubError, TunelineError, UserError
from tuneline.publish.config import PublishConfig
from tuneline.publish.staging import MARKER_FILE, StagedRepo
from tuneline.record import sha256_of_file
from tuneline.runtime.retries import http_status, retrying

logger = logging.getLogger(__name__)

T = TypeVar("T")


def push(staged: list[StagedRepo], *, token: str, config: PublishConfig) -> list[PublishedRepo]:
    """Push every repository; a repository whose content is unchanged gets no new commit.

    If a push was interrupted, the next push sends only the files that the Hub does not have yet.

    Raises:
        CredentialsError: the Hub refuses the token, or the token has no write access.
        UserError: tuneline did not make a repository, or it was changed during the push.
        HubError: the Hub failed after all attempts.
    """
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    _call("who am I", api.whoami, config.max_attempts)
    # All names are checked before anything is sent, so that no run is published only in part.
    absent = [repo for repo in staged if not _is_ours(api, repo.repo, config)]
    for repo in absent:
        _call(
            f"create {repo.repo}",
            # exist_ok: an attempt whose response was lost may have created it.
            partial(api.create_repo, repo.repo, private=config.private, exist_ok=True),
            config.max_attempts,
        )
    return [_push_one(api, repo, config) for repo in staged]


def _push_one(api: HfApi, repo: StagedRepo, config: PublishConfig) -> PublishedRepo:
    info = _call(f"look up {repo.repo}", partial(api.model_info, repo.repo), config.max_attempts)
    commit = _call(
        f"push {repo.repo}",
        partial(_upload, api, repo, parent_commit=str(info.sha)),
        config.max_attempts,
    )
    tag = _call(f"tag {repo.repo}", partial(_tag, api, repo.repo, commit), config.max_attempts)
    return PublishedRepo(
        repo=repo.repo,
        kind=repo.kind,
        url=f"{api.endpoint}/{repo.repo}",
        commit=commit,
        tag=tag,
        num_files=len(repo.files()),
        num_bytes=sum(path.stat().st_size for path in repo.files()),
    )


def _upload(api: HfApi, repo: StagedRepo, *, parent_commit: str) -> str:
    """Push the folder as one commit, and return the ID of the commit with the folder's content.

    The Hub refuses the push (412) if there is a commit after `parent_commit`. Either somebody else
    made it, or an earlier attempt of this push did and the response was lost: with xet, the client
    repeats the request. In the second case the Hub has exactly the folder's files, and the push is
    complete.
    """
    try:
        commit = api.upload_folder(
            repo_id=repo.repo,
            folder_path=repo.folder,
            commit_message=f"{repo.kind} by tuneline",
            delete_patterns="*",
            parent_commit=parent_commit,
        )
    except ValueError as error:
        # The Hub first validates the model card; if it refuses it, the client raises ValueError.
        if "Invalid metadata" not in str(error):
            raise
        raise UserError(
            f"push {repo.repo}: the Hub refuses the model card: "
            f"{' '.join(str(error).split())}. Check publish.licence and publish.tags"
        ) from None
    except HfHubHTTPError as error:
        if error.response.status_code != 412:
            raise
        head = str(api.model_info(repo.repo).sha)
        if not _has_files(api, repo, head):
            raise
        return head
    return commit.oid


def _has_files(api: HfApi, repo: StagedRepo, revision: str) -> bool:
    """Return whether a revision holds exactly the folder's files, by their hashes."""
    remote = {
        entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id
        for entry in api.list_repo_tree(repo.repo, revision=revision, recursive=True)
        if isinstance(entry, RepoFile) and entry.path != ".gitattributes"
    }
    local = {path.relative_to(repo.folder).as_posix(): path for path in repo.files()}
    return remote.keys() == local.keys() and all(
        remote[name] == (_git_blob(path) if len(remote[name]) == 40 else sha256_of_file(path))
        for name, path in local.items()
    )


def _git_blob(path: Path) -> str:
    """Return the ID that git gives to a file's content."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _tag(api: HfApi, repo: str, commit: str) -> str:
    """Return the tag (v1, v2, ...) of a commit; give the next tag to a commit that has none."""
    tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(repo).tags}
    numbers = {int(name[1:]): name for name in tags if re.fullmatch(r"v[1-9]\d*", name)}
    existing = [number for number, name in numbers.items() if tags[name] == commit]
    if existing:
        return numbers[max(existing)]
    tag = f"v{max(numbers, default=0) + 1}"
    api.create_tag(repo, tag=tag, revision=commit)
    return tag


def _is_ours(api: HfApi, repo: str, config: PublishConfig) -> bool:
    """Return whether the repository exists; raise an error if tuneline did not make it.

    Raises:
        UserError: the repository is not empty and has no marker file.
    """
    request = partial(api.model_info, repo)
    try:
        info = _call(f"look up {repo}", request, config.max_attempts, may_be_absent=True)
    except RepositoryNotFoundError:
        return False
    names = {sibling.rfilename for sibling in info.siblings or []}
    if MARKER_FILE not in names and names - {".gitattributes"}:
        raise UserError(
            f"the repository {repo} exists, but was not made by tuneline: it has no {MARKER_FILE}. "
            "Choose another name in publish_to, or remove the repository yourself"
        )
    if config.private and info.private is False:
        logger.warning("publish.private is true, but %s exists and stays public", repo)
    return True


def _call(
    what: str, request: Callable[[], T], max_attempts: int, *, may_be_absent: bool = False
) -> T:
    """Send a request; repeat it after a fault that may not last, see `retries`.

    Args:
        what: description of the request, for messages.
        request: function that sends the request.
        max_attempts: attempts before the request counts as failed.
        may_be_absent: whether to pass RepositoryNotFoundError on to the caller.

    Raises:
        CredentialsError: the Hub refused the token.
        UserError: the repository was changed meanwhile.
        HubError: the request failed after all attempts.
        RepositoryNotFoundError: only if `may_be_absent`.
    """
    try:
        return retrying(what, partial(_unwrapped, request), max_attempts=max_attempts)
    except (HTTPError, ConnectionError) as error:
        status = http_status(error)
        if may_be_absent and isinstance(error, RepositoryNotFoundError) and status == 404:
            raise
        raise _refused(what, status, error) from None


def _unwrapped(request: Callable[[], T]) -> T:
    """Send a request; raise the cause of a RuntimeError, in which the client wraps file errors."""
    try:
        return request()
    except RuntimeError as error:
        if isinstance(error.__cause__, HTTPError | ConnectionError):
            raise error.__cause__ from None
        raise


def _refused(what: str, status: int | None, error: Exception) -> TunelineError:
    """Return the error for a response that would be the same after another attempt."""
    message = getattr(error, "server_message", None)
    if status == 401:
        return CredentialsError(
            f"{what}: the Hub does not accept the token in HF_TOKEN (401). Create a new one with "
            "write access"
        )
    if status == 403:
        reason = f". The Hub says: {message}" if message else ""
        return CredentialsError(
            f"{what}: the token in HF_TOKEN lacks the permission (403): it needs write access to "
            f"this namespace{reason}"
        )
    if status == 404:
        return HubError(
            f"{what}: the Hub cannot find the repository (404). Check that its namespace exists "
            "and that nobody removes the repository meanwhile, then run the step again"
        )
    if status in (409, 412):
        return UserError(
            f"{what}: the Hub answered {status}: the repository exists or was changed meanwhile. "
            "Check that nobody else publishes to the same name, then run the step again"
        )
    if status is None:
        return HubError(
            f"{what}: {type(error).__name__}: {error}. Check HF_ENDPOINT, HF_HUB_OFFLINE and the "
            "proxy"
        )
    return HubError(f"{what}: the Hub answered {status}: {message or 'no reason given'}")
