"""Read the rows of a source, and find what a recipe for them has to know."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from tuneline.errors import DataError
from tuneline.pipelines.init.columns import Proposal, propose
from tuneline.pipelines.init.scripts import script_of
from tuneline.prepare.config import DatasetConfig, PrepareConfig
from tuneline.prepare.formats import table
from tuneline.prepare.formats.example import BadRowError, Example, Message
from tuneline.prepare.formats.reading import Row
from tuneline.prepare.rows.collect import dataset_selection
from tuneline.prepare.rows.intake import check_mapped, read_values, reading_of
from tuneline.prepare.rows.words import hash_of, words_of
from tuneline.prepare.sources.kinds import kind_of, read_rows
from tuneline.prepare.sources.row import Remarks, SourceRow
from tuneline.runtime.redaction import redacted

MAX_ROWS = 20_000
"""Largest number of rows that are read of files."""
MAX_ROWS_ELSEWHERE = 2_000
"""Largest number of rows that are read of the Hub or of a store."""
MAX_CHARACTERS = 1 << 26
"""Number of characters after which no more rows are read."""
MAX_UNUSABLE_SHARE = 0.2
"""Fraction of unusable rows above which the rows have to be mended first."""
_NUM_REASONS = 3
_NUM_CHARACTERS = 1000
"""Number of characters of a text by which its script is recognised."""


@dataclass
class Rows:
    """What was found in the rows of a source."""

    source: str
    """Name of the source, without credentials."""
    num_rows: int
    """Number of rows that were read."""
    is_all: bool
    """Whether the source has no more rows."""
    columns: list[str]
    """Columns of the rows, in order."""
    proposal: Proposal
    """How a recipe should read the rows."""
    remarks: list[str]
    """Sentences on how the source was read, e.g. the encoding of a file."""
    examples: list[Example] = field(default_factory=list)
    """The usable rows."""
    reasons: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Why rows cannot be used -> file and line of the first such row, number of such rows."""
    unused: list[str] = field(default_factory=list)
    """Columns, and keys of messages, that have values but are not used."""
    scripts: Counter[str] = field(default_factory=Counter)
    """Script, such as Hangul -> number of usable rows that are mostly written in it."""
    num_repeated: int = 0
    """Number of usable rows that are equal to an earlier one, as prepare compares rows."""
    num_contradicting: int = 0
    """Number of usable rows with the prompt of an earlier row and another answer."""

    @property
    def num_usable(self) -> int:
        """Number of usable rows."""
        return len(self.examples)

    @property
    def num_unusable(self) -> int:
        """Number of rows that cannot be used."""
        return sum(count for _, count in self.reasons.values())

    @property
    def has_choices(self) -> bool:
        """Whether every usable row lists answers to choose from."""
        return all(example.choices for example in self.examples)

    def unusable_in_words(self) -> str:
        """Return the first reasons why rows cannot be used, in words."""
        named = [
            f"{place}{f' and {count - 1} more' if count > 1 else ''}: {self._with_column(reason)}"
            for reason, (place, count) in islice(self.reasons.items(), _NUM_REASONS)
        ]
        others = len(self.reasons) - _NUM_REASONS
        return "; ".join([*named, *([f"and {others} more reasons"] if others > 0 else [])])

    def _with_column(self, reason: str) -> str:
        """Return a reason, with the rows' own name of the column that it begins with."""
        ours, space, rest = reason.partition(" ")
        theirs = self.proposal.columns.get(ours)
        return f"{ours} ({theirs}){space}{rest}" if theirs else reason


