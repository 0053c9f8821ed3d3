"""Check that the messages before an answer are in the text that a chat template made of them."""

import re
from typing import Any

from tuneline.prepare.formats.example import BadRowError, Message
from tuneline.prepare.tokens.probe import TemplateFacts
from tuneline.prepare.tokens.tools import is_written

# Some templates read these switches in a system message and remove them from the text.
_SWITCHES = re.compile(r"/(?:no_?)?think")


def check_context(
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    text: str,
    facts: TemplateFacts,
) -> None:
    """Refuse a row if the template changes or leaves out a message or the definition of a tool.

    White space around a content may be trimmed, and a result may be escaped as in JSON.

    Args:
        messages: the messages before the answer.
        tools: definitions of tools.
        text: the text that ends with the answer.
        facts: what the probe found about the template.
    """
    for tool in tools or []:
        if tool["function"]["name"] not in text:
            raise BadRowError("the chat template leaves out the definition of a tool")
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "system" and content.strip() and not facts.shows_system:
            raise BadRowError("the chat template leaves out the system message")
        if content.strip() in text or (role == "assistant" and "</think>" in content):
            continue
        if role == "tool" and is_written(content, text):
            continue
        if role == "system" and _SWITCHES.sub("", content).strip() in text:
            continue
        raise BadRowError(f"the chat template changes or leaves out the text of a {role} message")
