"""Read all rows that a recipe names into the spool: the dataset, held-out rows, general rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from tuneline.prepare.config import PrepareConfig
from tuneline.prepare.rows.intake import Intake, take_in
from tuneline.prepare.rows.mixture import NUM_READ_FOR_ONE, num_wanted
from tuneline.prepare.rows.spool import Spool
from tuneline.prepare.sources.builtin import find_builtin
from tuneline.prepare.sources.kinds import read_rows
from tuneline.prepare.sources.row import Selection, SourceRow
from tuneline.prepare.tokens.render import Renderer


@dataclass(frozen=True)
class Collected:
    """Where in the spool the rows of each origin are."""

    intake: Intake
    """Counts of the dataset's rows; rejected rows and unused columns of all origins are counted."""
    own: range
    """Indices of the dataset's own rows, which may be trained on; they begin at 0."""
    heldout: range | None
    """Indices of held-out rows that were read separately; None: some own rows are to be held
    out."""
    general: range
    """Indices of the general rows that were read."""


def collect(
    source: str, config: PrepareConfig, renderer: Renderer, spool: Spool, rejected: IO[str]
) -> Collected:
    """Read the rows of the dataset, of prepare.heldout and of prepare.general into the spool.

    Args:
        source: a Hub ID, a file, a directory, a glob of files or builtin:NAME.
        config: the `prepare` section of the recipe.
        renderer: renders rows with the chat template.
        spool: receives the usable rows.
        rejected: open file that receives the unusable rows.

    Raises:
        DataError: the rows cannot be used.
        HubError: the Hub could not be reached.
    """

    def take(rows: Iterator[SourceRow], name: str, format: str, limit: int | None) -> Intake:
        return take_in(
            rows,
            config,
            source=name,
            format=format,
            renderer=renderer,
            spool=spool,
            rejected=rejected,
            max_rows=limit,
        )

    rows = read_rows(source, Selection(config.split, config.subset, config.revision))
    wanted = config.heldout.max_rows
    heldout: range | None = None
    builtin = find_builtin(source)
    if builtin is not None:
        everything = list(rows)
        num_train = len(everything) - builtin.num_heldout
        intake = take(iter(everything[:num_train]), source, config.format, None)
        if config.heldout.source is None:
            if wanted:
                take(iter(everything[num_train:]), source, intake.format, wanted)
            heldout = range(num_train, len(spool))
    else:
        intake = take(rows, source, config.format, None)
    own = range(len(spool) if heldout is None else heldout.start)
    if config.heldout.source is not None:
        if wanted:
            selection = Selection(
                config.heldout.split or config.split, config.subset, config.revision
            )
            rows = read_rows(config.heldout.source, selection)
            held = take(rows, config.heldout.source, intake.format, wanted)
            intake.add(held)
        heldout = range(own.stop, len(spool))
    general = config.general
    first = len(spool)
    if general is not None:
        general_intake = take_in(
            read_rows(general.source, Selection(general.split, general.subset, general.revision)),
            config.model_copy(update={"columns": general.columns}),
            source=general.source,
            format=general.format,
            renderer=renderer,
            spool=spool,
            rejected=rejected,
            max_rows=NUM_READ_FOR_ONE * max(1, num_wanted(general, len(own))),
        )
        intake.add(general_intake)
    return Collected(intake, own, heldout, range(first, len(spool)))
