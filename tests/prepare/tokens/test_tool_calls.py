"""Tools, calls and results in the form that a template needs, and rows that it cannot write."""

import json
import re
from typing import Any

import pytest
from template_families import BUSAN, FORMATS, RESULTS, SEOUL, TEMPLATES, TOOLS, answer, user

from tuneline.prepare.formats.example import BadRowError, Example
from tuneline.prepare.tokens.render import Renderer
from tuneline.prepare.tokens.tokenise import tokenise

# As the templates of Mistral: tools before the last question, identifiers of nine letters or
# digits, and a call or a content but not both.
MISTRAL = (
    "{{- bos_token }}{%- set ns = namespace(last=0) %}"
    "{%- for m in messages if m.role == 'user' %}{%- set ns.last = loop.index %}{%- endfor %}"
    "{%- set ns.seen = 0 %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.seen = ns.seen + 1 %}"
    "{%- if tools and ns.seen == ns.last %}"
    "{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}"
    "{{- '[INST]' + m.content + '[/INST]' }}"
    "{%- elif m.tool_calls %}{{- '[TOOL_CALLS][' }}{%- for c in m.tool_calls %}"
    "{%- if c.id | length != 9 %}"
    "{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}"
    "{%- endif %}{{- c.function | tojson | replace('}', '', 0) }}{{- ', ' + c.id }}"
    "{%- endfor %}{{- ']' + eos_token }}"
    "{%- elif m.role == 'assistant' %}{{- ' ' + m.content + eos_token }}"
    "{%- elif m.role == 'tool' %}"
    "{%- if m.tool_call_id | length != 9 %}"
    "{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}"
    "{%- endif %}"
    "{{- '[TOOL_RESULTS]' + m.content + ', ' + m.tool_call_id + '[/TOOL_RESULTS]' }}"
    "{%- endif %}{%- endfor %}"
)


def renderer(tokenizer: Any, name: str, **settings: Any) -> Renderer:
    text = MISTRAL if name == "mistral" else (TEMPLATES / f"{name}.jinja").read_text("utf-8")
    tokenizer.chat_template = text
    return Renderer(tokenizer, **settings)


def learnt(used: Renderer, example: Example) -> list[list[str]]:
    pieces = used.render(example).pieces or []
    return [[piece.text[part.start : part.end] for part in piece.answers] for piece in pieces]


def test_calls_are_learnt_and_results_are_not(marked: Any) -> None:
    used = renderer(marked, "qwen2_5")
    example = FORMATS["parallel"]
    (piece,) = used.render(example).pieces or []
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "%s"}}\n</tool_call>'
    calls = call % "Busan" + "\n" + call % "Seoul"
    assert learnt(used, example) == [[calls + "<|im_end|>", "18 and 12.<|im_end|>"]]
    results = "\n<tool_response>\n18 C\n</tool_response>\n<tool_response>\n12 C\n</tool_response>"
    assert results in piece.text[piece.answers[0].end : piece.answers[1].start]
    assert json.dumps(TOOLS[0]) in piece.text[: piece.answers[0].start]


def test_identifiers_of_mistral(marked: Any) -> None:
    used = renderer(marked, "mistral")
    ((first, second),) = learnt(used, FORMATS["tools"])
    assert "call00001" in first and second.strip().startswith("18 degrees.")
    # An identifier that the template refuses is replaced, in the call and in its result.
    messages = [
        user("Both?"),
        answer("", tool_calls=[{**BUSAN, "id": "chatcmpl-tool-1"}, {**SEOUL, "id": "2"}]),
        {"role": "tool", "tool_call_id": "2", "content": "12 C"},
        {"role": "tool", "tool_call_id": "chatcmpl-tool-1", "content": "18 C"},
        answer("18 and 12."),
    ]
    (piece,) = used.render(Example(messages, tools=TOOLS)).pieces or []
    busan, seoul = re.findall(r'"(?:Busan|Seoul)"}}, ([a-z0-9]{9})', piece.text)
    assert busan != seoul
    assert f"12 C, {seoul}" in piece.text and f"18 C, {busan}" in piece.text
    # Without identifiers, results belong to the calls in their order.
    calls = [{key: value for key, value in call.items() if key != "id"} for call in (BUSAN, SEOUL)]
    messages[1] = answer("", tool_calls=calls)
    messages[2:4] = [{"role": "tool", "content": "18 C"}, {"role": "tool", "content": "12 C"}]
    (piece,) = used.render(Example(messages, tools=TOOLS)).pieces or []
    busan, seoul = re.findall(r'"(?:Busan|Seoul)"}}, ([a-z0-9]{9})', piece.text)
    assert f"18 C, {busan}" in piece.text and f"12 C, {seoul}" in piece.text
    # The template writes a call or a content: what it leaves out is not lost without a word.
    messages[1] = answer("Let me look.", tool_calls=calls)
    with pytest.raises(BadRowError, match="leaves out the text that stands beside a call"):
        used.render(Example(messages, tools=TOOLS))


