"""Fingerprint the current content of the datasets that a recipe names, without reading the rows."""

import hashlib

from tuneline.prepare.config import PrepareConfig
from tuneline.prepare.datasets import parse, with_revisions
from tuneline.prepare.sources.kinds import KINDS, kind_of
from tuneline.prepare.uploads import locate


def fingerprint(config: PrepareConfig, *, source: str, uploads_dir: str | None = None) -> str:
    """Return a text that changes when the rows change: a hash over files, commits and names.

    KFP takes a finished step from its cache when the step's inputs are unchanged. The name of a
    dataset stays the same when its content changes, so the step gets this text as a further input.

    Args:
        config: the `prepare` section of the recipe.
        source: the recipe's `dataset`, or its `datasets` as JSON.
        uploads_dir: directory of the files that were sent with the run; None: there are none.

    Raises:
        DataError: there is no such file or dataset.
        HubError: the Hub could not be reached.
    """
    datasets = parse(source, config)
    named = with_revisions(datasets, config)
    placed = with_revisions(*locate(datasets, config, uploads_dir))
    digest = hashlib.sha256()
    for (name, _), (place, revision) in zip(named, placed, strict=True):
        content = KINDS[kind_of(place)].fingerprint(place, revision)
        digest.update(f"{name}\0{content}\0".encode())
    return digest.hexdigest()
