"""Read the first rows of a recipe's sources, to find what is wrong with them before a run."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from tuneline.errors import DataError
from tuneline.prepare.config import DatasetConfig, PrepareConfig
from tuneline.prepare.datasets import parse
from tuneline.prepare.formats import table
from tuneline.prepare.formats.checks import has_value
from tuneline.prepare.formats.example import BadRowError
from tuneline.prepare.formats.reading import Row
from tuneline.prepare.rows.collect import (
    check_sources,
    dataset_selection,
    general_selection,
    heldout_selection,
)
from tuneline.prepare.rows.intake import check_mapped, read_values, reading_of
from tuneline.prepare.sources.kinds import KINDS, kind_of, read_rows
from tuneline.prepare.sources.row import Selection, SourceRow
from tuneline.runtime.redaction import redacted

NUM_ROWS = 64
"""Number of rows of a source that are read."""


@dataclass(frozen=True)
class FirstRows:
    """What the first rows of a source are."""

    source: str
    """Name of the source, without credentials."""
    words: str
    """What was found, in a few words."""
    has_choices: bool | None = None
    """Whether the rows have answers to choose from; None if rows were not read."""
    is_heldout: bool = False
    """Whether the source is that of the held-out rows."""


def check(config: PrepareConfig, *, data: str) -> Iterator[FirstRows]:
    """Yield what the first rows of each source are, if the recipe can use them.

    Rows of the Hub are not read, but their dataset and its revision are looked up. Sources in
    stores are read by the run only.

    Args:
        config: the `prepare` section of the recipe.
        data: the recipe's `dataset`, or its `datasets` as JSON.

    Raises:
        DataError: a source does not exist, or the recipe cannot use its first rows.
        HubError: the Hub could not be reached.
    """
    table.check_names(config.format, config.columns, config.method)
    datasets = parse(data, config)
    check_sources(datasets, config)
    for entry in datasets:
        yield _look(entry, dataset_selection(entry, config), config)
    if config.heldout.source is not None:
        entry = DatasetConfig(source=config.heldout.source, format=config.format)
        yield _look(entry, heldout_selection(datasets, config), config, is_heldout=True)
    if config.general is not None:
        general = config.general
        entry = DatasetConfig(source=general.source, format=general.format, columns=general.columns)
        yield _look(entry, general_selection(config), config)


def _look(
    entry: DatasetConfig, selection: Selection, config: PrepareConfig, *, is_heldout: bool = False
) -> FirstRows:
    source = redacted(entry.source)
    kind = kind_of(entry.source)
    if kind == "hub":
        commit = KINDS["hub"].fingerprint(entry.source, selection.revision)
        return FirstRows(source, f"{source} is at commit {commit[:12]}", is_heldout=is_heldout)
    if kind == "store":
        return FirstRows(source, f"{source} is read by the run", is_heldout=is_heldout)
    if entry.columns is not None:
        config = config.model_copy(update={"columns": entry.columns})
    rows = list(islice(read_rows(entry.source, selection), NUM_ROWS))
    format, has_choices = _check_rows(rows, entry.format or table.AUTO, config, source)
    words = f"{source}: the first {len(rows)} rows are of format {format}"
    return FirstRows(source, words, has_choices, is_heldout)


def _check_rows(
    rows: list[SourceRow], format: str, config: PrepareConfig, source: str
) -> tuple[str, bool]:
    """Return the format of rows, and whether they have answers to choose from.

    Args:
        rows: the first rows.
        format: the format that the recipe names, or auto.
        config: the `prepare` section of the recipe, with the columns of the source.
        source: name of the source, for messages.
    """
    readable = [(row, row.values) for row in rows if row.values is not None]
    if not rows:
        raise DataError(f"{source} has no rows: it is empty")
    if not readable:
        raise DataError(f"{source}: {rows[0].file} line {rows[0].line}: {rows[0].reason}")
    given = list(dict.fromkeys(name for _, values in readable for name in values))
    absent = {ours for ours, theirs in config.columns.items() if theirs not in given}
    reading = reading_of(config)
    renamed: list[Row] = [table.rename(values, reading) for _, values in readable]
    known = format if format != table.AUTO else table.detect(renamed, config.method)
    # An optional column may be in later rows.
    needed = absent if known is None else absent & set(table.FORMATS[known].required)
    check_mapped(needed, given, config, source)
    if known is None:
        raise table.unknown_format(renamed, config.method)
    reasons = []
    for row, _ in readable:
        try:
            read_values(row, known, reading)
        except BadRowError as error:
            reasons.append(f"{row.file} line {row.line}: {error}")
    if len(reasons) == len(readable):
        raise DataError(
            f"none of the first {len(reasons)} rows of {source} can be used: {reasons[0]}"
        )
    # Of a preference, the two answers are the choices.
    is_preference = table.FORMATS[known].method == "dpo"
    return known, is_preference or any(has_value(row.get("choices")) for row in renamed)
