"""Find out how a chat template writes tools, calls and results; part of the probe."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from tuneline.prepare.tokens.compiled import CompiledTemplate

_QUESTION = {"role": "user", "content": "tunelinequestion"}
_TOOL, _OTHER, _KEY = "tunelinetool", "tunelineother", "tunelinekey"
_VALUE, _RESULT, _ANSWER = "tunelinevalue", "tunelineresult", "tunelineanswer"
_SCHEMA = {"type": "object", "properties": {_KEY: {"type": "string", "description": "d"}}}
_DEFINITION = {
    "type": "function",
    "function": {"name": _TOOL, "description": "d", "parameters": _SCHEMA},
}
_BARE_DEFINITION = {"type": "function", "function": {"name": _TOOL}}
# Mistral's templates accept only identifiers of nine letters and digits.
_LONG_ID, _SHORT_ID = "call_tunelineprobe", "tuneline1"


@dataclass(frozen=True)
class ToolFacts:
    """What the probe of a chat template found about tools."""

    shows_tools: bool = False
    """Whether the definitions of tools reach the text."""
    needs_whole_tools: bool = False
    """Whether the template refuses a definition without description and parameters."""
    arguments: Literal["object", "text"] | None = None
    """The type that the arguments of a call need for the template to write them as JSON; None if
    calls do not reach the text."""
    needs_short_ids: bool = False
    """Whether the identifiers of calls need to be nine letters and digits."""
    shows_results: bool = False
    """Whether the results of tools reach the text."""
    shows_all_calls: bool = False
    """Whether several calls of one message reach the text."""
    after_call: str = ""
    """Text between a call and the result of the tool that does not depend on the tool."""


def probe_tools(template: CompiledTemplate) -> ToolFacts:
    """Return how the template writes tools."""
    shows_tools = _TOOL in template.attempt([_QUESTION], [_DEFINITION], prompt=True)
    bare = template.attempt([_QUESTION], [_BARE_DEFINITION], prompt=True)
    needs_whole = shows_tools and _TOOL not in bare
    tools = [_DEFINITION] if shows_tools else None
    for name, identifier in product(("object", "text"), (_LONG_ID, _SHORT_ID)):
        calls = [_QUESTION, _call(name, identifier)]
        text = template.attempt(calls, tools)
        if not (_is_written(text) and _VALUE in text):
            continue
        whole = template.attempt([*calls, *_results(identifier)], tools)
        if not whole and identifier == _LONG_ID:
            continue
        return ToolFacts(
            shows_tools=shows_tools,
            needs_whole_tools=needs_whole,
            arguments="object" if name == "object" else "text",
            needs_short_ids=identifier == _SHORT_ID,
            shows_results=_RESULT in whole,
            shows_all_calls=_OTHER
            in template.attempt([_QUESTION, _call(name, identifier, 2)], tools),
            after_call=whole[len(text.rstrip()) :].partition(_RESULT)[0]
            if whole.startswith(text.rstrip())
            else "",
        )
    return ToolFacts(shows_tools=shows_tools, needs_whole_tools=needs_whole)


def _is_written(text: str) -> bool:
    """Return whether the arguments are neither Python's notation nor JSON within JSON."""
    return f"{{'{_KEY}'" not in text and f'\\"{_KEY}' not in text


def _call(arguments: str, identifier: str, count: int = 1) -> Mapping[str, Any]:
    values: Any = {_KEY: _VALUE}
    if arguments == "text":
        values = json.dumps(values)
    calls = [
        {"id": f"{identifier[:-1]}{number}", "type": "function", "function": function}
        for number, function in enumerate(
            ({"name": name, "arguments": values} for name in (_TOOL, _OTHER)[:count]), 1
        )
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _results(identifier: str) -> Sequence[Mapping[str, Any]]:
    result = {"role": "tool", "content": _RESULT, "name": _TOOL}
    return [
        {**result, "tool_call_id": f"{identifier[:-1]}1"},
        {"role": "assistant", "content": _ANSWER},
    ]
