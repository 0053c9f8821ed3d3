"""Columns and message keys that change what should be learnt, but that tuneline cannot honour.

A row that has one is refused, because training without it would teach something else. The recipe
can name the column or key in `prepare.ignore_columns` to train without it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from tuneline.artifacts import Method
from tuneline.prepare.formats.checks import describe_type, has_value
from tuneline.prepare.formats.example import BadRowError
from tuneline.prepare.formats.reading import REASONING, Reading, Row


@dataclass(frozen=True)
class Refusal:
    """Why a column or a message key is refused."""

    reason: str
    applies: Callable[[Any], bool] = has_value
    """Returns whether a value of the column is refused."""
    methods: tuple[Method, ...] | None = None
    """Training methods that refuse the column; None: all."""


def _is_not_one(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip() not in ("", "1", "1.0")
    return has_value(value) and value != 1


def _is_truth_value(value: Any) -> bool:
    return isinstance(value, bool) or (
        isinstance(value, str) and value.strip().lower() in ("true", "false")
    )


def is_reasoning(value: Any) -> bool:
    """Return whether a value of a column is the reasoning before an answer.

    A single word, such as "on", says how the answer was made; it is not its reasoning.
    """
    return isinstance(value, str) and len(value.split()) > 1


_WITH_ANSWERS = tuple(method for method in get_args(Method) if method != "cpt")
_MEDIA = Refusal("tuneline trains on text only")
_ROW_WEIGHT = Refusal("tuneline gives all rows the same weight", _is_not_one)
_JUDGED = Refusal(
    "it says whether the answer is desirable, so this is KTO data, in which answers can be wrong. "
    "Set prepare.method to kto",
    _is_truth_value,
    methods=("sft",),
)
_OF_ONE_ANSWER = Refusal(
    "it belongs to an answer, but this format has answers in lists of messages. Move it into the "
    "message of the answer",
    is_reasoning,
    methods=_WITH_ANSWERS,
)
_SPAN = Refusal("tuneline learns or excludes whole messages, not parts of one")

_IN_MESSAGES: dict[str, Refusal] = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _MEDIA),
    **dict.fromkeys(("train_detail", "training_detail"), _SPAN),
}
_COLUMNS: dict[str, Refusal] = {
    **_IN_MESSAGES,
    **dict.fromkeys(("weight", "sample_weight", "loss_weight"), _ROW_WEIGHT),
    **dict.fromkeys(("label", "kto_tag"), _JUDGED),
    **dict.fromkeys(REASONING, _OF_ONE_ANSWER),
    "history": Refusal("this format has no earlier turns beside its own", methods=_WITH_ANSWERS),
    "tool_calls": Refusal("calls belong into the message that makes them", methods=_WITH_ANSWERS),
    "loss_mask": Refusal("tuneline computes the loss mask from the chat template"),
    "chat_template_kwargs": Refusal("tuneline renders all rows with the same template arguments"),
}


def check_columns(row: Row, known: frozenset[str], method: Method, reading: Reading) -> None:
    """Note the columns that the row's format does not use; refuse those that must not be lost.

    Args:
        row: the row, with tuneline's column names.
        known: columns that the format's reader reads.
        method: the training method.
        reading: receives the names of the unused columns.
    """
    for name, value in row.items():
        if name not in known and has_value(value):
            refusal = _COLUMNS.get(name)
            if refusal is not None and (refusal.methods is None or method in refusal.methods):
                _apply(refusal, value, name, reading)
            reading.leave(name)


def check_key(key: str, value: Any, name: str, reading: Reading) -> None:
    """Note a message's key that is not used; refuse it if it must not be lost.

    Args:
        key: the key.
        value: the key's value; the value of a missing key is null.
        name: name of the key in messages to the user, e.g. `messages[].images`.
        reading: receives the name of the unused key.
    """
    if has_value(value):
        if key in _IN_MESSAGES:
            _apply(_IN_MESSAGES[key], value, name, reading)
        reading.leave(name)


def _apply(refusal: Refusal, value: Any, name: str, reading: Reading) -> None:
    if not refusal.applies(value):
        return
    is_short = isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) < 20)
    raise BadRowError(
        f"{name} ({value if is_short else describe_type(value)}) cannot be used: {refusal.reason}. "
        f"To train without it, name {reading.source_name(name)} in prepare.ignore_columns"
    )