def look(source: str, config: PrepareConfig) -> Rows:
    """Read the rows of a source and propose how a recipe should read them.

    Args:
        source: a source as in a recipe's `dataset`.
        config: what is given of the recipe's `prepare` section; keys that are not set are proposed.

    Raises:
        DataError: there are no rows, they cannot be used, or it is not clear how they are meant.
        HubError: the Hub or a store could not be reached.
    """
    name = redacted(source)
    remarks = Remarks()
    entry = DatasetConfig(
        source=source, split=config.split, subset=config.subset, revision=config.revision
    )
    most = MAX_ROWS_ELSEWHERE if kind_of(source) in ("hub", "store") else MAX_ROWS
    read, is_all = _read(read_rows(source, dataset_selection(entry, config), remarks), most)
    values = [row.values for row in read if row.values is not None]
    if not read:
        raise DataError(f"{name} has no rows: it is empty")
    if not values:
        raise DataError(f"{name}: {read[0].file} line {read[0].line}: {read[0].reason}")
    columns = list(dict.fromkeys(str(column) for row in values for column in row))
    proposal = _proposal(values, columns, config, name)
    rows = Rows(name, len(read), is_all, columns, proposal, remarks.sentences())
    settings = {"format": proposal.format, "columns": proposal.columns}
    _read_examples(rows, read, config.model_copy(update=settings))
    if rows.num_unusable > MAX_UNUSABLE_SHARE * rows.num_rows:
        raise DataError(
            f"{rows.num_unusable} of {rows.num_rows} rows of {name}, read as {proposal.format}, "
            f"cannot be used: {rows.unusable_in_words()}"
        )
    return rows


def texts_of(example: Example) -> tuple[str, str]:
    """Return the text in front of a row's answer, and the answer; of a document, "" and the text.

    The answer of a preference is both answers.
    """
    if example.text is not None:
        return "", example.text
    if example.preference is not None:
        prompt, chosen, rejected = example.preference
        return _text(prompt), _text([chosen, rejected])
    if example.judged is not None:
        prompt, answer, _ = example.judged
        return _text(prompt), _text([answer])
    messages = example.messages or []
    return _text(messages[:-1]), _text(messages[-1:])


def _text(messages: Sequence[Message]) -> str:
    parts = []
    for message in messages:
        parts += [message["content"], *(str(call) for call in message.get("tool_calls", []))]
    return "\n".join(parts)


def _read(rows: Iterator[SourceRow], most: int) -> tuple[list[SourceRow], bool]:
    """Return the first rows, and whether they are all."""
    read: list[SourceRow] = []
    num_characters = 0
    for row in islice(rows, most):
        read.append(row)
        num_characters += sum(len(str(value)) for value in (row.values or {}).values())
        if num_characters > MAX_CHARACTERS:
            break
    return read, next(rows, None) is None


def _proposal(
    values: Sequence[Row], columns: list[str], config: PrepareConfig, source: str
) -> Proposal:
    """Return how the rows should be read; what the config sets is kept."""
    format, given = config.format, config.columns
    method = config.method if "method" in config.model_fields_set else None
    if format != table.AUTO:
        method = method or table.FORMATS[format].method
    table.check_names(format, given, method or config.method)
    check_mapped({ours for ours in given if given[ours] not in columns}, columns, config, source)
    if format != table.AUTO and method is not None:
        return Proposal(method, format, given)
    reading = reading_of(config)
    renamed = [table.rename(row, reading) for row in values]
    if not given:
        return propose(renamed, source, method=method)
    judged = ("kto",) if "label" in given else ()
    for each in (method,) if method else ("dpo", *judged, "sft", "cpt"):
        found = table.detect(renamed, each)
        if found is not None:
            return Proposal(each, found, given)
    raise table.unknown_format(renamed, method or config.method)


def _read_examples(rows: Rows, read: Sequence[SourceRow], config: PrepareConfig) -> None:
    """Read rows as examples, and count what a user should know of them."""
    reading = reading_of(config)
    unused: dict[str, None] = {}
    prompts: set[int] = set()
    texts: set[tuple[int, int]] = set()
    for row in read:
        try:
            if row.values is None:
                raise BadRowError(row.reason)
            example = read_values(row, rows.proposal.format, reading)
        except BadRowError as error:
            place, count = rows.reasons.get(str(error), (f"{row.file} line {row.line}", 0))
            rows.reasons[str(error)] = place, count + 1
            continue
        rows.examples.append(example)
        unused |= dict.fromkeys(sorted(reading.unused))
        prompt, answer = texts_of(example)
        script = script_of(f"{prompt[:_NUM_CHARACTERS]} {answer[:_NUM_CHARACTERS]}")
        rows.scripts[script] += 1
        asked = hash_of(words_of(prompt))
        whole = asked, hash_of(words_of(answer))
        if whole in texts:
            rows.num_repeated += 1
        elif asked in prompts and rows.proposal.method == "sft":
            rows.num_contradicting += 1
        texts.add(whole)
        prompts.add(asked)
    rows.unused = list(unused)
