"""Messages: roles, contents, reasoning, what is learnt, and how lists of them are written."""

import json

import numpy
import pytest

from tuneline.prepare.formats.example import BadRowError, Example
from tuneline.prepare.formats.reading import Reading
from tuneline.prepare.formats.table import detect, read_row

USER = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}


def read(row: dict, method: str = "sft", **options) -> tuple[Example, set[str]]:
    """Return the example and the names of what the row has unused."""
    reading = Reading(**options)
    return read_row(row, detect([row], method) or "", reading), reading.unused


@pytest.mark.parametrize(
    ("given", "role"),
    [
        ("User", "user"),
        (" HUMAN ", "user"),
        ("prompter", "user"),
        ("developer", "system"),
        ("Assistant", "assistant"),
        ("GPT", "assistant"),
        ("model", "assistant"),
        ("bot", "assistant"),
        ("ipython", "tool"),
        ("Observation", "tool"),
    ],
)
def test_roles_have_one_name(given: str, role: str) -> None:
    lists = {
        "system": [{"role": given, "content": "x"}, USER, ANSWER],
        "user": [{"role": given, "content": "x"}, ANSWER],
        "assistant": [USER, {"role": given, "content": "x"}],
        "tool": [USER, ANSWER | {"content": "f(2)"}, {"role": given, "content": "x"}, ANSWER],
    }
    example, _ = read({"messages": lists[role]})
    assert {"role": role, "content": "x"} in (example.messages or [])


@pytest.mark.parametrize(
    "answer",
    ["\U0001f60a", "+", "...", "?", "-", "{}", "\u3002", "\u0664", "\u221e", "\u00bd", "_"],
)
def test_answers_of_symbols_are_answers(answer: str) -> None:
    assert read({"prompt": "a?", "completion": answer})[0].messages[1]["content"] == answer
    assert read({"instruction": answer, "output": answer})[0].messages[0]["content"] == answer
    assert read({"text": answer}, "cpt")[0].text == answer
    pair = {"prompt": "a?", "chosen": answer, "rejected": "5"}
    assert read(pair, "dpo")[0].preference[1]["content"] == answer


@pytest.mark.parametrize("answer", ["", " \n\t", "\u3000", "\u200b", "\ufeff\u200d", "\x00"])
def test_invisible_answers_are_empty(answer: str) -> None:
    with pytest.raises(BadRowError, match="completion is empty"):
        read({"prompt": "a?", "completion": answer})
    with pytest.raises(BadRowError, match="the answer is empty"):
        read({"messages": [USER, ANSWER | {"content": answer}]})


@pytest.mark.parametrize(
    "written",
    [
        list,
        tuple,
        json.dumps,
        lambda messages: numpy.array(messages, dtype=object),
        lambda messages: json.dumps(messages, indent=2),
        # `datasets` reads a sequence of objects as an object of lists.
        lambda messages: {key: [message[key] for message in messages] for key in messages[0]},
    ],
)
def test_a_list_of_messages_is_read_however_it_is_written(written) -> None:
    messages = [USER, ANSWER]
    assert read({"messages": written(messages)})[0].messages == messages
    split = {"prompt": written([USER]), "completion": written([ANSWER])}
    assert read(split)[0].messages == messages
    pair = {"chosen": written(messages), "rejected": written([USER, ANSWER | {"content": "5"}])}
    expected = ([USER], ANSWER, ANSWER | {"content": "5"})
    assert read(pair, "dpo")[0].preference == expected


def test_text_that_looks_like_messages_stays_text_beside_text() -> None:
    listed = json.dumps([USER])
    example, _ = read({"prompt": "Write a list of messages.", "completion": listed})
    assert example.messages[1]["content"] == listed
    example, _ = read({"prompt": listed, "completion": "4"})
    assert example.messages[0]["content"] == listed


def test_nulls_and_columns_of_other_messages_are_no_values() -> None:
    padding = {"name": None, "tool_calls": None, "weight": None, "images": [], "reasoning": None}
    padding |= {"function_call": {"name": None, "arguments": None}}
    row = {"messages": [USER | padding, ANSWER | padding], "tools": None, "choices": None}
    example, unused = read(row)
    assert (example, unused) == (Example(messages=[USER, ANSWER]), set())


