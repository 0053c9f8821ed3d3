"""Find values that look like credentials, and mask them before anyone prints them."""

import re

TOKENS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{16,}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,})",
    "a GitLab token": r"\bglpat-[A-Za-z0-9_-]{16,}",
    "an AWS access key id": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a Google API key": r"\bAIza[A-Za-z0-9_-]{35}",
    "a Slack token": r"\bxox[abeprs]-[A-Za-z0-9-]{10,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a JSON web token": r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----[A-Za-z0-9+/=\s]*",
    "a URL with a password": r"(?<=://)[^\s:/@]+:[^\s:/@$]{3,}(?=@)",
    # name=value in a command, "name": "value" in JSON: the value alone says nothing.
    "a credential": (
        r"(?i)(?<![a-z])(?:aws_secret_access_key|secret_?access_?key|api_?key|access_?token"
        r"|auth_?token|hf_?token|passw(?:or)?d|client_?secret)[\"']?\s*[:=]\s*[\"']?"
        r"(?P<value>[A-Za-z0-9+/=_.~!-]{8,})"
    ),
}
_COMPILED = {kind: re.compile(pattern) for kind, pattern in TOKENS.items()}

_CREDENTIAL_NAME = re.compile(
    r"(?i)(?:^|[_-])(?:token|secret|password|passwd|pwd|credentials?"
    r"|(?:api|access|private|secret)[_-]?key)$"
)


def find_secrets(text: str) -> list[tuple[str, str]]:
    """Return what in `text` looks like a credential: (kind, the value as it stands)."""
    found: list[tuple[str, str]] = []
    for kind, pattern in _COMPILED.items():
        for match in pattern.finditer(text):
            value = match.groupdict().get("value") or match.group()
            if not any(value in known or known in value for _, known in found):
                found.append((kind, value))
    return found


def is_credential_name(name: str) -> bool:
    """Say whether an environment variable of this name usually holds a credential."""
    return _CREDENTIAL_NAME.search(name) is not None


def mask(value: str) -> str:
    """Keep enough of a credential to find it in a file: four characters and the length."""
    kept = value[:4] if len(value) >= 12 else ""
    return f"{kept}*** ({len(value)} characters)"


def mask_within(text: str) -> str:
    """Mask every credential in a longer text."""
    for _, value in find_secrets(text):
        text = text.replace(value, mask(value))
    return text
