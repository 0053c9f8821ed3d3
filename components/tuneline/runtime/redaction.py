"""Remove secrets from text that leaves a step: tokens, and credentials in URLs."""

import logging
import os
import re
from collections.abc import Mapping
from typing import Any

from tuneline.runtime.printable import printable
from tuneline.runtime.secrets import find_secrets

_SECRET_NAME = re.compile(
    r"(?:^|_)(?:TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIALS?|WEBHOOK)(?:_|$)|_?API_?KEY|_KEY$",
    re.IGNORECASE,
)
_MIN_LENGTH = 8
"""Shortest value of an environment variable that is taken for a secret."""
_PATTERNS = (
    # Tokens that were cut short, or whose case was changed.
    r"\b(?:hf_|api_org_|gh[pousr]_|github_pat_|glpat-)[A-Za-z0-9_-]{12,}",
    r"\bsk-[A-Za-z0-9_-]{20,}|\bAKIA[A-Z0-9]{16}\b",
    # A JSON Web Token, which service accounts have.
    r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*",
    # User and password of a URL; a password may contain the characters @ and :.
    r"(?<=://)[^/\s\"'<>]+(?=@)|(?<=\s//)[^/\s\"'<>]+:[^/\s\"'<>]+(?=@)",
    # What a request sends in its header.
    r"(?<=\bbearer )[A-Za-z0-9._~+/-]{8,}=*",
    r"(?<=\bauthorization: (?:basic|token) )[^\s\"',]{8,}",
    r"(?<=\bx-api-key: )\S+",
    # Parameters of a signed URL, and keys in one.
    r"(?<=[?&;])(?:[\w-]*(?:signature|credential|token|key|secret|passwd|password)"
    r"|sig|pwd|pass|auth|jwt)=[^&\s\"']+",
    # HF_TOKEN=..., "password": "..."
    r"\b[a-z_]*(?:token|password|secret|api_?key)(?:=|\"\s*:\s*\"|'\s*:\s*')[^\s\"',}]{6,}",
)
_SECRETS = re.compile("|".join(f"(?:{pattern})" for pattern in _PATTERNS), re.I)
"""What is redacted besides the values that `find_secrets` finds. These patterns may match more than
secrets, which those of `tuneline lint` must not."""


class RedactingFilter(logging.Filter):
    """Removes secrets and harmful characters from the messages of a log handler."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Replace the message if it holds one; every record passes."""
        message = record.getMessage()
        # A line feed in a name must not begin a line that looks like a message of its own.
        clean = printable(redacted(message)).replace("\n", "\n    ")
        if clean != message:
            record.msg, record.args = clean, ()
        return True


def redact_logs() -> None:
    """Remove secrets and harmful characters from what the log handlers of this process write."""
    for handler in logging.getLogger().handlers:
        if not any(isinstance(each, RedactingFilter) for each in handler.filters):
            handler.addFilter(RedactingFilter())


def redacted(text: str) -> str:
    """Return the text with every secret replaced by `[redacted]`.

    A secret is what looks like one, or the value of an environment variable whose name says so.
    """
    for name, value in os.environ.items():
        if len(value) >= _MIN_LENGTH and _SECRET_NAME.search(name) and not value.startswith("/"):
            text = text.replace(value, "[redacted]")
    text = _SECRETS.sub("[redacted]", text)
    for _, value in find_secrets(text):
        text = text.replace(value, "[redacted]")
    return text


def without_secrets(value: Any) -> Any:
    """Return a plain value with the secrets removed from its texts."""
    if isinstance(value, Mapping):
        return {key: without_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    return redacted(value) if isinstance(value, str) else value
