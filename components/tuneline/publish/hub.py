"""Push staged repositories to the Hub: one commit each, only to repositories tuneline made."""

import glob
import hashlib
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (  # type: ignore[attr-defined, unused-ignore]
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (  # type: ignore[attr-defined, unused-ignore]
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)

from tuneline.artifacts import PublishedRepo
from tuneline.errors import UserError
from tuneline.publish.card_parts import CARD_FILE
from tuneline.publish.config import PublishConfig
from tuneline.publish.previous import (
    MARKER_FILE,
    MAX_READ_BYTES,
    Previous,
    adapt,
    check_ours,
    read_bundle,
)
from tuneline.publish.refusals import refusal
from tuneline.publish.staging import StagedRepo
from tuneline.record import sha256_of_file
from tuneline.runtime.retries import http_status, retrying

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class RemoteFiles:
    """The files of a repository on the Hub, at one commit."""

    api: HfApi
    repo: str
    commit: str
    private: bool | None
    names: frozenset[str]
    max_attempts: int

    def read(self, name: str) -> str | None:
        """Return the text of a small file; None if it is not there or is too large to be ours."""
        if name not in self.names:
            return None
        request = partial(_read, self.api, self.repo, name, self.commit)
        return call(f"look up {self.repo}", request, self.max_attempts)


@dataclass(frozen=True)
class _Held:
    """A repository on the Hub that this push may write to."""

    files: RemoteFiles
    content: Previous


def push(staged: list[StagedRepo], *, token: str, config: PublishConfig) -> list[PublishedRepo]:
    """Push every repository; a repository whose content is unchanged gets no new commit.

    If a push was interrupted, the next push sends only the files that the Hub does not have yet.
    If the Hub refuses a push, the repositories that were created for it and are empty are deleted.

    Raises:
        CredentialsError: the Hub refuses the token, or the token has no write access.
        UserError: tuneline did not make a repository, it is public but has to be private, or it
            was changed during the push.
        HubError: the Hub failed after all attempts.
    """
    api = new_api(token)
    # All names are checked before anything is sent, so that no run is published only in part.
    absent = check_push(api, staged, config)
    created: list[str] = []
    try:
        for repo in absent:
            call(
                f"create {repo.repo}",
                # exist_ok: an attempt whose response was lost may have created it.
                partial(
                    api.create_repo, repo.repo, private=config.private is not False, exist_ok=True
                ),
                config.max_attempts,
            )
            created.append(repo.repo)
        return [_push_one(api, repo, config) for repo in staged]
    except UserError:
        # After another error, the next attempt goes on with these repositories.
        _delete_empty(api, created)
        raise


def check_push(api: HfApi, staged: Sequence[StagedRepo], config: PublishConfig) -> list[StagedRepo]:
    """Check that every repository may be pushed; return those that do not exist yet.

    Raises:
        TunelineError: see `push`.
    """
    call("who am I", api.whoami, config.max_attempts)
    absent = []
    for repo in staged:
        held = _look_up(api, repo, config)
        if held is None:
            absent.append(repo)
        elif held.files.private is False and config.private is None:
            logger.warning("%s exists and is public, so its new version is public too", repo.repo)
    return absent


def new_api(token: str) -> HfApi:
    """Return a client of the Hub that HF_ENDPOINT names; an empty token: none is sent."""
    # The client would keep a slash at the end, and the URLs of the repositories had two.
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
    return HfApi(endpoint=endpoint, token=token or False)


def _push_one(api: HfApi, repo: StagedRepo, config: PublishConfig) -> PublishedRepo:
    held = _look_up(api, repo, config)
    if held is None:
        raise refusal(f"push {repo.repo}", 404, None)
    deleted = adapt(repo.folder, held.content)
    commit = call(
        f"push {repo.repo}",
        partial(_upload, api, repo, deleted, parent_commit=held.files.commit),
        config.max_attempts,
    )
    tag = call(f"tag {repo.repo}", partial(_tag, api, repo.repo, commit), config.max_attempts)
    files = repo.files()
    return PublishedRepo(
        repo=repo.repo,
        kind=repo.kind,
        url=f"{api.endpoint}/{repo.repo}",
        commit=commit,
        tag=tag,
        private=held.files.private,
        num_files=len(files),
        num_bytes=sum(path.stat().st_size for path in files.values()),
    )


def _look_up(api: HfApi, repo: StagedRepo, config: PublishConfig) -> _Held | None:
    """Return what a repository holds, if this push may write to it; None if it does not exist.

    Raises:
        UserError: tuneline did not make the repository, or it is public but has to be private.
    """
    files = look_up_files(api, repo.repo, config.max_attempts)
    if files is None:
        return None
    bundle, card = (files.read(name) for name in (MARKER_FILE, CARD_FILE))
    content = Previous(repo.repo, files.names, read_bundle(bundle), card)
    check_ours(content, kind=repo.kind, names=repo.files().keys())
    if files.private is False and config.private:
        raise UserError(
            f"publish.private is true, but the repository {repo.repo} exists and is public, so "
            "nothing was sent. Make the repository private in its settings on the Hub, or remove "
            "publish.private from the recipe"
        )
    return _Held(files, content)


def look_up_files(api: HfApi, repo: str, max_attempts: int) -> RemoteFiles | None:
    """Return the files of a repository; None if it does not exist."""
    request = partial(api.model_info, repo)
    try:
        info = call(f"look up {repo}", request, max_attempts, may_be_absent=True)
    except RepositoryNotFoundError:
        return None
    names = frozenset(sibling.rfilename for sibling in info.siblings or [])
    return RemoteFiles(api, repo, str(info.sha), info.private, names, max_attempts)


def _read(api: HfApi, repo: str, name: str, revision: str) -> str | None:
    """Return the text of a small file; None if it is not there or is too large to be ours."""
    url = hf_hub_url(repo, name, revision=revision, endpoint=api.endpoint)
    token = api.token if isinstance(api.token, str) else None
    response = get_session().get(url, headers=build_hf_headers(token=token))
    try:
        hf_raise_for_status(response)
    except EntryNotFoundError:
        return None
    return None if len(response.content) > MAX_READ_BYTES else response.text


def _delete_empty(api: HfApi, names: list[str]) -> None:
    """Delete the repositories that hold nothing; a failure is only logged."""
    for name in names:
        try:
            files = {sibling.rfilename for sibling in api.model_info(name).siblings or []}
            if not files - {".gitattributes"}:
                api.delete_repo(name)
                logger.info("deleted %s, which this push had created and which is empty", name)
        except (HTTPError, ConnectionError) as error:
            logger.warning(
                "%s was created by this push, is empty, and could not be deleted (%s)",
                *(name, type(error).__name__),
            )


def _upload(api: HfApi, repo: StagedRepo, deleted: list[str], *, parent_commit: str) -> str:
    """Push the folder as one commit, and return the ID of the commit with the folder's content.

    The Hub refuses the push (412) if there is a commit after `parent_commit`. Either somebody else
    made it, or an earlier attempt of this push did and the response was lost: with xet, the client
    repeats the request. In the second case the Hub has the folder's files, and the push is
    complete.

    Args:
        api: the client.
        repo: the staged repository.
        deleted: files to delete in the same commit.
        parent_commit: commit that the repository had when it was looked up.
    """
    try:
        commit = api.upload_folder(
            repo_id=repo.repo,
            folder_path=repo.folder,
            commit_message=f"{repo.kind} by tuneline",
            delete_patterns=[glob.escape(name) for name in deleted] or None,
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
        if not _has_files(api, repo, deleted, head):
            raise
        return head
    return commit.oid


def _has_files(api: HfApi, repo: StagedRepo, deleted: list[str], revision: str) -> bool:
    """Return whether a revision is the result of the push, by the hashes of its files.

    Args:
        api: the client.
        repo: the staged repository.
        deleted: files that the push deletes.
        revision: a commit.
    """
    remote = {
        entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id
        for entry in api.list_repo_tree(repo.repo, revision=revision, recursive=True)
        if isinstance(entry, RepoFile)
    }
    return not remote.keys() & set(deleted) and all(
        name in remote
        and remote[name] == (_git_blob(path) if len(remote[name]) == 40 else sha256_of_file(path))
        for name, path in repo.files().items()
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


def call(
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
        raise refusal(what, status, error) from None


def _unwrapped(request: Callable[[], T]) -> T:
    """Send a request; raise the cause of a RuntimeError, in which the client wraps file errors."""
    try:
        return request()
    except RuntimeError as error:
        if isinstance(error.__cause__, HTTPError | ConnectionError):
            raise error.__cause__ from None
        raise
