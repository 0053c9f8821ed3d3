"""The datasets of a run: one, or several with weights, and how they are written as one text.

The pipeline has one parameter for the data, which is shown and can be changed in KFP: the name of a
source, or the recipe's `datasets` as JSON.
"""

import json
from collections.abc import Sequence
from typing import Any

from tuneline.errors import RecipeError
from tuneline.prepare.config import DatasetConfig, PrepareConfig
from tuneline.runtime.redaction import redacted


def to_text(datasets: Sequence[DatasetConfig]) -> str:
    """Return several datasets as JSON, without keys that have their default."""
    return json.dumps(
        [entry.model_dump(exclude_defaults=True) for entry in datasets], ensure_ascii=False
    )


def parse(text: str, config: PrepareConfig) -> list[DatasetConfig]:
    """Return the datasets of a text that is a source or that `to_text` wrote.

    Keys that a dataset does not set have the values of `prepare`.

    Raises:
        RecipeError: the text is a list, but not of datasets.
    """
    entries = _entries(text)
    if entries is None:
        return [
            DatasetConfig(
                source=text,
                format=config.format,
                columns=config.columns,
                split=config.split,
                subset=config.subset,
                revision=config.revision,
                licence=config.licence,
            )
        ]
    if not entries:
        raise RecipeError("datasets is an empty list: name at least one dataset")
    datasets = [
        DatasetConfig.parse(entry, where=f"datasets[{index}]")
        for index, entry in enumerate(entries)
    ]
    return [
        entry.model_copy(
            update={
                "format": entry.format or config.format,
                "columns": config.columns if entry.columns is None else entry.columns,
                "split": entry.split or config.split,
            }
        )
        for entry in datasets
    ]


def sources_of(text: str, config: PrepareConfig) -> list[str]:
    """Return all sources of rows: of the datasets, of held-out rows and of general rows.

    Raises:
        RecipeError: the text is a list, but not of datasets.
    """
    return list(dict.fromkeys(source for source, _ in with_revisions(parse(text, config), config)))


def with_revisions(
    datasets: Sequence[DatasetConfig], config: PrepareConfig
) -> list[tuple[str, str | None]]:
    """Return all sources of rows, as `sources_of` does, each with its revision."""
    sources = [(entry.source, entry.revision) for entry in datasets]
    if config.heldout.source is not None:
        sources.append((config.heldout.source, config.revision))
    if config.general is not None:
        sources.append((config.general.source, config.general.revision))
    return sources


def describe(datasets: Sequence[DatasetConfig]) -> str:
    """Return the datasets in words, e.g. "a.jsonl and org/rows (weight 2)"."""
    names = [
        redacted(entry.source) + (f" (weight {entry.weight:g})" if entry.weight != 1 else "")
        for entry in datasets
    ]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _entries(text: str) -> list[dict[str, Any]] | None:
    """Return the objects of a JSON list of objects; None for any other text, e.g. [ab].jsonl."""
    if not text.lstrip().startswith("["):
        return None
    try:
        value = json.loads(text)
    except ValueError:
        return None
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        return value
    return None
