"""Each format becomes the same conversation; what is wrong with a row is said."""

import re
from typing import get_args

import pytest

from tuneline.errors import DataError
from tuneline.prepare.config import GeneralConfig, PrepareConfig
from tuneline.prepare.formats.example import BadRowError, Example
from tuneline.prepare.formats.reading import Reading
from tuneline.prepare.formats.table import (
    FORMATS,
    check_names,
    detect,
    read_row,
    rename,
    unknown_format,
)

USER = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}
PAIR = ([USER], {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"})


def read(values: dict, method: str = "sft", **options) -> Example:
    return read_row(values, detect([values], method), Reading(**options))


ROWS = {
    "preference": {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
    "messages": {"messages": [USER, ANSWER]},
    "sharegpt": {"conversations": [USER, ANSWER]},
    "alpaca": {"instruction": "2 + 2?", "output": "4"},
    "prompt-completion": {"prompt": "2 + 2?", "completion": "4"},
    "text": {"text": "2 + 2 = 4"},
    "kto": {"prompt": "2 + 2?", "completion": "4", "label": True},
    "kto-tag": {"messages": [USER, ANSWER], "kto_tag": 1},
}
EXAMPLES = {
    "sft": Example(messages=[USER, ANSWER]),
    "dpo": Example(preference=PAIR),
    "kto": Example(judged=([USER], ANSWER, True)),
    "cpt": Example(text="2 + 2 = 4"),
}


def test_a_conversation_that_a_helpdesk_exported_is_read() -> None:
    for question, answer in (
        ("customer", "agent"),
        ("end-user", "operator"),
        ("Client", "Support"),
    ):
        turns = [USER | {"role": question}, ANSWER | {"role": answer}]
        assert read({"messages": turns}) == EXAMPLES["sft"]


@pytest.mark.parametrize("config", [PrepareConfig, GeneralConfig])
def test_every_format_that_a_recipe_may_name_is_recognised_and_read(config) -> None:
    field = config.model_fields["format"]
    names = set(get_args(field.annotation)) - {"auto"}
    assert names == set(FORMATS) == set(ROWS)
    for name in names:
        entry = FORMATS[name]
        assert f"{name} ({entry.method}): " in field.description
        check_names(name, {column: f"my {column}" for column in entry.known}, entry.method)
        assert detect([ROWS[name]], entry.method) == name
        assert read_row(ROWS[name], name, Reading()) == EXAMPLES[entry.method]


@pytest.mark.parametrize(
    ("values", "format"),
    [
        ({"instruction": "2 + 2?", "input": "", "output": "4"}, "alpaca"),
        ({"messages": [USER, ANSWER]}, "messages"),
        (
            {
                "conversations": [
                    {"from": "human", "value": "2 + 2?"},
                    {"from": "gpt", "value": "4"},
                ]
            },
            "sharegpt",
        ),
        ({"conversations": [USER, ANSWER]}, "sharegpt"),
        ({"prompt": "2 + 2?", "completion": "4", "choices": ["4", "5"]}, "prompt-completion"),
        ({"prompt": [USER], "completion": [ANSWER]}, "prompt-completion"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]},
                    ANSWER,
                ]
            },
            "messages",
        ),
    ],
)
def test_sft_formats_give_one_conversation(values: dict, format: str) -> None:
    assert detect([values], "sft") == format
    example = read(values)
    assert example.messages == [USER, ANSWER]
    assert example.choices == values.get("choices")


def test_alpaca_input_follows_the_instruction() -> None:
    values = {"instruction": "Add.", "input": "2, 2", "output": "4"}
    assert read(values).messages[0]["content"] == "Add.\n\n2, 2"
    worded = read(values, input_heading="\n\n### Input:\n")
    assert worded.messages[0]["content"] == "Add.\n\n### Input:\n2, 2"


def test_system_prompt_is_for_rows_without_one() -> None:
    system = {"role": "system", "content": "Be brief."}
    assert read({"messages": [USER, ANSWER]}, system_prompt="Be brief.").messages[0] == system
    own = {"role": "system", "content": "Be kind."}
    assert read({"messages": [own, USER, ANSWER]}, system_prompt="Be brief.").messages[0] == own
    in_column = {"prompt": "2 + 2?", "completion": "4", "system": "Be kind."}
    assert read(in_column, system_prompt="Be brief.").messages[0] == own
    empty = read({"messages": [USER, ANSWER]}, system_prompt="").messages[0]
    assert empty == {"role": "system", "content": ""}


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER | {"content": "5"}]},
        {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER | {"content": "5"}]},
        {
            "prompt": "2 + 2?",
            "chosen": [USER, ANSWER],
            "rejected": [USER, ANSWER | {"content": "5"}],
        },
        {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, ANSWER | {"content": "5"}]},
    ],
)
def test_preference_formats(values: dict) -> None:
    assert read(values, "dpo").preference == PAIR


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"prompt": "a?", "completion": None}, "completion is missing"),
        ({"prompt": "a?", "completion": " \n"}, "completion is empty"),
        ({"prompt": "a?", "completion": 4}, "completion is a number, not text"),
        ({"prompt": "a?", "completion": True}, "completion is true or false, not text"),
        ({"prompt": "a?", "completion": "\u200b"}, "completion is empty"),
        ({"prompt": "", "completion": "4"}, "prompt is empty"),
        ({"prompt": "a?", "completion": "\ud800x"}, "half of a surrogate pair"),
        ({"instruction": "a?", "input": 3, "output": "4"}, "input is a number, not text"),
        ({"messages": []}, "messages is empty"),
        ({"messages": None}, "messages is missing"),
        ({"messages": "a?"}, "messages is text, not a list"),
        ({"messages": [USER]}, "the last message is from the user: there is no answer to learn"),
        ({"messages": [USER, {"role": "me", "content": "4"}]}, "messages 2 has the role 'me'"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages 2 .assistant. has no content"),
        ({"messages": [ANSWER, USER, ANSWER]}, "an answer comes before the first user message"),
        ({"messages": [ANSWER]}, "there is no user message"),
        (
            {"messages": [USER, {"role": "system", "content": "x"}, ANSWER]},
            "a system message comes after the first",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"image": 1}]}]},
            "a part that is not text",
        ),
        (
            {"conversations": [{"from": "me", "value": "a"}]},
            "has the role 'me'; known roles are system",
        ),
    ],
)
def test_bad_rows_say_why(values: dict, reason: str) -> None:
    with pytest.raises(BadRowError, match=reason):
        read(values)


