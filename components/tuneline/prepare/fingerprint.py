"""Fingerprint the current content of the datasets that a recipe names, without reading the rows.

A fingerprint also says which commits were looked up, so that `prepare` reads these commits.
"""

import json
import re
from collections.abc import Iterator

from tuneline.errors import DataError
from tuneline.prepare.config import DatasetConfig, PrepareConfig
from tuneline.prepare.datasets import parse, with_revisions
from tuneline.prepare.sources.kinds import KINDS, kind_of
from tuneline.prepare.uploads import locate


def fingerprint(config: PrepareConfig, *, source: str, uploads_dir: str | None = None) -> str:
    """Return a text that changes when the rows change: a commit or a hash of files per source.

    KFP takes a finished step from its cache when the step's inputs are unchanged. The name of a
    dataset stays the same when its content changes, so the step gets this text as a further input.

    Args:
        config: the `prepare` section of the recipe.
        source: the recipe's `dataset`, or its `datasets` as JSON.
        uploads_dir: directory of the files that were sent with the run; None: there are none.

    Returns:
        A JSON list with a text per source, in the order of `datasets.with_revisions`.

    Raises:
        DataError: there is no such file or dataset.
        HubError: the Hub could not be reached.
    """
    placed = with_revisions(*locate(parse(source, config), config, uploads_dir))
    return json.dumps([KINDS[kind_of(place)].fingerprint(place, rev) for place, rev in placed])


def at_version(
    datasets: list[DatasetConfig], config: PrepareConfig, version: str
) -> tuple[list[DatasetConfig], PrepareConfig]:
    """Return datasets and config with the commits of a fingerprint as the revisions on the Hub.

    A branch may name another commit when its rows are read than when it was looked up, and the
    commit that was looked up is part of the cache key of the step.

    Args:
        datasets: the datasets, located.
        config: the `prepare` section of the recipe, located.
        version: what `fingerprint` returned for them.

    Raises:
        DataError: the version is of other datasets.
    """
    sources = with_revisions(datasets, config)
    commits = iter(_commits(version, [source for source, _ in sources]))
    datasets = [
        entry.model_copy(update={"revision": next(commits) or entry.revision}) for entry in datasets
    ]
    if config.heldout.source is not None:
        config = config.model_copy(update={"revision": next(commits) or config.revision})
    if config.general is not None:
        revision = next(commits) or config.general.revision
        general = config.general.model_copy(update={"revision": revision})
        config = config.model_copy(update={"general": general})
    return datasets, config


def _commits(version: str, sources: list[str]) -> Iterator[str | None]:
    """Yield the commit of each source; None if it is not on the Hub, or was not looked up there."""
    try:
        contents = json.loads(version)
    except ValueError:
        contents = None
    if not isinstance(contents, list) or len(contents) != len(sources):
        raise DataError(
            f"the version {version[:80]!r} is not that of {', '.join(sources)}: use the output of "
            "look-up-data for the same recipe, or leave it out"
        )
    for source, content in zip(sources, contents, strict=True):
        is_commit = kind_of(source) == "hub" and re.fullmatch("[0-9a-f]{40}", str(content))
        yield str(content) if is_commit else None
