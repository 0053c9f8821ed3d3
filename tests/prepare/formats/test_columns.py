"""Columns are used, counted as unused, ignored on request, or refused by name."""

import pytest

from tuneline.prepare.formats.example import BadRowError
from tuneline.prepare.formats.reading import Reading
from tuneline.prepare.formats.table import FORMATS, detect, read_row

ROW = {"prompt": "2 + 2?", "completion": "4"}
USER = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}


def unused(row: dict, format: str = "prompt-completion", **options) -> set[str]:
    reading = Reading(**options)
    read_row(row, format, reading)
    return reading.unused


@pytest.mark.parametrize("value", [0, False, "x", 1.5, [None], {"a": {}}, {"a": [1]}])
def test_a_column_with_a_value_is_named(value) -> None:
    assert unused(ROW | {"extra": value}) == {"extra"}
    assert unused(ROW | {"extra": value}, ignored=frozenset({"extra"})) == set()


@pytest.mark.parametrize("value", [None, "", [], {}, {"a": None, "b": {"c": None}}])
def test_a_column_without_a_value_is_not_named(value) -> None:
    assert unused(ROW | {"extra": value}) == set()


def test_names_are_those_of_the_source() -> None:
    row = {"chat": [USER | {"id": 3}, ANSWER], "messages": "old", "functions_": [], "sys": "x"}
    columns = {"messages": "chat", "system": "sys"}
    assert unused(row, "messages", columns=columns) == {"chat[].id", "messages"}
    ignored = frozenset({"chat[].id", "messages"})
    assert unused(row, "messages", columns=columns, ignored=ignored) == set()
    own = row | {"chat": [{"role": "system", "content": "y"}, *row["chat"]]}
    assert "sys (the messages begin with another system message)" in unused(
        own, "messages", columns=columns
    )


def test_an_ignored_column_is_not_read() -> None:
    tools = [{"name": "add", "description": "Add"}]
    row = {"messages": [USER, ANSWER], "tools": tools, "t": tools}
    for columns, name in (({}, "tools"), ({"tools": "t"}, "t")):
        reading = Reading(columns=columns, ignored=frozenset({name}))
        assert read_row(row, "messages", reading).tools is None
        assert reading.unused == ({"tools"} if columns else {"t"})


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("images", ["a.png"], "images .a list. cannot be used: tuneline trains on text only"),
        ("image", {"bytes": b"x", "path": None}, "image .an object. .* text only"),
        ("audio", "a.wav", "audio .a.wav. .* name audio in prepare.ignore_columns"),
        ("videos", ["x" * 100], "text only"),
        ("weight", 0.3, "weight .0.3. .* gives all rows the same weight"),
        ("weight", 0, "same weight"),
        ("sample_weight", "0.5", "same weight"),
        ("label", True, "label .True. .* KTO data.* prepare.method to kto"),
        ("label", False, "wrong"),
        ("label", "TRUE", "KTO data"),
        ("kto_tag", "false", "KTO data"),
        ("loss_mask", [0, 1], "computes the loss mask"),
        ("chat_template_kwargs", {"enable_thinking": False}, "same template arguments"),
    ],
)
def test_columns_that_change_what_is_learnt_are_refused(column, value, reason) -> None:
    row = ROW | {column: value}
    with pytest.raises(BadRowError, match=reason):
        unused(row)
    assert unused(row, ignored=frozenset({column})) == set()


@pytest.mark.parametrize(
    ("column", "value"),
    [("label", 1), ("label", "positive"), ("label", 0), ("weight", 1), ("weight", "1.0")],
)
def test_columns_of_other_meanings_are_named(column, value) -> None:
    assert unused(ROW | {column: value}) == {column}


def test_a_truth_value_beside_other_methods_is_named() -> None:
    assert unused({"text": "Some text.", "label": True}, "text") == {"label"}
    pair = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "label": True}
    assert unused(pair, "preference") == {"label"}
    with pytest.raises(BadRowError, match="text only"):
        unused(pair | {"images": ["a.png"]}, "preference")


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("history", [["2 + 2?", "4"]]),
        ("tool_calls", [{"name": "add"}]),
        ("reasoning_content", "Two and two."),
        ("thinking", "Two and two."),
    ],
)
def test_what_belongs_to_an_answer_is_not_lost_beside_a_list_of_messages(column, value) -> None:
    row = {"messages": [USER, ANSWER], column: value}
    with pytest.raises(BadRowError, match=f"{column} .*prepare.ignore_columns"):
        unused(row, "messages")
    assert unused({"text": "Some text.", column: value}, "text") == {column}


def test_columns_that_some_rows_cannot_use_are_named() -> None:
    assert unused(ROW | {"choices": ["5", "6"]}) == {"choices (does not list the answer)"}
    assert unused(ROW | {"choices": ["4", "5"]}) == set()
    assert unused(ROW | {"choices": {"text": ["4"]}}) == {"choices (does not list the answer)"}
    pair = {"chosen": "4", "rejected": "5", "prompt": "2 + 2?", "instruction": "Add.", "input": "2"}
    assert unused(pair, "preference") == {"instruction", "input"}


def test_every_column_of_a_format_may_be_null() -> None:
    rows = {
        "preference": {"prompt": "a?", "chosen": "4", "rejected": "5"},
        "messages": {"messages": [USER, ANSWER]},
        "sharegpt": {"conversations": [USER, ANSWER]},
        "alpaca": {"instruction": "a?", "output": "4"},
        "prompt-completion": ROW,
        "text": {"text": "a"},
        "kto": ROW | {"label": True},
        "kto-tag": ROW | {"kto_tag": True},
    }
    rows |= {"kto": ROW | {"label": True}, "kto-tag": ROW | {"kto_tag": 0}}
    assert set(rows) == set(FORMATS)
    for name, row in rows.items():
        nulls = {column: None for column in FORMATS[name].optional if column not in row}
        assert unused(row | nulls, name) == set()
        assert read_row(row | nulls, name, Reading()) == read_row(row, name, Reading())


@pytest.mark.parametrize(
    ("rows", "format"),
    [
        # Tables joined from several datasets: the columns of all, most of them null.
        ([{"messages": None, "prompt": "a?", "completion": "b"}], "prompt-completion"),
        ([ROW | {"instruction": "a", "output": None}], "prompt-completion"),
        ([{"messages": [USER]}, ROW, ROW], "prompt-completion"),
        ([ROW | {"messages": [USER, ANSWER]}], "messages"),
        # A first row without the column that the others have.
        ([{"prompt": "a?"}, ROW], "prompt-completion"),
        ([{"id": 1}, {"id": 2, "instruction": "a", "output": "b"}], "alpaca"),
        # Nothing but nulls: the columns still say what was meant.
        ([{"prompt": None, "completion": None}], "prompt-completion"),
        ([{"question": "a?", "answer": "b"}], None),
        ([], None),
    ],
)
def test_the_format_is_that_of_most_rows(rows, format) -> None:
    assert detect(rows, "sft") == format