def test_bad_preferences_say_why() -> None:
    with pytest.raises(BadRowError, match="chosen and rejected are the same"):
        read({"prompt": "a?", "chosen": "4", "rejected": "4"}, "dpo")
    with pytest.raises(BadRowError, match="rejected is missing"):
        read({"prompt": "a?", "chosen": "4", "rejected": None}, "dpo")
    with pytest.raises(BadRowError, match="differ before their last message"):
        other = [USER | {"content": "3 + 3?"}, ANSWER]
        read({"chosen": [USER, ANSWER], "rejected": other}, "dpo")


def preference(prompt: str = "2 + 2?", chosen: str = "4", rejected: str = "5") -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def as_messages(row: dict) -> dict:
    """The same row with a list of one message per column."""
    return {
        "prompt": [USER | {"content": row["prompt"]}],
        "chosen": [ANSWER | {"content": row["chosen"]}],
        "rejected": [ANSWER | {"content": row["rejected"]}],
    }


def as_conversations(row: dict) -> dict:
    """The same row with the prompt repeated in front of both answers, and no column for it."""
    lists = as_messages(row)
    return {name: lists["prompt"] + lists[name] for name in ("chosen", "rejected")}


@pytest.mark.parametrize("written", [dict, as_messages, as_conversations])
@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("\u200b\ufeff", "is empty"),
        ("x\ud800", "half of a surrogate pair"),
    ],
)
def test_a_preference_is_refused_alike_in_every_spelling(written, column, text, reason) -> None:
    with pytest.raises(BadRowError, match=f"^{column} {reason}|^{column} is not .* {reason}"):
        read(written(preference(**{column: text})), "dpo")


def test_earlier_turns_of_a_preference_are_checked() -> None:
    for earlier, reason in (
        ([USER | {"content": " "}, ANSWER], "a user message is empty"),
        ([USER, ANSWER | {"content": ""}], "the answer is empty"),
        ([{"role": "system", "content": "\ud800"}], "the system message is not valid Unicode"),
    ):
        row = as_messages(preference())
        with pytest.raises(BadRowError, match=reason):
            read(row | {"prompt": [*earlier, *row["prompt"]]}, "dpo")
    with pytest.raises(BadRowError, match="the system message is not valid Unicode"):
        read(preference() | {"system": "\ud800"}, "dpo")


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (("", "4"), "a user message is empty"),
        ((" \n", "4"), "a user message is empty"),
        (("2 + 2?", ""), "the answer is empty"),
        (("2 + 2?", "4", "", "5"), "a user message is empty"),
        (("2 + 2?", "", "3 + 2?", "5"), "the answer is empty"),
    ],
)
def test_an_empty_turn_is_refused_in_every_list_of_messages(turns, reason) -> None:
    messages = [(USER, ANSWER)[n % 2] | {"content": text} for n, text in enumerate(turns)]
    shared = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(turns)]
    for row in (
        {"messages": messages},
        {"conversations": messages},
        {"conversations": shared},
        {"prompt": messages[:-1], "completion": messages[-1:]},
    ):
        with pytest.raises(BadRowError, match=reason):
            read(row)


def test_choices_that_cannot_be_written_are_refused() -> None:
    row = {"prompt": "a?", "completion": "4", "choices": ["4", "\ud800"]}
    with pytest.raises(BadRowError, match="a choice is not valid Unicode"):
        read(row)


def test_choices_of_another_kind_are_no_choices() -> None:
    row = {"prompt": "a?", "completion": "4"}
    assert read(row | {"choices": ["5", "6"]}).choices is None
    assert read(row | {"choices": {"text": ["4"]}}).choices is None


def test_method_decides_between_formats() -> None:
    both = {"prompt": "a?", "completion": "4", "text": "a? 4"}
    assert detect([both], "sft") == "prompt-completion"
    assert detect([both], "cpt") == "text"
    for row, reason in (
        ({"text": "a"}, "look like format text .* method cpt, .*method is sft"),
        ({"question": "a?", "answer": "4"}, r"columns \(question, answer\) .* prepare.columns"),
    ):
        assert detect([row], "sft") is None
        assert re.search(reason, str(unknown_format([row], "sft")))
    with pytest.raises(DataError, match="format preference is for method dpo"):
        check_names("preference", {}, "sft")
    with pytest.raises(DataError, match="maps 'answer', which is not a column that tuneline reads"):
        check_names("auto", {"answer": "completion"}, "sft")
    with pytest.raises(DataError, match="maps prompt and completion to the same column 'text'"):
        check_names("auto", {"prompt": "text", "completion": "text"}, "sft")


def test_rename_takes_over_the_name() -> None:
    row = {"question": "a?", "answer": "4", "prompt": "old", "id": 7}
    reading = Reading(columns={"prompt": "question", "completion": "answer"})
    assert rename(row, reading) == {"prompt": "a?", "completion": "4", "id": 7}
    assert reading.unused == {"prompt"}
