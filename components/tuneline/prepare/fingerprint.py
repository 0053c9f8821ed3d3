"""Fingerprint the current content of the datasets that a recipe names, without reading the rows."""

import hashlib

from tuneline.prepare.config import PrepareConfig
from tuneline.prepare.datasets import parse
from tuneline.prepare.sources.kinds import KINDS, kind_of


def fingerprint(config: PrepareConfig, *, source: str) -> str:
    """Return a text that changes when the rows change: a hash over files, commits and names.

    KFP takes a finished step from its cache when the step's inputs are unchanged. The name of a
    dataset stays the same when its content changes, so the step gets this text as a further input.

    Raises:
        DataError: there is no such file or dataset.
        HubError: the Hub could not be reached.
    """
    datasets = parse(source, config)
    sources = [(entry.source, entry.revision) for entry in datasets]
    if config.heldout.source is not None:
        sources.append((config.heldout.source, config.revision))
    if config.general is not None:
        sources.append((config.general.source, config.general.revision))
    digest = hashlib.sha256()
    for name, revision in sources:
        content = KINDS[kind_of(name)].fingerprint(name, revision)
        digest.update(f"{name}\0{content}\0".encode())
    return digest.hexdigest()
