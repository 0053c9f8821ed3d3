"""Rows in the shapes that other projects document pass unchanged; nothing of them is lost."""

import json

from tuneline.prepare.formats.example import Example
from tuneline.prepare.formats.reading import Reading
from tuneline.prepare.formats.table import detect, read_row

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
ASKS = {"role": "user", "content": "Weather in Busan?"}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Busan"}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RETURNS = {"role": "tool", "content": '{"celsius": 18}'}
ANSWERS = {"role": "assistant", "content": "18 degrees."}
WHOLE = [ASKS, CALLS, RETURNS, ANSWERS]


def read(row: dict, format: str, method: str = "sft", **options) -> tuple[Example, set[str]]:
    """Return the example and the names of what the row has unused."""
    reading = Reading(**options)
    assert detect([row], method) == format
    return read_row(row, format, reading), reading.unused


def test_openai_fine_tuning_with_tools_and_weights() -> None:
    row = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            ASKS | {"name": "kim"},
            {
                "role": "assistant",
                "content": None,
                "refusal": None,
                "weight": 0,
                "tool_calls": [
                    {
                        "id": "c1",
                        "type": "function",
                        "function": {"name": "get_weather", "arguments": '{"city": "Busan"}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": '{"celsius": 18}'},
            {"role": "assistant", "content": "18 degrees.", "weight": 1},
        ],
        "tools": [WEATHER],
        "parallel_tool_calls": False,
    }
    example, unused = read(row, "messages")
    assert example.messages == [
        {"role": "system", "content": "Be brief."},
        ASKS,
        CALLS | {"tool_calls": [{"id": "c1", **CALL}]},
        RETURNS | {"tool_call_id": "c1"},
        ANSWERS,
    ]
    assert example.tools == [WEATHER]
    assert example.not_learnt == {2}
    assert unused == {"parallel_tool_calls", "messages[].name"}


def test_openai_functions_of_2023() -> None:
    row = {
        "messages": [
            ASKS,
            {
                "role": "assistant",
                "content": None,
                "function_call": {"name": "get_weather", "arguments": '{"city": "Busan"}'},
            },
            {"role": "function", "name": "get_weather", "content": '{"celsius": 18}'},
            ANSWERS,
        ],
        "functions": [WEATHER["function"]],
    }
    example, unused = read(row, "messages")
    assert example.messages == [ASKS, CALLS, RETURNS | {"name": "get_weather"}, ANSWERS]
    assert (example.tools, unused) == ([WEATHER], set())


def test_axolotl_messages_and_conversations_with_train() -> None:
    shared = [
        {"from": "system", "value": "Be brief.", "train": False},
        {"from": "human", "value": "Hi?", "train": False},
        {"from": "gpt", "value": "Wrong one.", "train": False},
        {"from": "human", "value": "Again?", "train": False},
        {"from": "gpt", "value": "Right one.", "train": True},
    ]
    example, unused = read({"conversations": shared}, "sharegpt")
    assert [message["content"] for message in example.messages or []] == [
        "Be brief.",
        "Hi?",
        "Wrong one.",
        "Again?",
        "Right one.",
    ]
    assert (example.not_learnt, unused) == ({2}, set())
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    messages = [
        {"role": roles[turn["from"]], "content": turn["value"], "training": turn["train"]}
        for turn in shared
    ]
    assert read({"messages": messages}, "messages") == (example, set())


def test_llama_factory_sharegpt_with_calls_and_observations() -> None:
    definitions = json.dumps([WEATHER["function"]])
    row = {
        "conversations": [
            {"from": "human", "value": "Weather in Busan?"},
            {
                "from": "function_call",
                "value": '{"name": "get_weather", "arguments": {"city": "Busan"}}',
            },
            {"from": "observation", "value": '{"celsius": 18}'},
            {"from": "gpt", "value": "18 degrees."},
        ],
        "system": "",
        "tools": definitions,
    }
    example, unused = read(row, "sharegpt")
    assert (example.messages, example.tools, unused) == (WHOLE, [WEATHER], set())
    several = {"name": "get_weather", "arguments": {"city": "Seoul"}}
    one = json.loads(row["conversations"][1]["value"])
    row["conversations"][1]["value"] = json.dumps([one, several])
    row["tools"] = json.dumps([WEATHER])
    row["images"] = []
    example, unused = read(row, "sharegpt")
    assert example.messages is not None
    assert [call["function"] for call in example.messages[1]["tool_calls"]] == [one, several]
    assert (example.tools, unused) == ([WEATHER], set())


def test_llama_factory_alpaca_with_history() -> None:
    row = {
        "instruction": "And times two?",
        "input": "",
        "output": "8",
        "system": "Count.",
        "history": [["2 + 2?", "4"], ["Sure?", "Yes."]],
    }
    example, unused = read(row, "alpaca")
    assert [(message["role"], message["content"]) for message in example.messages or []] == [
        ("system", "Count."),
        ("user", "2 + 2?"),
        ("assistant", "4"),
        ("user", "Sure?"),
        ("assistant", "Yes."),
        ("user", "And times two?"),
        ("assistant", "8"),
    ]
    assert (example.not_learnt, unused) == (frozenset(), set())
    written = row | {"history": json.dumps(row["history"])}
    assert read(written, "alpaca") == (example, set())


def test_llama_factory_ranking() -> None:
    row = {
        "conversations": [{"from": "human", "value": "Weather in Busan?"}],
        "chosen": {"from": "gpt", "value": "18 degrees."},
        "rejected": {"from": "gpt", "value": "No idea."},
    }
    example, unused = read(row, "preference", "dpo")
    assert example.preference == ([ASKS], ANSWERS, ANSWERS | {"content": "No idea."})
    assert unused == set()
    row = {"instruction": "Weather in", "input": "Busan?", "chosen": "a", "rejected": "b"}
    example, unused = read(row, "preference", "dpo", input_heading=" ")
    assert example.preference is not None and example.preference[0] == [ASKS]


def test_hermes_function_calling() -> None:
    call = '<tool_call>\n{"arguments": {"city": "Busan"}, "name": "get_weather"}\n</tool_call>'
    system = f"You call functions. <tools> {json.dumps([WEATHER])} </tools> Answer in XML."
    row = {
        "id": "8c8a",
        "conversations": [
            {"from": "system", "value": system},
            {"from": "human", "value": "Weather in Busan?"},
            {"from": "gpt", "value": call},
            {
                "from": "tool",
                "value": '<tool_response>\n{"celsius": 18}\n</tool_response>\n'
                '<tool_response>\n{"celsius": 17}\n</tool_response>\n',
            },
            {"from": "gpt", "value": "18 degrees."},
        ],
        "tools": json.dumps([WEATHER]),
        "category": "Weather",
        "subcategory": "Forecast",
        "task": "Get the weather",
    }
    example, unused = read(row, "sharegpt")
    assert example.messages == [
        {"role": "system", "content": system},
        ASKS,
        {"role": "assistant", "content": call},
        RETURNS,
        RETURNS | {"content": '{"celsius": 17}'},
        ANSWERS,
    ]
    assert example.tools is None
    assert unused == {
        "id",
        "category",
        "subcategory",
        "task",
        "tools (the system message contains the definitions)",
    }
    # Without a system message that lists the tools, the template gets the definitions.
    row["conversations"][0]["value"] = "You call functions."
    assert read(row, "sharegpt")[0].tools == [WEATHER]


def test_ultrafeedback_in_both_spellings() -> None:
    chosen = [ASKS, ANSWERS]
    rejected = [ASKS, ANSWERS | {"content": "No idea."}]
    scores = {"score_chosen": 8.0, "score_rejected": 3.5}
    lists = {"chosen": chosen, "rejected": rejected, **scores}
    expected = ([ASKS], chosen[-1], rejected[-1])
    example, unused = read(lists, "preference", "dpo")
    assert (example.preference, unused) == (expected, set(scores))
    whole = {"prompt": ASKS["content"], "prompt_id": "f1", "messages": chosen, **lists}
    example, unused = read(whole, "preference", "dpo")
    assert (example.preference, unused) == (expected, {"messages", "prompt_id", *scores})
    example, unused = read(whole, "messages")
    assert example.messages == chosen
    assert unused == {"prompt", "chosen", "rejected", "prompt_id", *scores}


def test_koalpaca() -> None:
    row = {"instruction": "\uc548\ub155?", "output": "\ub124!", "url": "https://kin.example/1"}
    example, unused = read(row, "alpaca")
    assert [message["content"] for message in example.messages or []] == [
        "\uc548\ub155?",
        "\ub124!",
    ]
    assert unused == {"url"}


def test_ms_swift_calls_are_one_turn() -> None:
    call = json.dumps(CALL["function"])
    row = {
        "messages": [
            ASKS,
            {"role": "assistant", "content": "Let me look."},
            {"role": "tool_call", "content": call},
            {"role": "tool_call", "content": call},
            {"role": "tool_response", "content": '{"celsius": 18}'},
            {"role": "tool_response", "content": '{"celsius": 18}'},
            ANSWERS | {"loss": True},
        ],
        "tools": json.dumps([WEATHER]),
    }
    example, unused = read(row, "messages")
    both = {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL, CALL]}
    assert example.messages == [ASKS, both, RETURNS, RETURNS, ANSWERS]
    assert (example.not_learnt, unused) == (frozenset(), set())


def test_multilingual_thinking() -> None:
    row = {
        "reasoning_language": "French",
        "messages": [
            {"role": "system", "content": "reasoning language: French", "thinking": None},
            {"role": "user", "content": "2 + 2?", "thinking": None},
            {"role": "assistant", "content": "4", "thinking": "Deux et deux."},
        ],
        "analysis": "Deux et deux.",
        "final": "4",
    }
    example, unused = read(row, "messages")
    assert example.messages is not None
    assert example.messages[-1] == {
        "role": "assistant",
        "content": "4",
        "reasoning": "Deux et deux.",
    }
    assert unused == {"reasoning_language", "analysis", "final"}


def test_trl_prompt_completion_learns_the_completion_only() -> None:
    earlier = {"role": "assistant", "content": "In which city?"}
    asked = {"role": "user", "content": "Weather?"}
    row = {"prompt": [asked, earlier, ASKS], "completion": WHOLE[1:], "tools": [WEATHER]}
    example, unused = read(row, "prompt-completion")
    assert example.messages == [asked, earlier, *WHOLE]
    assert (example.not_learnt, example.tools, unused) == ({1}, [WEATHER], set())
