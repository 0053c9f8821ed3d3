"""Secrets are removed from text, and what only resembles a secret stays."""

import io
from pathlib import Path

import pytest

from tuneline.runtime.redaction import redacted

SECRETS = {
    "token hf_abcdefghijklmnopQRST was refused": "token [redacted] was refused",
    "https://user:pa55word@host/x failed": "https://[redacted]@host/x failed",
    "s3://AKIAABCDEFGHIJKLMNOP@bucket": "s3://[redacted]@bucket",
    "https://glpat-abcdefghijklmnop@host": "https://[redacted]@host",
    "Authorization: Bearer abc.def-ghi_jkl": "Authorization: Bearer [redacted]",
    "https://h/x?X-Amz-Signature=0123abcd&a=1": "https://h/x?[redacted]&a=1",
    "ghp_abcdefghijklmnop1234": "[redacted]",
    "xoxb-1234567890-abc was revoked": "[redacted] was revoked",
    "ASIAABCDEFGHIJKLMNOP has expired": "[redacted] has expired",
    "-----BEGIN PRIVATE KEY-----MIIEvQIBADAN": "[redacted]",
    "HF_TOKEN=abcdefgh is wrong": "[redacted] is wrong",
    'body {"password": "hunter22"}': 'body {"[redacted]"}',
    "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJhYmMifQ.c2lnbmF0dXJl": "[redacted]",
}


@pytest.mark.parametrize(("text", "expected"), SECRETS.items())
def test_what_looks_like_a_secret_is_removed(text: str, expected: str) -> None:
    assert redacted(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "31 of 90 rows were rejected: row 7 has no answer",
        "the tokenizer has no chat template: set prepare.template",
        "set HF_TOKEN to a token with read access",
        "max_seq_length=4096 tokens, 12 rows",
        "minio://mlpipeline/v2/artifacts/run/train/adapter",
        "https://huggingface.co/org/model@main",
        "https://host/a.jsonl?split=train&author=me&passage=2",
        "a comment: //host/x@y and 1//2",
        "mail me@example.com",
        "the risk-adjusted-learning-rate-schedule-of-task-x",
    ],
)
def test_other_text_stays(text: str) -> None:
    assert redacted(text) == text


def test_the_values_of_secret_variables_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "aws-secret-value")
    for name in ("MODEL_NAME", "TOKENIZERS_PARALLELISM", "MAX_TOKENS"):
        monkeypatch.setenv(name, "smollm2-135m")
    monkeypatch.setenv("HF_TOKEN_PATH", "/home/user/token")
    text = "0123456789abcdef, aws-secret-value, smollm2-135m, /home/user/token"
    assert redacted(text) == "[redacted], [redacted], smollm2-135m, /home/user/token"


def test_the_password_of_a_url_may_hold_its_own_marks() -> None:
    text = "read https://me:p@ss:w0rd@host/rows.jsonl and s3://a:b@c/d, write to a@b"
    shown = "read https://[redacted]@host/rows.jsonl and s3://[redacted]@c/d, write to a@b"
    assert redacted(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        *("https://h/x?auth=SECRET-1234", "https://h/x?a=1&access_key=SECRET-1234"),
        *("https://h/x?pwd=SECRET-1234", "https://h/x;client_secret=SECRET-1234#f"),
        *("https://h/x?X-My-Api-Key=SECRET-1234", "see //me:SECRET-1234@h/x"),
        *("Authorization: Basic SECRET-1234", "authorization: token SECRET-1234"),
        *("x-api-key: SECRET-1234", "mongodb+srv://u:SECRET-1234@h/db"),
        *("jdbc:postgresql://h/d?user=u&password=SECRET-1234", "HTTPS://U:SECRET-1234@H/x"),
    ],
)
def test_the_credentials_of_an_address_have_many_names(text: str) -> None:
    assert "SECRET-1234" not in redacted(text)


def test_logs_and_errors_of_a_step_hold_no_password(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import logging

    from tuneline.errors import DataError
    from tuneline.runtime.step import step

    events = tmp_path / "events"
    monkeypatch.setenv("TUNELINE_EVENTS", str(events))
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    with pytest.raises(SystemExit), step("prepare"):
        logging.getLogger("tuneline").warning("reading %s", "https://me:hunter22@host/x")
        raise DataError("https://me:hunter22@host/x is not there")
    error = capsys.readouterr().err
    for text in (stream.getvalue(), error, events.read_text()):
        assert "hunter22" not in text and "https://[redacted]@host/x" in text
