"""Chat templates of model families, and conversations in every format, for the tests of masks."""

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trl

from tuneline.prepare.formats.example import Example, Message

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
EMPTY_THINK = "<think>\n\n</think>\n\n"


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def answer(content: str, **keys: Any) -> Message:
    return {"role": "assistant", "content": content, **keys}


def call(identifier: str, **arguments: Any) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": arguments}
    return {"id": identifier, "type": "function", "function": function}


def result(identifier: str, content: str) -> Message:
    return {"role": "tool", "tool_call_id": identifier, "content": content}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Name"}},
                "required": ["city"],
            },
        },
    }
]

BUSAN, SEOUL = call("call00001", city="Busan"), call("call00002", city="Seoul")
RESULTS = [result("call00001", "18 C"), result("call00002", "12 C")]

FORMATS = {
    "plain": Example([user("2+2?"), answer("It is 4.")]),
    "turns": Example([user("One?"), answer("First."), user("Two?"), answer("Second.")]),
    "system": Example(
        [{"role": "system", "content": "Be brief."}, user("2+2?"), answer("It is 4.")]
    ),
    "tools": Example(
        [user("Busan?"), answer("", tool_calls=[BUSAN]), RESULTS[0], answer("18 degrees.")],
        tools=TOOLS,
    ),
    "parallel": Example(
        [user("Both?"), answer("", tool_calls=[BUSAN, SEOUL]), *RESULTS, answer("18 and 12.")],
        tools=TOOLS,
    ),
    "reasoning": Example(
        [
            user("One?"),
            answer("First.", reasoning="Thought of one."),
            user("Two?"),
            answer("Second.", reasoning="Thought of two."),
        ]
    ),
    "reasoning and tools": Example(
        [
            user("Busan?"),
            answer("", reasoning="I have to look.", tool_calls=[BUSAN]),
            RESULTS[0],
            answer("18 degrees.", reasoning="I can tell."),
        ],
        tools=TOOLS,
    ),
}


@dataclass(frozen=True)
class Family:
    """A template as models have it, and the same template with {% generation %} marks."""

    name: str
    refused: tuple[str, ...] = ()
    """Formats that the template cannot write."""
    unlearnt_before: tuple[str, ...] = ()
    """Beginnings of what the marks enclose that tuneline does not learn, because they are an empty
    block of reasoning or a part of the generation prompt."""
    unlearnt_after: str = ""
    """End of what the marks enclose that tuneline does not learn, because it stands after the end
    of turn."""
    learnt_after_call: str = ""
    """What tuneline learns after a call although the marks do not enclose it: generation stops
    there."""
    learnt_after_result: str = ""
    """What tuneline learns between a result and an answer although the marks do not enclose it: the
    generation prompt does not write it."""
    is_inline: bool = False
    """Whether the template reads reasoning in the content instead of under a key."""
    rewritten: tuple[str, ...] = ()
    """Formats whose answers follow the generation prompt, which a finished conversation does not
    contain: the prompt opens <think>, or has the reasoning of an earlier call."""
    unmarked: tuple[str, ...] = ()
    """Formats that the template with the marks cannot write."""

    @property
    def text(self) -> str:
        return (TEMPLATES / f"{self.name}.jinja").read_text(encoding="utf-8")

    @property
    def marked_text(self) -> str:
        return (TEMPLATES / f"{self.name}_training.jinja").read_text(encoding="utf-8")


_TOOLS = ("tools", "parallel", "reasoning and tools")
_REASONING = ("reasoning", "reasoning and tools")
_R1_PROMPT = "<\uff5cAssistant\uff5c>"
_R1 = (_R1_PROMPT + "<think>\n", _R1_PROMPT)
_QWEN3_5 = (EMPTY_THINK, "<think>\n")

FAMILIES = [
    Family("cohere", (*_TOOLS, *_REASONING)),
    Family("cohere2", (*_TOOLS, *_REASONING)),
    Family("deepseek_r1_distill", _TOOLS, _R1, is_inline=True, rewritten=tuple(FORMATS)),
    Family(
        "deepseekv3",
        _TOOLS,
        _R1,
        is_inline=True,
        rewritten=tuple(FORMATS),
        unmarked=("reasoning",),
    ),
    Family(
        "diffusion_gemma",
        learnt_after_call="<|tool_response>",
        learnt_after_result="<|turn>model\n",
    ),
    Family("gemma", ("system", *_TOOLS, *_REASONING)),
    Family("gemma3", (*_TOOLS, *_REASONING)),
    Family("glm4moe", (), ("\n<think></think>\n",)),
    Family("gptoss", ("parallel",), ("<|start|>assistant",), rewritten=("reasoning and tools",)),
    Family("lfm2_v2", _REASONING),
    Family("llama3", (*_TOOLS, *_REASONING)),
    Family("nemotron_3_nano", (), ("<think></think>", "<think>\n")),
    Family("phi3", (*_TOOLS, *_REASONING), unlearnt_after="\n<|im_end|>"),
    Family("phi3_5", (*_TOOLS, *_REASONING), unlearnt_after="\n<|im_end|>"),
    Family("qwen2_5", _REASONING, ("\n",)),
    Family("qwen3", (), (EMPTY_THINK,)),
    Family("qwen3_instruct_2507", _REASONING),
    Family("qwen3_5_think", (), _QWEN3_5),
    Family("qwen3_5_nothink", (), _QWEN3_5),
    Family("qwen3_6", (), _QWEN3_5),
    Family("qwen3_8", (), _QWEN3_5),
]


def with_markers(tokenizer: Any, templates: list[str]) -> Any:
    """Return a copy of a tokenizer that has the markers of templates as special tokens."""
    copied = copy.deepcopy(tokenizer)
    markers = {marker for text in templates for marker in re.findall(r"<[^<>\s{}'\"]+>", text)}
    copied.add_tokens(sorted(markers), special_tokens=True)
    return copied
