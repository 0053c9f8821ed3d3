"""Fingerprint the current content of a base model, without fetching the model."""

from tuneline.fetch.config import FetchConfig
from tuneline.fetch.kinds import KINDS, kind_of


def fingerprint(config: FetchConfig, *, source: str) -> str:
    """Return a text that changes when the model changes: a commit, a hash of files or a name.

    KFP takes a finished step from its cache when the step's inputs are unchanged. The name of a
    model stays the same when its content changes, so the step gets this text as a further input.

    Raises:
        ModelError: the source is of no known kind, or the Hub has no such model.
        HubError: the Hub could not be reached.
        CredentialsError: the Hub requires a token with access.
    """
    return KINDS[kind_of(source)].fingerprint(source, config)
