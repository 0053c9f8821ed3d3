"""Read all rows that a recipe names into the spool: the datasets, held-out rows, general rows."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO

from tuneline.artifacts import DatasetSource
from tuneline.errors import DataError
from tuneline.prepare.config import DatasetConfig, PrepareConfig
from tuneline.prepare.datasets import with_revisions
from tuneline.prepare.formats.table import AUTO, check_names
from tuneline.prepare.rows.intake import Intake, take_in
from tuneline.prepare.rows.mixture import NUM_READ_FOR_ONE, num_wanted
from tuneline.prepare.rows.spool import Spool
from tuneline.prepare.rows.weights import Weighted
from tuneline.prepare.sources.builtin import Builtin, find_builtin
from tuneline.prepare.sources.kinds import kind_of, read_rows
from tuneline.prepare.sources.row import DEFAULT_SPLIT, Remarks, Selection, SourceRow
from tuneline.prepare.tokens.render import Renderer
from tuneline.runtime.redaction import redacted

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CollectedSource:
    """The rows of one dataset."""

    dataset: DatasetConfig
    intake: Intake
    indices: range
    """Indices of its usable rows in the spool, without held-out rows of its own."""
    remarks: list[str]
    """Sentences on how it was read, e.g. which files were left out."""


@dataclass(frozen=True)
class Collected:
    """Where in the spool the rows of each origin are."""

    intake: Intake
    """Counts of the datasets' rows; rejected rows and unused columns of all origins are counted."""
    own: range
    """Indices of the datasets' own rows, which may be trained on; they begin at 0."""
    heldout: range | None
    """Indices of held-out rows that were read separately; None: some own rows are to be held
    out."""
    general: range
    """Indices of the general rows that were read."""
    sources: list[CollectedSource]
    """The datasets, in the order of the recipe; their indices make up `own`."""


@dataclass(frozen=True)
class _Collector:
    config: PrepareConfig
    renderer: Renderer
    spool: Spool
    rejected: IO[str]

    def take(
        self,
        rows: Iterator[SourceRow],
        source: str,
        format: str,
        columns: dict[str, str] | None = None,
        *,
        limit: int | None = None,
    ) -> Intake:
        config = self.config
        if columns is not None:
            config = config.model_copy(update={"columns": columns})
        return take_in(
            rows,
            config,
            source=redacted(source),
            format=format,
            renderer=self.renderer,
            spool=self.spool,
            rejected=self.rejected,
            max_rows=limit,
        )


def collect(
    datasets: list[DatasetConfig],
    config: PrepareConfig,
    renderer: Renderer,
    spool: Spool,
    rejected: IO[str],
) -> Collected:
    """Read the rows of the datasets, of prepare.heldout and of prepare.general into the spool.

    Args:
        datasets: the datasets to train on, as `prepare.datasets.parse` returns them.
        config: the `prepare` section of the recipe.
        renderer: renders rows with the chat template.
        spool: receives the usable rows.
        rejected: open file that receives the unusable rows.

    Raises:
        DataError: the rows cannot be used.
        CredentialsError: a store refused the credentials.
        HubError: the Hub or a store could not be reached.
    """
    collector = _Collector(config, renderer, spool, rejected)
    builtin = find_builtin(datasets[0].source) if len(datasets) == 1 else None
    heldout: range | None = None
    if builtin is not None:
        source, heldout = _builtin(datasets[0], builtin, collector)
        sources = [source]
    else:
        sources = [_dataset(dataset, collector) for dataset in datasets]
    own = range(sources[-1].indices.stop)
    intake = _sum([source.intake for source in sources])
    if config.heldout.source is not None:
        first = len(spool)
        if config.heldout.max_rows:
            intake.add(_heldout(datasets, intake.format, collector))
        heldout = range(first, len(spool))
    first = len(spool)
    if config.general is not None:
        intake.add(_general(len(own), collector))
    return Collected(intake, own, heldout, range(first, len(spool)), sources)


def _dataset(dataset: DatasetConfig, collector: _Collector) -> CollectedSource:
    assert dataset.format is not None
    remarks = Remarks()
    first = len(collector.spool)
    rows = read_rows(dataset.source, dataset_selection(dataset, collector.config), remarks)
    intake = collector.take(rows, dataset.source, dataset.format, dataset.columns)
    indices = range(first, len(collector.spool))
    return CollectedSource(dataset, intake, indices, _logged(remarks))


