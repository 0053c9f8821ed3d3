"""Say what stands behind a model's name now, without fetching it."""

import hashlib
from pathlib import Path

from tuneline.fetch import hub
from tuneline.fetch.config import FetchConfig
from tuneline.fetch.run import kind_of


def fingerprint(config: FetchConfig, *, source: str) -> str:
    """Return a text that changes when the model does: a commit, or a hash of files.

    KFP takes a finished step from its cache when the step's inputs are the same, and a name is the
    same whatever was put there since; this text is an input beside it.

    Raises:
        ModelError: the source is of no known kind, or the Hub has no such model.
        HubError: the Hub could not be reached.
        CredentialsError: the Hub asks for a token with access.
    """
    kind = kind_of(source)
    if kind == "hub":
        return hub.commit_of(source, revision=config.revision)
    if kind == "builtin":
        # Its package is part of the image, whose name is in the cache's key.
        return source
    path = Path(source).expanduser()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            digest.update(f"{file.relative_to(path)}\0".encode())
            with open(file, "rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
