"""Definitions of tools, calls, what tools return, and the order of their messages."""

import json

import pytest

from tuneline.prepare.formats.example import BadRowError, Example
from tuneline.prepare.formats.reading import Reading
from tuneline.prepare.formats.table import read_row

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add numbers",
        "parameters": {"type": "object", "properties": {"a": {"type": "number", "default": None}}},
    },
}
USER = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RETURNS = {"role": "tool", "content": "4", "tool_call_id": "c1"}


def read(messages: list[dict], reading: Reading | None = None, **columns) -> Example:
    return read_row({"messages": messages, **columns}, "messages", reading or Reading())


@pytest.mark.parametrize(
    "tools",
    [
        [ADD],
        [ADD["function"]],
        [{"type": "function", **ADD["function"]}],
        json.dumps([ADD]),
        json.dumps([ADD["function"]]),
        [json.dumps(ADD)],
        ADD,
        json.dumps(ADD),
        [{**ADD, "function": {**ADD["function"], "strict": None}}],
        [
            {
                "type": "function",
                "function": ADD["function"]
                | {"parameters": json.dumps(ADD["function"]["parameters"])},
            }
        ],
    ],
)
def test_definitions_are_read_in_every_spelling(tools) -> None:
    assert read([USER, ANSWER], tools=tools).tools == [ADD]
    assert read([USER, ANSWER], functions=tools).tools == [ADD]


def test_definitions_keep_what_a_template_may_write() -> None:
    tool = {"type": "function", "cache": 1, "function": ADD["function"] | {"strict": True}}
    assert read([USER, ANSWER], tools=[tool]).tools == [tool]


@pytest.mark.parametrize("tools", [None, "", " ", [], "[]", {}, ()])
def test_no_definitions(tools) -> None:
    assert read([USER, ANSWER], tools=tools).tools is None


def test_nulls_that_fill_gaps_are_left_out() -> None:
    function = ADD["function"]
    padded = function["parameters"]["properties"] | {"city": None}
    tools = [
        {
            **ADD,
            "function": function | {"parameters": {**function["parameters"], "properties": padded}},
        }
    ]
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "add", "arguments": {"a": 2, "b": None}},
    }
    messages = [USER, CALLS | {"tool_calls": [call]}]
    written = read(messages, tools=tools)
    assert written.tools == [ADD]
    assert written.messages[1]["tool_calls"] == [call]
    filled = read(messages, Reading(nulls_are_padding=True), tools=tools)
    assert filled.tools[0]["function"]["parameters"]["properties"] == {"a": {"type": "number"}}
    assert filled.messages[1] == CALLS


def test_a_large_definition_is_read_alike() -> None:
    large = {**ADD, "function": ADD["function"] | {"description": "x" * (1 << 20)}}
    assert read([USER, ANSWER], tools=json.dumps([large])).tools == [large]
    assert read([USER, ANSWER], tools=[large]).tools == [large]


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("{", "tools is not JSON: Expecting"),
        ("a tool", "tools is not JSON"),
        ({"get_weather": {}}, "tools is an object, not a list of definitions"),
        (7, "tools is a number, not a list of definitions"),
        ([7], "tools 1 is a number, not the definition of a tool"),
        ([ADD, {"type": "function", "function": {}}], "tools 2 has no name"),
        ([{"type": "web_search"}], "tools 1 has the type 'web_search'"),
        ([{"name": "f", "parameters": []}], "the parameters of tools 1 are a list, not an object"),
        ('[{"name": "f", "name": "g"}]', "tools has the key 'name' twice"),
        ('[{"name": "f", "parameters": {"max": NaN}}]', "tools has the number NaN"),
        ([{"name": "f", "description": "\ud800"}], "tools is not valid Unicode"),
        ([{"name": "f", "description": b"x"}], "tools cannot be written as JSON"),
        ("[" * 100000, "nested too deeply"),
    ],
)
def test_bad_definitions_say_why(tools, reason) -> None:
    with pytest.raises(BadRowError, match=reason):
        read([USER, ANSWER], tools=tools)


@pytest.mark.parametrize(
    "calls",
    [
        [CALL],
        json.dumps([CALL]),
        CALL,
        [{"id": "c1", "name": "add", "arguments": {"a": 2}}],
        [{"id": "c1", "function": {"name": "add", "arguments": '{"a": 2}'}}],
        [{"id": "c1", "type": None, "name": "add", "parameters": {"a": 2}}],
        [json.dumps(CALL)],
    ],
)
def test_calls_are_read_in_every_spelling(calls) -> None:
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": calls}, RETURNS, ANSWER]
    assert read(messages).messages == [USER, CALLS, RETURNS, ANSWER]