def test_parts_of_text_and_thinking_are_joined() -> None:
    parts = [
        {"type": "thinking", "thinking": "Two and two."},
        {"type": "text", "text": "4", "image_url": None},
        {"type": "output_text", "text": "!", "annotations": [1]},
    ]
    example, unused = read({"messages": [USER, ANSWER | {"content": parts}]})
    assert example.messages[1] == ANSWER | {"content": "4!", "reasoning": "Two and two."}
    assert unused == {"messages[].content[].annotations"}


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_three_names(key: str) -> None:
    expected = ANSWER | {"reasoning": "Two and two."}
    thinks = {key: "Two and two."}
    assert read({"messages": [USER, ANSWER | thinks]})[0].messages[1] == expected
    assert read({"prompt": "2 + 2?", "completion": "4", **thinks})[0].messages[1] == expected
    lists = {"prompt": [USER], "completion": [ANSWER], **thinks}
    assert read(lists)[0].messages[1] == expected
    pair = {"prompt": [USER], "chosen": [ANSWER | thinks], "rejected": [ANSWER]}
    assert read(pair, "dpo")[0].preference == ([USER], expected, ANSWER)
    assert read({"messages": [USER | thinks, ANSWER]})[1] == {f"messages[].{key}"}
    assert "reasoning" not in read({"messages": [USER, ANSWER | {key: " "}]})[0].messages[1]


def test_reasoning_that_is_unclear_is_refused() -> None:
    twice = ANSWER | {"reasoning": "a b", "thinking": "a b"}
    assert read({"messages": [USER, twice]})[0].messages[1]["reasoning"] == "a b"
    with pytest.raises(BadRowError, match="two reasonings that differ"):
        read({"messages": [USER, twice | {"thinking": "c"}]})
    with pytest.raises(BadRowError, match="reasoning is an object, not text"):
        read({"messages": [USER, ANSWER | {"reasoning": {"effort": "low"}}]})
    with pytest.raises(BadRowError, match="the reasoning is not valid Unicode"):
        read({"messages": [USER, ANSWER | {"reasoning": "\ud800"}]})


def test_a_word_in_a_column_is_no_reasoning() -> None:
    example, unused = read({"prompt": "2 + 2?", "completion": "4", "reasoning": "on"})
    assert (example.messages, unused) == ([USER, ANSWER], {"reasoning"})


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss", "trainable"])
@pytest.mark.parametrize(
    ("value", "is_learnt"),
    [(0, False), (False, False), (0.0, False), ("false", False), (1, True), (True, True)],
)
def test_a_message_says_whether_it_is_learnt(key, value, is_learnt) -> None:
    row = {"messages": [USER, ANSWER | {key: value}, USER, ANSWER], "system": "Count."}
    example, unused = read(row)
    assert example.not_learnt == (frozenset() if is_learnt else {2})
    assert example.messages[1:] == [USER, ANSWER, USER, ANSWER]
    assert unused == set()


def test_masks_say_the_opposite_of_weights() -> None:
    row = {"messages": [USER, ANSWER | {"mask": True}, USER, ANSWER | {"mask": False}]}
    assert read(row)[0].not_learnt == {1}


def test_weights_of_questions() -> None:
    for value, unused in ((0, set()), (1, {"messages[].weight (not an answer)"})):
        assert read({"messages": [USER | {"weight": value}, ANSWER]})[1] == unused


def test_slim_orca_weights() -> None:
    turns = [
        {"from": "system", "value": "Be brief.", "weight": None},
        {"from": "human", "value": "2 + 2?", "weight": 0.0},
        {"from": "gpt", "value": "4", "weight": 1.0},
    ]
    example, unused = read({"conversations": turns})
    assert (example.not_learnt, unused) == (frozenset(), set())


