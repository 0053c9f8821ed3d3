"""What was found in rows, in words."""

from collections.abc import Iterator

from tuneline.pipelines.init.base import Base, Lengths
from tuneline.pipelines.init.rows import Rows

_MANY = 0.05
"""Fraction of the rows from which repeated and contradicting rows are a warning."""


def describe(rows: Rows, base: Base, lengths: Lengths, shortage: str) -> Iterator[str]:
    """Yield what was found and chosen, a line each; lines that begin with `warning` ask for care.

    Args:
        rows: the rows.
        base: the base model.
        lengths: how long the rows are in the base model's tokens.
        shortage: a sentence if the gate will have too few rows, or "".
    """
    count = f"{rows.num_rows:,} rows" if rows.is_all else f"the first {rows.num_rows:,} rows"
    yield f"data: {rows.source}, {count}; columns: {', '.join(rows.columns[:20])}"
    for remark in rows.remarks:
        yield f"note: {remark}"
    yield f"reads: {_mapping(rows)}"
    scripts = [
        f"{name} {count / rows.num_usable:.0%}" for name, count in rows.scripts.most_common(3)
    ]
    yield f"script: {', '.join(scripts)} of the rows"
    yield f"base model: {base.source}" + (f" ({base.why})" if base.why else "")
    yield f"length: {_length(lengths)}"
    if rows.num_unusable:
        yield (
            f"warning: {rows.num_unusable} of {rows.num_rows} rows cannot be used: "
            f"{rows.unusable_in_words()}"
        )
    for reason, number in lengths.refused.items():
        yield f"warning: {number} of {lengths.num_tried} rows cannot be used: {reason}"
    yield from _copies(rows)
    for remark in (*base.remarks, *filter(None, [shortage])):
        yield f"warning: {remark}"


def _mapping(rows: Rows) -> str:
    proposal = rows.proposal
    names = [f"{theirs} as {ours}" for ours, theirs in proposal.columns.items()]
    words = f"method {proposal.method}, format {proposal.format}"
    words += f": {', '.join(names)}" if names else ""
    return words + (f"; not used: {', '.join(rows.unused[:10])}" if rows.unused else "")


def _length(lengths: Lengths) -> str:
    statistics = lengths.statistics
    how = "estimated from the characters" if lengths.is_estimated else "with its template"
    return (
        f"median {statistics.median:,.0f} tokens, 99 % up to {statistics.p99:,.0f}, longest "
        f"{statistics.max:,} ({how})"
    )


def _copies(rows: Rows) -> Iterator[str]:
    other = "the question of an earlier row, but another answer"
    for number, one, several, words in (
        (rows.num_repeated, "is", "are", "equal to an earlier row"),
        (rows.num_contradicting, "has", "have", other),
    ):
        if number:
            level = "warning" if number > _MANY * rows.num_usable else "note"
            which = f"1 row {one}" if number == 1 else f"{number} rows {several}"
            yield f"{level}: {which} {words}; such rows are never on both sides of a split"