@pytest.mark.parametrize("arguments", [None, "", " ", "{}", {}])
def test_a_call_without_arguments(arguments) -> None:
    call = {"name": "now", "arguments": arguments}
    example = read([USER, {"role": "assistant", "tool_calls": [call], "content": "Let me see."}])
    assert example.messages[1]["content"] == "Let me see."
    assert example.messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "now", "arguments": {}}}
    ]


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        (
            [{"name": "add", "arguments": "{a: 2}"}],
            "call of add: the text of the arguments is not J",
        ),
        ([{"name": "add", "arguments": "[2]"}], "call of add has a list as arguments, not an obj"),
        ([{"name": "add", "arguments": 2}], "call of add has a number as arguments"),
        ([{"name": "add", "arguments": '{"a": 1, "a": 2}'}], "has the key 'a' twice"),
        ([{"arguments": {}}], "a tool call has no name"),
        ([{"type": "custom", "custom": {}}], "a tool call has the type 'custom'"),
        ([7], "a tool call is a number"),
        (7, "the tool calls are a number, not a list"),
        ("add(2)", "the text of the tool call is not JSON"),
        ([{"name": "add", "arguments": {"a": "\ud800"}}], "is not valid Unicode"),
    ],
)
def test_bad_calls_say_why(calls, reason) -> None:
    with pytest.raises(BadRowError, match=rf"messages 2 \(assistant\).*{reason}"):
        read([USER, {"role": "assistant", "content": "", "tool_calls": calls}])


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([USER, CALLS, RETURNS], "the last message is from the tool: there is no answer"),
        ([USER, RETURNS, ANSWER], "a tool message follows no call of a tool"),
        ([USER, ANSWER, RETURNS, ANSWER], "a tool message follows no call of a tool"),
        ([USER, CALLS, USER, RETURNS, ANSWER], "a tool message follows no call of a tool"),
        (
            [USER, CALLS, RETURNS | {"tool_call_id": "c9"}, ANSWER],
            "answers the call 'c9', which no message makes",
        ),
        ([USER, CALLS | {"tool_calls": []}], "the answer is empty"),
        ([USER | {"tool_calls": [CALL]}, ANSWER, RETURNS, ANSWER], "follows no call"),
        ([{"from": "human", "value": "a"}, {"from": "function_call", "value": "x"}], "not JSON"),
        ([{"from": "human", "value": "a"}, {"from": "function_call", "value": ""}], "no content"),
    ],
)
def test_messages_of_tools_follow_calls(messages, reason) -> None:
    with pytest.raises(BadRowError, match=reason):
        read(messages)


def test_a_conversation_may_end_with_a_call() -> None:
    assert read([USER, CALLS], tools=[ADD]).messages == [USER, CALLS]
    several = [USER, CALLS, RETURNS, CALLS, RETURNS, RETURNS, ANSWER]
    assert read(several).messages == several


def test_what_a_tool_returns_may_be_an_object_or_empty() -> None:
    for content, text in (({"sum": 4}, '{"sum": 4}'), ([1, 2], "[1, 2]"), ("", ""), ([], "[]")):
        example = read([USER, CALLS, RETURNS | {"content": content}, ANSWER])
        assert example.messages[2] == RETURNS | {"content": text}
    parts = [{"type": "text", "text": "4"}]
    assert read([USER, CALLS, RETURNS | {"content": parts}, ANSWER]).messages[2] == RETURNS


def test_reasoning_before_a_call_written_as_json() -> None:
    value = '<think>\nAdd.\n</think>\n\n{"name": "add", "arguments": {"a": 2}}'
    turns = [{"from": "human", "value": "2 + 2?"}, {"from": "function_call", "value": value}]
    example = read(turns)
    call = {key: CALL[key] for key in ("type", "function")}
    assert example.messages[1] == CALLS | {
        "content": "<think>\nAdd.\n</think>",
        "tool_calls": [call],
    }


def test_keys_of_calls_that_are_not_used_are_named() -> None:
    reading = Reading()
    read([USER, CALLS | {"tool_calls": [CALL | {"index": 0}]}], reading)
    assert reading.unused == {"messages[].tool_calls[].index"}
    read([USER | {"tool_calls": [CALL]}, ANSWER], reading)
    assert reading.unused == {"messages[].tool_calls"}
    read([USER, ANSWER], reading, tools=[ADD], functions=[ADD["function"]])
    assert reading.unused == {"functions (tools is used)"}


def test_definitions_in_the_system_message_are_not_written_twice() -> None:
    for text in ("Use <tools> ... </tools>.", 'Functions: {"name": "add", "parameters": {}}'):
        reading = Reading()
        example = read([{"role": "system", "content": text}, USER, ANSWER], reading, tools=[ADD])
        assert example.tools is None
        assert reading.unused == {"tools (the system message contains the definitions)"}
    mentioned = [{"role": "system", "content": 'For sums, call "add".'}, USER, ANSWER]
    assert read(mentioned, tools=[ADD]).tools == [ADD]
