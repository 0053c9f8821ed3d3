"""Properties of reading: no row and no key vanishes, and reading twice changes nothing."""

import json
import string
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tuneline.prepare.formats.example import BadRowError
from tuneline.prepare.formats.reading import Reading
from tuneline.prepare.formats.table import FORMATS, read_row

# Unused keys begin with x_, so that none is a key with a meaning.
NAMES = st.text(string.ascii_lowercase, min_size=1, max_size=4).map("x_".__add__)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
VALUES = st.sampled_from([0, False, 1.5, "text", ["a"], {"a": {}}])
EXTRA = st.dictionaries(NAMES, VALUES, max_size=3)
CONTENTS = st.text(min_size=1, max_size=20) | st.sampled_from(
    ["4", "+", "\U0001f60a", "", " ", "\ud800"]
)


@st.composite
def conversations(draw) -> list[dict]:
    """Messages that may be in any order, with keys that nothing reads."""
    roles = st.sampled_from(["system", "user", "User", "assistant", "gpt", "tool"])
    ordered = st.sampled_from([["user", "assistant"], ["system", "user", "assistant"]])
    chosen = draw(ordered | st.lists(roles, min_size=1, max_size=4))
    return [{"role": role, "content": draw(CONTENTS), **draw(EXTRA)} for role in chosen]


def read(row: dict, format: str) -> tuple[object, set[str]]:
    reading = Reading()
    try:
        return read_row(row, format, reading), reading.unused
    except BadRowError as reason:
        assert str(reason)
        return None, set()


@given(st.lists(st.tuples(conversations(), EXTRA), min_size=1, max_size=5))
def test_rows_are_used_or_refused_and_their_keys_named(rows) -> None:
    counted: Counter[str] = Counter()
    expected: Counter[str] = Counter()
    num_used = num_refused = 0
    for messages, extra in rows:
        example, unused = read({"messages": messages, **extra}, "messages")
        if example is None:
            num_refused += 1
            continue
        num_used += 1
        counted.update(unused)
        expected.update(extra.keys())
        keys = {key for message in messages for key in message if key.startswith("x_")}
        expected.update(f"messages[].{key}" for key in keys)
        assert [m["content"] for m in example.messages] == [m["content"] for m in messages]
    assert num_used + num_refused == len(rows)
    assert counted == expected


@given(conversations(), EXTRA)
def test_json_text_of_a_row_reads_like_the_row(messages, extra) -> None:
    row = {"messages": messages, **extra}
    for same in (
        row | {"messages": json.dumps(messages)},
        row | {"messages": tuple(messages)},
        json.loads(json.dumps(row)),
    ):
        assert read(same, "messages") == read(row, "messages")


@given(conversations())
def test_what_was_read_reads_the_same_again(messages) -> None:
    example, _ = read({"messages": messages}, "messages")
    if example is not None:
        again, unused = read({"messages": example.messages}, "messages")
        assert (again, unused) == (example, set())


@given(
    st.sampled_from(sorted(FORMATS)),
    st.dictionaries(
        st.sampled_from(sorted({name for entry in FORMATS.values() for name in entry.known}))
        | st.sampled_from(["label", "weight", "images"]),
        JSON
        | st.lists(
            st.dictionaries(
                st.sampled_from(
                    ["role", "from", "content", "value", "tool_calls", "weight", "thinking", "name"]
                ),
                st.sampled_from(["user", "assistant", "tool", "function_call", "<think>"]) | JSON,
            ),
            max_size=3,
        ),
    ),
)
def test_any_json_is_read_or_refused_with_a_reason(format, row) -> None:
    read(row, format)


@given(st.dictionaries(st.text(max_size=3), JSON, max_size=3))
def test_arguments_read_alike_as_object_and_as_json_text(arguments) -> None:
    def call(value):
        message = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": value}]}
        return read({"messages": [{"role": "user", "content": "a?"}, message]}, "messages")

    assert call(arguments) == call(json.dumps(arguments))