def test_arguments_as_the_template_needs_them(marked: Any) -> None:
    # DeepSeek's template joins texts: an object would fail, and its Python notation would be wrong.
    example = Example([user("Busan?"), answer("", tool_calls=[BUSAN]), RESULTS[0], answer("18.")])
    (call,), _ = learnt(renderer(marked, "deepseekv3"), example)
    assert '```json\n{"city": "Busan"}\n```' in call
    # A template that writes the arguments as they are would write {'city': 'Busan'}.
    marked.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments }}"
        "{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    ((call, _),) = learnt(Renderer(marked), example)
    assert call == 'get_weather{"city": "Busan"}<|im_end|>'


@pytest.mark.parametrize(
    ("name", "example", "reason"),
    [
        ("gemma3", "tools", "defines tools, but the chat template knows no tools"),
        ("llama3_1", "parallel", "calls 2 tools at once, but the chat template writes one"),
        ("gptoss", "parallel", "calls 2 tools at once, but the chat template writes one"),
        ("lfm2", "tools", "calls a tool, but the chat template writes no tool calls"),
    ],
)
def test_rows_that_a_template_cannot_write(
    marked: Any, name: str, example: str, reason: str
) -> None:
    with pytest.raises(BadRowError, match=reason):
        renderer(marked, name).render(FORMATS[example])


def test_definitions_get_the_keys_that_a_template_reads(marked: Any) -> None:
    bare = [{"type": "function", "function": {"name": "get_weather"}}]
    example = Example(FORMATS["tools"].messages, tools=bare)
    (piece,) = renderer(marked, "gptoss").render(example).pieces or []
    assert "type get_weather = () => any;" in piece.text
    (piece,) = renderer(marked, "qwen2_5").render(example).pieces or []
    assert json.dumps(bare[0]) in piece.text


def test_tools_use_the_template_for_tools(marked: Any) -> None:
    text = (TEMPLATES / "qwen2_5.jinja").read_text("utf-8")
    marked.chat_template = {"default": text.replace("# Tools", "# None"), "tool_use": text}
    used = Renderer(marked)
    (piece,) = used.render(FORMATS["tools"]).pieces or []
    assert "# Tools" in piece.text
    assert used.end_of_turn == "<|im_end|>"


def test_loss_on_all_refuses_what_is_not_to_be_learnt(marked: Any) -> None:
    used = renderer(marked, "qwen2_5", loss_on="all")
    with pytest.raises(BadRowError, match="results of tools, which a model must not learn"):
        used.render(FORMATS["tools"])
    turns = FORMATS["turns"].messages
    with pytest.raises(BadRowError, match="excludes an answer from the loss, but prepare.loss_on"):
        used.render(Example(turns, not_learnt=frozenset({1})))


def test_answers_that_are_not_learnt(marked: Any) -> None:
    example = Example(FORMATS["turns"].messages, not_learnt=frozenset({1}))
    used = renderer(marked, "qwen2_5")
    (row,) = tokenise(marked, [used.render(example)], loss_on="answers")
    mask = row.loss_mask
    text = marked.decode([token for token, bit in zip(row.input_ids, mask, strict=True) if bit])
    assert text == "Second.<|im_end|>"
    assert "First.<|im_end|>" in marked.decode(row.input_ids)
    # An answer after the last learnt one teaches nothing, so the row ends before it.
    example = Example(FORMATS["turns"].messages, not_learnt=frozenset({3}))
    assert used.render(example).heldout_row()["answer"].strip() == "First."
    assert "Second." not in (used.render(example).pieces or [])[0].text


def test_text_that_a_template_changes_is_refused(marked: Any) -> None:
    used = renderer(marked, "qwen3")
    with pytest.raises(BadRowError, match="changes the text of an answer, e.g. because it contai"):
        used.render(Example([user("Tag?"), answer("Write </think>, then go on.")]))
    marked.chat_template = (
        "{% for m in messages %}{% if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{{ m.content | replace('bad', '***') + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    used = Renderer(marked)
    system = {"role": "system", "content": "Be brief."}
    for messages, reason in (
        ([user("A bad one?"), answer("Yes.")], "changes or leaves out the text of a user message"),
        ([user("One?"), answer("Not bad.")], "changes the text of an answer"),
        ([system, user("One?"), answer("Yes.")], "leaves out the system message"),
    ):
        with pytest.raises(BadRowError, match=reason):
            used.render(Example(messages))