def test_weights_that_cannot_be_honoured_are_refused() -> None:
    reason = r"has the weight 0.5: .*name messages\[\].weight in prepare.ignore_columns"
    row = {"messages": [USER, ANSWER | {"weight": 0.5}]}
    with pytest.raises(BadRowError, match=reason):
        read(row)
    assert read(row, ignored=frozenset({"messages[].weight"}))[0].not_learnt == frozenset()
    with pytest.raises(BadRowError, match="every answer is excluded from the loss"):
        read({"messages": [USER, ANSWER | {"weight": 0}]})
    with pytest.raises(BadRowError, match="every answer is excluded"):
        read({"prompt": [USER], "completion": [ANSWER | {"train": False}]})


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([USER, {"role": "assistant", "content": None}], "has no content; its keys are role, con"),
        ([USER, {"role": "assistant", "text": "4"}], "has no content; its keys are role, text"),
        ([USER, ANSWER | {"content": 4}], "the content is a number, not text"),
        ([USER, ANSWER | {"content": {"text": "4"}}], "the content is an object, not text"),
        ([USER, ANSWER | {"content": [[USER]]}], "a part that is not text .type a list"),
        (
            [USER | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER],
            r"messages 1 \(user\) has a part that is not text .type image_url.: .* text only",
        ),
        (
            [USER | {"content": [{"type": "input_audio", "input_audio": {}}]}, ANSWER],
            "type input_audio",
        ),
        ([[USER, ANSWER]], "messages 1 is a list, not a message"),
        ([USER | {"role": 0}, ANSWER], "has the role 0; known roles are system"),
        (
            [{"author": "customer", "body": "a?"}],
            "messages 1 has no role: its keys are author, body, but a message has role and content",
        ),
        ([USER | {"images": ["a.png"]}, ANSWER], r"messages\[\].images .a list. .* text only"),
        (
            [USER, ANSWER | {"train_detail": [{"begin_offset": 0}]}],
            r"train_detail .*not parts of one.*prepare.ignore_columns",
        ),
        (json.dumps([USER])[:-1], "messages is not JSON: Expecting"),
        ("[{'role': 'user', 'content': 'a?'}]", "messages is not JSON.*write it with json.dumps"),
        ("a?", "messages is text, not a list of messages; write lists .* json.dumps"),
        ('[{"role": "user", "role": "x", "content": "a"}]', "messages has the key 'role' twice"),
        ("[" + '{"role":' * 100000, "nested too deeply"),
        ({"role": ["user"], "content": []}, "messages is an object, not a list"),
    ],
)
def test_bad_messages_say_why(messages, reason) -> None:
    with pytest.raises(BadRowError, match=reason):
        read({"messages": messages})


def test_earlier_turns_beside_a_prompt() -> None:
    row = {"prompt": "d?", "completion": "e", "history": [["a?", "b"]]}
    contents = [message["content"] for message in read(row)[0].messages]
    assert contents == ["a?", "b", "d?", "e"]


@pytest.mark.parametrize(
    ("history", "reason"),
    [
        ([["a?"]], "history 1 is a list, not a pair"),
        ([["a?", "b"], ["c?", 4]], "history 2 is a list, not a pair"),
        ([{"user": "a?"}], "history 1 is an object, not a pair"),
        ("a?", "history is not JSON"),
        (7, "history 1 is a number"),
        ([["a?", ""]], "the answer is empty"),
    ],
)
def test_bad_histories_say_why(history, reason) -> None:
    with pytest.raises(BadRowError, match=reason):
        read({"instruction": "d?", "output": "e", "history": history})


def test_the_prompt_of_a_pair_is_taken_from_one_place() -> None:
    lists = {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER | {"content": "5"}]}
    assert read(lists | {"prompt": USER["content"]}, "dpo")[1] == set()
    other = read(lists | {"prompt": "Another?"}, "dpo")
    assert other[0].preference[0] == [USER]
    assert other[1] == {"prompt (the answers begin with another prompt)"}
    system = {"role": "system", "content": "Count."}
    texts = {"chosen": [system, ANSWER], "rejected": [system, ANSWER | {"content": "5"}]}
    example, _ = read(texts | {"prompt": "2 + 2?"}, "dpo")
    assert example.preference[0] == [system, USER]
    with pytest.raises(BadRowError, match="prompt is missing"):
        read({"chosen": "4", "rejected": "5"}, "dpo")


def test_pairs_of_calls_and_of_reasoning() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    chosen = {"role": "assistant", "content": None, "tool_calls": [call]}
    tools = [{"type": "function", "function": {"name": "add"}}]
    row = {"prompt": [USER], "chosen": [chosen], "rejected": [ANSWER], "tools": json.dumps(tools)}
    example, unused = read(row, "dpo")
    assert example.preference == ([USER], chosen | {"content": ""}, ANSWER)
    assert (example.tools, unused) == (tools, set())
    with pytest.raises(BadRowError, match="chosen and rejected are the same"):
        read(row | {"rejected": [chosen]}, "dpo")
    thinks = read(row | {"chosen": [ANSWER | {"reasoning": "a b"}]}, "dpo")[0]
    assert thinks.preference[1] == ANSWER | {"reasoning": "a b"}


def test_another_system_message_is_named() -> None:
    own = {"role": "system", "content": "Be kind."}
    row = {"messages": [own, USER, ANSWER], "system": "Be brief."}
    reason = "system (the messages begin with another system message)"
    assert read(row)[1] == {reason}
    assert read(row | {"system": "Be kind."})[1] == set()
