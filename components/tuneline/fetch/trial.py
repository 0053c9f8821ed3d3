"""Try a model's chat templates and its tokenizer in a process with limits, before they are used.

A template is a program. Jinja's sandbox keeps it from files and from Python, but not from looping
for years or from filling the memory, and a tokenizer's normaliser or regular expressions can do the
same. A template is refused here for its cost alone; whether it suits the data is for prepare to
say. A tokenizer is refused too if it does not decode the tokens of a text to that text, as happens
when its files were converted wrongly.

The process is started as `python -m tuneline.fetch.trial DIRECTORY SECONDS`. It writes what it is
about to try, one name per line.
"""

import contextlib
import json
import resource
import signal
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tuneline.errors import ModelError
from tuneline.models.tokenizer.chat_templates import REFUSALS
from tuneline.models.tokenizer.files import TEMPLATES_DIR

MAX_SECONDS = 20
"""CPU time of all trials; those of the models we know take less than two seconds."""
MAX_MEMORY = 4 << 30
"""Memory of the process in bytes. A tokenizer with 262,144 tokens takes about 0.5 GB."""
MAX_TEMPLATE = 1 << 20
"""Longest chat template in characters. The longest that we know has 25,000."""
MAX_WRITTEN = 1 << 20
"""Longest text that a template may make of one of the conversations below, in characters."""
_TOO_LONG = 3
"""Exit code of a trial whose last template is too long, or writes too much."""
_OTHER_TEXT = 4
"""Exit code of a trial whose tokenizer decodes the tokens of a text to another text."""

_USER, _ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
_CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    [_USER],
    [_USER, _ANSWER],
    [{"role": "system", "content": "S"}, _USER, _ANSWER, _USER],
)
_PLAIN_TEXTS = ("the quick brown fox jumps over 12 lazy dogs", "one two\n\n  three 2048\n")
"""Texts without marks that tokenizers set apart, and of letters that every vocabulary has."""
_TEXTS = ("a" * 5000, " " * 5000, "1" * 5000, "ab 12\n" * 1000, "\uac00" * 5000, "!?" * 2500)


def try_tokenizer(directory: Path, *, called: str, max_seconds: int = MAX_SECONDS) -> None:
    """Try the chat templates and the tokenizer of a model directory.

    Args:
        directory: the model directory.
        called: the model's name in messages.
        max_seconds: limit of the CPU time.

    Raises:
        ModelError: one of them takes too long, too much memory, or writes too much; or the
            tokenizer decodes the tokens of a text to another text.
    """
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tuneline.fetch.trial", str(directory), str(max_seconds)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode == 0:
        return
    tried = (done.stdout.splitlines() or ["the tokenizer"])[-1]
    if done.returncode == _TOO_LONG:
        how = (
            f"has, or makes of a short conversation, more than {MAX_WRITTEN:,} characters, as no "
            "model needs"
        )
    elif done.returncode == _OTHER_TEXT:
        raise ModelError(
            f"{called} has a tokenizer that decodes the tokens of a text to another text "
            f"({done.stderr.strip()}): its files are wrong, or were converted wrongly; use another "
            "source of the model, such as the safetensors checkpoint of its authors"
        )
    elif done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        how = f"took more than {max_seconds} s of computing for a few short texts"
    else:
        lines = done.stderr.strip().splitlines()
        last = lines[-1][:200] if lines else f"exit code {done.returncode}"
        how = f"ended the process that tried it on a few short texts ({last})"
    raise ModelError(
        f"{tried} of {called} {how}: repair the model's files, or use another base model"
    )


def main(directory: Path, max_seconds: int) -> None:
    """Try each template and the tokenizer; end with an error if one exceeds a limit."""
    resource.setrlimit(resource.RLIMIT_CPU, (max_seconds, max_seconds + 1))
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Imported here, so that the parent process does not load Jinja and tokenizers for nothing.
    from tokenizers import Tokenizer
    from transformers.utils.chat_template_utils import _compile_jinja_template

    for name, text in _templates(directory):
        print(f"the chat template {name}", flush=True)
        if len(text) > MAX_TEMPLATE:
            raise SystemExit(_TOO_LONG)
        # A template that refuses a conversation, or is no Jinja, is not refused for that here.
        with contextlib.suppress(*REFUSALS):
            template = _compile_jinja_template(text)
            for messages in _CONVERSATIONS:
                with contextlib.suppress(*REFUSALS):
                    written = template.render(messages=messages, add_generation_prompt=True)
                    if len(written) > MAX_WRITTEN:
                        raise SystemExit(_TOO_LONG)
    file = directory / "tokenizer.json"
    if file.is_file():
        print("the tokenizer (tokenizer.json)", flush=True)
        tokenizer = Tokenizer.from_file(str(file))
        for text in _TEXTS:
            tokenizer.encode(text, add_special_tokens=False)
        unknown = _unknown_token(json.loads(file.read_text(encoding="utf-8"))["model"])
        for text in _PLAIN_TEXTS:
            encoded = tokenizer.encode(text, add_special_tokens=False)
            decoded = tokenizer.decode(encoded.ids, skip_special_tokens=False)
            if unknown not in encoded.tokens and _words(decoded) != _words(text):
                print(f"{text!r} becomes {decoded!r}", file=sys.stderr)
                raise SystemExit(_OTHER_TEXT)


def _unknown_token(model: dict[str, Any]) -> str | None:
    """Return the token that stands for what the vocabulary lacks; None if there is none."""
    if model.get("unk_id") is not None:
        return str(model["vocab"][model["unk_id"]][0])
    token: str | None = model.get("unk_token")
    return token


def _words(text: str) -> list[str]:
    """Return the words of a text without case and accents, which a tokenizer may ignore."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    return "".join(letter for letter in letters if not unicodedata.combining(letter)).split()


def _templates(directory: Path) -> Iterator[tuple[str, str]]:
    """Yield the chat templates in all files that may hold one, with a name for messages."""
    files = [*directory.glob("*.jinja"), *(directory / TEMPLATES_DIR).glob("*.jinja")]
    for path in sorted(files):
        yield path.name, path.read_text(encoding="utf-8", errors="replace")
    for name in ("tokenizer_config.json", "chat_template.json", "processor_config.json"):
        if not (directory / name).is_file():
            continue
        values = json.loads((directory / name).read_text(encoding="utf-8"))
        found: Any = values.get("chat_template") if isinstance(values, dict) else None
        for entry in found if isinstance(found, list) else [{"template": found}]:
            if isinstance(entry, dict) and isinstance(entry.get("template"), str):
                yield f"{entry.get('name', '')} in {name}".strip(), entry["template"]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
