"""Write a Modelfile, with which Ollama makes a model of a GGUF file: `ollama create NAME -f FILE`.

Ollama's templates are Go's, a chat template is Jinja: one is not the other's translation. So the
pieces round each message are read off what the chat template renders, and taken only when they
give the same text for every conversation of probes.py.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from tuneline.artifacts import MODELFILE
from tuneline.quantize.proof import probes
from tuneline.quantize.proof.reference import Reference

MAX_CONTEXT = 8192
"""Ollama reserves memory for all of it at once; a person with more can raise it."""

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# Ollama's word where it is not that of generation_config.json.
_NAMES = {"repetition_penalty": "repeat_penalty"}

_UNSAYABLE = "characters that Ollama drops, or three quotes at the end of a line"

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Pieces:
    """What a chat template puts round the messages."""

    no_system: str
    """At the start, where there is no system message: "" or a default one."""
    system: tuple[str, str] | None
    """Before and after it; None where the template refuses one."""
    user: tuple[str, str]
    assistant: tuple[str, str]
    for_answer: str
    """At the end, for the answer to follow."""

    def render(self, messages: Messages) -> str:
        """Return a conversation's text, as the Go template below does."""
        parts = [self.no_system] if messages[0]["role"] != "system" else []
        around = {"system": self.system, "user": self.user, "assistant": self.assistant}
        for message in messages:
            before, after = around[message["role"]] or ("", "")
            parts += [before, message["content"], after]
        return "".join([*parts, self.for_answer])

    def go_template(self) -> str:
        """Return it in the language of Ollama's templates."""
        system = "{{ if .System }}%s{{ .System }}%s{{ else }}%s{{ end }}"
        if self.system:
            start = system % (*map(_go, self.system), _go(self.no_system))
        else:
            start = _go(self.no_system)
        role = '{{ %s eq .Role "%s" }}%s{{ .Content }}%s'
        return (
            f"{start}{{{{ range .Messages }}}}"
            f"{role % ('if', 'user', *map(_go, self.user))}"
            f"{role % ('else if', 'assistant', *map(_go, self.assistant))}"
            f"{{{{ end }}}}{{{{ end }}}}{_go(self.for_answer)}"
        )


def write(file: Path, *, reference: Reference, adds_bos: bool) -> list[str]:
    """Write the Modelfile beside a GGUF file; return notes on what it lacks."""
    lines, notes = [f"FROM ./{file.name}"], []
    if reference.tokenizer.chat_template:
        bos = reference.tokenizer.bos_token or ""
        found = pieces(reference, bos=bos if adds_bos else "")
        template = quoted(found.go_template()) if found else None
        if template:
            lines.append(f"TEMPLATE {template}")
        elif found:
            notes.append(f"no Ollama template: the chat template has {_UNSAYABLE}")
        else:
            notes.append("no Ollama template: the chat template does more than frame messages")
    for text in reference.stop_texts:
        stop = quoted(text)
        if stop:
            lines.append(f"PARAMETER stop {stop}")
        else:
            notes.append(f"no Ollama stop for {text!r}: it has {_UNSAYABLE}")
    lines += [f"PARAMETER {name} {value}" for name, value in _parameters(reference.model_dir)]
    # As it stands: a text may have a \r.
    with open(file.parent / MODELFILE, "w", encoding="utf-8", newline="") as modelfile:
        modelfile.write("\n".join(lines) + "\n")
    return notes


def quoted(text: str) -> str | None:
    """Return a value as Ollama reads it back; None where it would read another.

    In its parser/parser.go (2026-08) nothing is an escape: a backslash is one, and quotes inside
    of quotes stand for themselves. A value ends with the first line whose end closes its quotes,
    three where it begins with three. Characters that Go does not print are dropped; str.isprintable
    goes by the same categories of Unicode.
    """
    if re.search(r'"""\s*[\r\n]', text):
        return None
    if not all(letter.isprintable() or letter in "\t\r\n" for letter in text):
        return None
    quotes = '"""' if re.search(r'["\r\n]', text) else '"'
    return f"{quotes}{text}{quotes}"


def pieces(reference: Reference, *, bos: str) -> Pieces | None:
    """Read a chat template's pieces off its renderings; None where it is not made of such.

    Args:
        reference: renders.
        bos: begins every text, and llama.cpp adds it by itself: left out.
    """
    # Some templates (Phi-3's) end a whole conversation, and not each answer, with this token.
    ends = ("", reference.tokenizer.eos_token or "")
    return next((found for end in ends if (found := _pieces(reference, bos, end))), None)


def _pieces(reference: Reference, bos: str, end: str) -> Pieces | None:
    def render(*roles: str, for_answer: bool = True) -> list[str]:
        """Return the texts before, between and after the messages' contents."""
        messages = [{"role": role, "content": f"CONTENT{n}"} for n, role in enumerate(roles)]
        rest = reference.render(messages, for_answer=for_answer).removeprefix(bos)
        rest = rest if for_answer else rest.removesuffix(end)
        found = []
        for message in messages:
            before, mark, rest = rest.partition(message["content"])
            if not mark:
                raise ValueError("a message is not shown")
            found.append(before)
        return [*found, rest]

    def cut(text: str, *, start: str = "", end: str = "") -> str:
        if not (text.startswith(start) and text.endswith(end)):
            raise ValueError("the text between messages depends on more than their roles")
        return text.removeprefix(start).removesuffix(end)

    try:
        first, user_after = render("user", for_answer=False)
        *_, assistant_after = render("user", "assistant", for_answer=False)
        _, between, to_user, last = render("user", "assistant", "user")
        user_before = cut(to_user, start=assistant_after)
        found = Pieces(
            no_system=cut(first, end=user_before),
            system=None,
            user=(user_before, user_after),
            assistant=(cut(between, start=user_after), assistant_after),
            for_answer=cut(last, start=user_after),
        )
    except ValueError:
        return None
    try:
        before, to_user, _ = render("system", "user")
        system = (before, cut(to_user, end=user_before))
    except ValueError:
        system = None
    found = Pieces(found.no_system, system, found.user, found.assistant, found.for_answer)
    for messages in probes.conversations():
        # Templates differ in whether they strip contents, and Ollama sends what it is given.
        bare = [{**message, "content": message["content"].strip()} for message in messages]
        try:
            expected = reference.render(bare).removeprefix(bos)
        except ValueError:
            continue
        if found.render(bare) != expected:
            return None
    return found


def _parameters(model_dir: Path) -> list[tuple[str, float]]:
    """Return the context's length, and how the base model's authors want it sampled."""
    settings = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    settings = settings.get("text_config") or settings
    longest = settings.get("max_position_embeddings") or MAX_CONTEXT
    found: list[tuple[str, float]] = [("num_ctx", min(longest, MAX_CONTEXT))]
    path = model_dir / "generation_config.json"
    sampling = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found + [
        (_NAMES.get(name, name), sampling[name])
        for name in _SAMPLING
        if sampling.get(name) is not None
    ]


def _go(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')
