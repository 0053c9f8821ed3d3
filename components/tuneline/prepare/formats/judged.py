"""Reader of rows with one answer that is judged: desirable or undesirable."""

from collections.abc import Callable
from typing import Any

from tuneline.prepare.formats import readers
from tuneline.prepare.formats.checks import describe_type, has_value
from tuneline.prepare.formats.example import BadRowError, Example
from tuneline.prepare.formats.reading import Reading, Row

LABELS = ("label", "kto_tag")
"""Columns that can have the judgement; LLaMA-Factory calls it kto_tag."""

_READERS: dict[str, Callable[[Row, Reading], Example]] = {
    "completion": readers.read_prompt_completion,
    "messages": readers.read_conversation,
    "conversations": readers.read_sharegpt,
    "output": readers.read_alpaca,
}
# Reader of a row's conversation, by a column that it has.
_JUDGEMENTS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def read_judged(row: Row, reading: Reading) -> Example:
    """Read a conversation in any of the formats for sft, whose last answer has a judgement."""
    label = next((name for name in LABELS if has_value(row.get(name))), LABELS[0])
    is_desirable = _read_label(row, label)
    column = next((name for name in _READERS if has_value(row.get(name))), None)
    if column is None:
        raise BadRowError(
            f"there is a {label} but no answer (no {', '.join(_READERS)}): map columns with "
            "prepare.columns"
        )
    example = _READERS[column](row, reading)
    assert example.messages is not None
    *prompt, answer = example.messages
    if example.not_learnt:
        reading.leave("weights of messages", "method kto judges the last answer of a row")
    for other in _READERS:
        if other != column and has_value(row.get(other)):
            reading.leave(other)
    return Example(judged=(prompt, answer, is_desirable), tools=example.tools)


def _read_label(row: Row, name: str) -> bool:
    value: Any = row.get(name)
    if value is None:
        raise BadRowError(f"{name} is missing")
    judgement = _JUDGEMENTS.get(str(value).strip().lower())
    if judgement is None:
        shown = repr(value) if isinstance(value, str | int | float) else describe_type(value)
        raise BadRowError(
            f"{name} is {shown}, but it has to be true or 1 for a desirable answer, and false or 0 "
            "for an undesirable one"
        )
    return judgement
