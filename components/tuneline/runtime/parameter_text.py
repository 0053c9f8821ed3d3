"""Write texts so that they reach a step unchanged on their way through KFP, Argo and Kubernetes.

On a cluster, every parameter of a step and the metadata of its inputs pass through templates:
Kubernetes replaces `$(NAME)` and halves `$$`, Argo replaces `{{name}}` and evaluates `{{=code}}`,
and KFP replaces `[[CurrentTime]]` and a few more names in double brackets. Texts of people, such as
a prompt, must not be changed or evaluated. JSON can write a character as a Unicode escape, which
none of these programs replaces and every JSON parser decodes, so the first character of such a
sequence is written that way. Texts without such sequences are passed as they are.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from tuneline.errors import RecipeError

_REPLACED = re.compile(r"\$(?=[$(])|\{(?=\{)|\[(?=\[(?:RunUUID|ScheduledTime|CurrentTime|Index)\b)")
"""First character of every sequence that is replaced on the way. JSON has none of these sequences
outside its strings."""


def find_replaced(text: str) -> str | None:
    """Return the beginning of the first sequence that would be replaced, or None."""
    match = _REPLACED.search(text)
    return text[match.start() : match.start() + 12] if match else None


def to_json(config: BaseModel | Mapping[str, Any]) -> str:
    """Return a config, or plain values of one, as JSON that reaches a step unchanged."""
    if isinstance(config, BaseModel):
        return _escape(config.model_dump_json())
    return _escape(json.dumps(config, ensure_ascii=False, separators=(",", ":")))


def encode_text(text: str) -> str:
    """Return a text for a parameter or for metadata; as a JSON string if it needs that."""
    if find_replaced(text) is None and not text.startswith('"'):
        return text
    return _escape(json.dumps(text, ensure_ascii=False))


def decode_text(parameter: str) -> str:
    """Return the text of a parameter that `encode_text` made, or that a person typed."""
    if parameter.startswith('"'):
        try:
            return str(json.loads(parameter))
        except ValueError:
            pass
    return parameter


def encode_list(values: str | Sequence[str]) -> str:
    """Return one text, or a list of texts as JSON, for a parameter that may be either."""
    return values if isinstance(values, str) else json.dumps(list(values), ensure_ascii=False)


def decode_list(parameter: str) -> str | list[str]:
    """Return what `encode_list` encoded, or what a person typed.

    Raises:
        RecipeError: the text begins like a list, but is not a JSON list of texts.
    """
    if not parameter.lstrip().startswith("["):
        return parameter
    try:
        values = json.loads(parameter)
    except ValueError:
        values = None
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise RecipeError(
            f"'{parameter[:200]}' begins like a list, but is not one. Write a JSON list of texts, "
            'such as ["my-org/x", "s3://bucket/models"]'
        )
    return values


def list_in_words(values: str | Sequence[str]) -> str:
    """Return one text as it is, and a list with commas."""
    return values if isinstance(values, str) else ", ".join(values)


def _escape(text: str) -> str:
    return _REPLACED.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
