"""Find values that look like credentials, and mask them before they are printed."""

import re

TOKENS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{16,}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,})",
    "a GitLab token": r"\bglpat-[A-Za-z0-9_-]{16,}",
    "an AWS access key ID": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a Google API key": r"\bAIza[A-Za-z0-9_-]{35}",
    "a Slack token": r"\bxox[abeprs]-[A-Za-z0-9-]{10,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a JSON web token": r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----[A-Za-z0-9+/=\s]*",
    "a URL with a password": r"(?<=://)[^\s:/@]+:[^\s:/@$]{3,}(?=@)",
    # name=value in a command, or "name": "value" in JSON, where only the name tells that the value
    # is secret.
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
    """Return the values in `text` that look like credentials, as (kind, unmasked value)."""
    secrets: list[tuple[str, str]] = []
    for kind, pattern in _COMPILED.items():
        for match in pattern.finditer(text):
            value = match.groupdict().get("value") or match.group()
            if not any(value in other or other in value for _, other in secrets):
                secrets.append((kind, value))
    return secrets


def is_credential_name(name: str) -> bool:
    """Return whether an environment variable of this name usually holds a credential."""
    return _CREDENTIAL_NAME.search(name) is not None


def mask(value: str) -> str:
    """Mask a credential; show its first four characters and its length, so that it can be found."""
    kept = value[:4] if len(value) >= 12 else ""
    return f"{kept}*** ({len(value)} characters)"


def mask_within(text: str) -> str:
    """Mask every credential in a longer text."""
    for _, value in find_secrets(text):
        text = text.replace(value, mask(value))
    return text
