"""Push staged repositories to the Hub: one commit each, ours only, patient with a busy server."""

import hashlib
import logging
import os
import random
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from tuneline.artifacts import PublishedRepo
from tuneline.errors import CredentialsError, HubError, TunelineError, UserError
from tuneline.publish.config import PublishConfig
from tuneline.publish.staging import MARKER_FILE, StagedRepo
from tuneline.record import sha256_of_file

logger = logging.getLogger(__name__)

MAX_WAIT_SECONDS = 60.0

T = TypeVar("T")


def push(staged: list[StagedRepo], *, token: str, config: PublishConfig) -> list[PublishedRepo]:
    """Push every repository; content that is there already makes no new commit.

    What a push that broke off left behind is taken up: a file that the Hub has is not sent again.

    Raises:
        CredentialsError: the Hub does not know the token, or it may not write there.
        UserError: a repository exists and was not made by tuneline, or another push came between.
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
    """Send the folder as one commit; return the commit that holds it.

    Somebody's commit since `parent_commit` is not overwritten. One of ours whose answer was lost
    is no obstacle: a new try finds nothing left to commit, and where the client itself repeats
    the request (it does with xet) the Hub's refusal is held against what it has.
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
        # The client has the Hub look at a card first, and makes this of its answer.
        if "Invalid metadata" not in str(error):
            raise
        raise UserError(
            f"push {repo.repo}: the Hub does not take the model card: "
            f"{' '.join(str(error).split())}; see publish.licence and publish.tags"
        ) from None
    except HfHubHTTPError as error:
        if error.response.status_code != 412:
            raise
        head = str(api.model_info(repo.repo).sha)
        if not _is_there(api, repo, head):
            raise
        return head
    return commit.oid


def _is_there(api: HfApi, repo: StagedRepo, revision: str) -> bool:
    """Return whether a revision holds exactly the folder's files, by their hashes."""
    found = {
        entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id
        for entry in api.list_repo_tree(repo.repo, revision=revision, recursive=True)
        if isinstance(entry, RepoFile) and entry.path != ".gitattributes"
    }
    wanted = {path.relative_to(repo.folder).as_posix(): path for path in repo.files()}
    return found.keys() == wanted.keys() and all(
        found[name] == (_git_blob(path) if len(found[name]) == 40 else sha256_of_file(path))
        for name, path in wanted.items()
    )


def _git_blob(path: Path) -> str:
    """Return git's name of a small file's content."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _tag(api: HfApi, repo: str, commit: str) -> str:
    """Return the tag v1, v2, ... of a commit; it gets the next one where it has none."""
    tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(repo).tags}
    numbers = {int(name[1:]): name for name in tags if re.fullmatch(r"v[1-9]\d*", name)}
    own = [number for number, name in numbers.items() if tags[name] == commit]
    if own:
        return numbers[max(own)]
    tag = f"v{max(numbers, default=0) + 1}"
    api.create_tag(repo, tag=tag, revision=commit)
    return tag


def _is_ours(api: HfApi, repo: str, config: PublishConfig) -> bool:
    """Return whether the repository exists with our marker, or empty; False when there is none.

    Raises:
        UserError: it exists without the marker, and is not empty.
    """
    request = partial(api.model_info, repo)
    try:
        info = _call(f"look up {repo}", request, config.max_attempts, may_be_absent=True)
    except RepositoryNotFoundError:
        return False
    names = {sibling.rfilename for sibling in info.siblings or []}
    if MARKER_FILE not in names and names - {".gitattributes"}:
        raise UserError(
            f"the repository {repo} exists and was not made by tuneline (it has no {MARKER_FILE}): "
            "choose another name in publish_to, or remove it yourself"
        )
    if config.private and info.private is False:
        logger.warning("publish.private is true, and %s is there and public: it stays so", repo)
    return True


def _call(
    what: str, request: Callable[[], T], max_attempts: int, *, may_be_absent: bool = False
) -> T:
    """Send a request; wait and repeat on 429, 5xx and a broken connection.

    Raises:
        RepositoryNotFoundError: only if `may_be_absent`; all else has a sentence.
    """
    for attempt in range(1, max_attempts + 1):
        try:
            return _unwrapped(request)
        except HfHubHTTPError as error:
            status = error.response.status_code
            absent = isinstance(error, RepositoryNotFoundError) and status == 404
            if absent and may_be_absent:
                raise
            if status != 429 and status < 500:
                raise _refused(what, status, error.server_message) from None
            cause, wait = f"the Hub says {status}", _retry_after(error)
        except (HTTPError, ConnectionError) as error:
            # hf_xet has no error with a status; it only tells it in words.
            refusal = re.search(r"\b(401|403|404)\b", str(error))
            if isinstance(error, ConnectionError) and refusal:
                raise _refused(what, int(refusal[0]), None) from None
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


def _unwrapped(request: Callable[[], T]) -> T:
    """Send a request; the client wraps what befalls a file in a RuntimeError without a status."""
    try:
        return request()
    except RuntimeError as error:
        if isinstance(error.__cause__, HTTPError | ConnectionError):
            raise error.__cause__ from None
        raise


def _refused(what: str, status: int, message: str | None) -> TunelineError:
    """Return the sentence for an answer that another try would not change."""
    if status == 401:
        return CredentialsError(
            f"{what}: the Hub does not accept the token in HF_TOKEN (401): make a new one with "
            "write access"
        )
    if status == 403:
        said = f"; the Hub says: {message}" if message else ""
        return CredentialsError(
            f"{what}: the token in HF_TOKEN may not do that (403): it needs write access to this "
            f"namespace{said}"
        )
    if status == 404:
        return HubError(
            f"{what}: the Hub does not find it (404): see that the namespace exists and that "
            "nobody removes the repository meanwhile, then run again"
        )
    if status in (409, 412):
        return UserError(
            f"{what}: the Hub says {status}, the repository exists or was changed meanwhile; "
            "see that nobody else publishes to the same name, then run again"
        )
    return HubError(f"{what}: the Hub says {status}: {message or 'without a reason'}")


def _retry_after(error: HfHubHTTPError) -> float | None:
    try:
        return float(error.response.headers["Retry-After"])
    except (KeyError, ValueError):
        return None