def _builtin(
    dataset: DatasetConfig, builtin: Builtin, collector: _Collector
) -> tuple[CollectedSource, range | None]:
    """Read a built-in dataset, whose last rows are held out unless prepare.heldout names others."""
    assert dataset.format is not None
    rows = list(read_rows(dataset.source, dataset_selection(dataset, collector.config)))
    num_train = len(rows) - builtin.num_heldout
    intake = collector.take(iter(rows[:num_train]), dataset.source, dataset.format, dataset.columns)
    own = range(len(collector.spool))
    heldout = None
    wanted = collector.config.heldout.max_rows
    if collector.config.heldout.source is None:
        if wanted:
            collector.take(
                iter(rows[num_train:]), dataset.source, intake.format, dataset.columns, limit=wanted
            )
        heldout = range(own.stop, len(collector.spool))
    return CollectedSource(dataset, intake, own, []), heldout


def _heldout(datasets: list[DatasetConfig], format: str, collector: _Collector) -> Intake:
    config = collector.config
    source = config.heldout.source
    assert source is not None
    remarks = Remarks()
    rows = read_rows(source, heldout_selection(datasets, config), remarks)
    if len(datasets) > 1:
        format = config.format
    intake = collector.take(rows, source, format, limit=config.heldout.max_rows)
    _logged(remarks)
    return intake


def _general(num_own: int, collector: _Collector) -> Intake:
    general = collector.config.general
    assert general is not None
    remarks = Remarks()
    rows = read_rows(general.source, general_selection(collector.config), remarks)
    limit = NUM_READ_FOR_ONE * max(1, num_wanted(general, num_own))
    intake = collector.take(rows, general.source, general.format, general.columns, limit=limit)
    _logged(remarks)
    return intake


def _sum(intakes: list[Intake]) -> Intake:
    """Return the counts of all datasets together."""
    total = Intake(", ".join(dict.fromkeys(intake.format for intake in intakes)))
    for intake in intakes:
        total.num_rows += intake.num_rows
        total.add(intake)
    return total


def _logged(remarks: Remarks) -> list[str]:
    sentences = remarks.sentences()
    for sentence in sentences:
        logger.warning("%s", sentence)
    return sentences


def dataset_selection(dataset: DatasetConfig, config: PrepareConfig) -> Selection:
    """Return the part of the source of a dataset that is read."""
    return Selection(dataset.split, dataset.subset, dataset.revision, encoding=config.encoding)


def heldout_selection(datasets: list[DatasetConfig], config: PrepareConfig) -> Selection:
    """Return the part of the source of prepare.heldout that is read."""
    selection = Selection(
        config.heldout.split,
        default_split=config.split or DEFAULT_SPLIT,
        takes_only_split=True,
        encoding=config.encoding,
    )
    source = config.heldout.source
    assert source is not None
    if kind_of(source) == "hub" or source in (dataset.source for dataset in datasets):
        return replace(selection, subset=config.subset, revision=config.revision)
    return selection


def general_selection(config: PrepareConfig) -> Selection:
    """Return the part of the source of prepare.general that is read."""
    general = config.general
    assert general is not None
    return Selection(general.split, general.subset, general.revision, encoding=config.encoding)


def check_sources(datasets: list[DatasetConfig], config: PrepareConfig) -> None:
    """Check the formats and columns of a recipe, and that every source exists, before any is read.

    Raises:
        DataError: a format or a key of a column map does not fit the method, or a source does not
            exist or is of no known kind.
    """
    for dataset in datasets:
        check_names(dataset.format or AUTO, dataset.columns or {}, config.method)
    if config.general is not None:
        check_names(config.general.format, config.general.columns, config.method)
    for source, _ in with_revisions(datasets, config):
        kind_of(source)
    seen: set[tuple[str, str | None, str | None]] = set()
    for dataset in datasets:
        key = (dataset.source, dataset.split, dataset.subset)
        if key in seen:
            raise DataError(
                f"datasets names {redacted(dataset.source)} twice: set its weight to 2 instead"
            )
        seen.add(key)


def records(
    named: list[DatasetConfig], collected: Collected, weighted: Weighted
) -> list[DatasetSource]:
    """Return the record of each dataset.

    Args:
        named: the datasets as the recipe names them.
        collected: their rows.
        weighted: how often the rows of each dataset are used.
    """
    return [
        DatasetSource(
            source=redacted(entry.source),
            revision=source.dataset.revision,
            weight=source.dataset.weight,
            format=source.intake.format,
            num_rows=source.intake.num_rows,
            num_rejected_rows=source.intake.num_rejected,
            num_train_rows=distinct,
            num_repeated_rows=used - distinct,
            licence=source.dataset.licence,
            remarks=source.remarks,
        )
        for entry, source, distinct, used in zip(
            named, collected.sources, weighted.num_distinct, weighted.num_used, strict=True
        )
    ]


def licences(datasets: list[DatasetConfig]) -> str | None:
    """Return the licences of the datasets, separated by commas; None if none is stated."""
    return ", ".join(dict.fromkeys(entry.licence for entry in datasets if entry.licence)) or None
