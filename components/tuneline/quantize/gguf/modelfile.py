"""Write a Modelfile, from which `ollama create NAME -f FILE` makes a model of a GGUF file.

`ollama run hf.co/NAME` reads no Modelfile: the Hub makes a template for it by guessing, unless the
repository has the files `template` and `params`. They are written with the same content.

Ollama's templates are Go templates, and chat templates are Jinja templates; there is no translation
between them. Therefore the chat template renders conversations, and the text that it puts around
each message is read from the result. This text is used only if it reproduces every conversation of
probes.py.
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path

from tuneline.artifacts import MODELFILE, OLLAMA_PARAMS, OLLAMA_TEMPLATE
from tuneline.models.context import context_length
from tuneline.models.sampling import is_greedy, read_settings
from tuneline.quantize.proof import probes
from tuneline.quantize.proof.reference import Wording

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# Name of a parameter in generation_config.json -> Ollama's name, where the two differ.
_NAMES = {"repetition_penalty": "repeat_penalty"}

_NOT_EXPRESSIBLE = "characters that Ollama drops, or three quotes at the end of a line"

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Pieces:
    """Text that a chat template puts before and after a message: (before, after) for each role."""

    no_system: str
    """Text that begins a conversation without a system message, e.g. a default system message."""
    system: tuple[str, str] | None
    """Text around the system message; None if the template rejects system messages."""
    user: tuple[str, str]
    assistant: tuple[str, str]
    for_answer: str
    """Generation prompt at the end of a conversation."""

    def render(self, messages: Messages) -> str:
        """Return the text of a conversation, as the template of `go_template` renders it."""
        parts = [self.no_system] if messages[0]["role"] != "system" else []
        around = {"system": self.system, "user": self.user, "assistant": self.assistant}
        for message in messages:
            before, after = around[message["role"]] or ("", "")
            parts += [before, message["content"], after]
        return "".join([*parts, self.for_answer])

    def go_template(self) -> str:
        """Return the pieces as a Go template for Ollama."""
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


def write(file: Path, *, reference: Wording, adds_bos: bool) -> list[str]:
    """Write Ollama's files to a GGUF file's directory; return notes on what they cannot express.

    Args:
        file: the GGUF file.
        reference: the merged model, with its chat template and stop tokens.
        adds_bos: whether llama.cpp adds the BOS token; if so, the Go template leaves it out.
    """
    lines, notes = [f"FROM ./{file.name}"], []
    if reference.tokenizer.chat_template:
        bos = reference.tokenizer.bos_token or ""
        framing = pieces(reference, bos=bos if adds_bos else "")
        template = quoted(framing.go_template()) if framing else None
        if framing and template:
            lines.append(f"TEMPLATE {template}")
            _write(file.parent / OLLAMA_TEMPLATE, framing.go_template())
        elif framing:
            notes.append(f"no Ollama template: the chat template contains {_NOT_EXPRESSIBLE}")
        else:
            notes.append("no Ollama template: the chat template does more than frame messages")
    for text in reference.stop_texts:
        stop = quoted(text)
        if stop:
            lines.append(f"PARAMETER stop {stop}")
        else:
            notes.append(f"no Ollama stop for {text!r}: it contains {_NOT_EXPRESSIBLE}")
    parameters = _parameters(reference.model_dir)
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    _write(file.parent / MODELFILE, "\n".join(lines) + "\n")
    values = {"stop": reference.stop_texts, **parameters}
    _write(file.parent / OLLAMA_PARAMS, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    return notes


def quoted(text: str) -> str | None:
    """Return `text` in quotes for a Modelfile, or None if Ollama could not read back the same text.

    Ollama's parser/parser.go (2026-08) has no escape sequences: a backslash is a plain character,
    and so is a quote within quotes. A value ends at the first line that ends with closing quotes:
    three quotes if the value begins with three, otherwise one. The parser drops characters that Go
    does not consider printable; str.isprintable uses the same Unicode categories as Go.
    """
    if re.search(r'"""\s*[\r\n]', text):
        return None
    if not all(letter.isprintable() or letter in "\t\r\n" for letter in text):
        return None
    quotes = '"""' if re.search(r'["\r\n]', text) else '"'
    return f"{quotes}{text}{quotes}"


def pieces(reference: Wording, *, bos: str) -> Pieces | None:
    """Return the pieces of a chat template.

    None if the template does more than put a fixed text before and after the messages of a role.

    Args:
        reference: the merged model, whose chat template renders conversations.
        bos: BOS token to leave out of the pieces, because llama.cpp adds it; "" for none.
    """
    # Some templates, such as Phi-3's, put EOS only at the end of a conversation, not after each
    # answer.
    ends = ("", reference.tokenizer.eos_token or "")
    return next((framing for end in ends if (framing := _pieces(reference, bos, end))), None)


def _pieces(reference: Wording, bos: str, end: str) -> Pieces | None:
    def render(*roles: str, for_answer: bool = True) -> list[str]:
        """Return the texts before, between and after the contents of the messages."""
        messages = [{"role": role, "content": f"CONTENT{n}"} for n, role in enumerate(roles)]
        text = reference.render(messages, for_answer=for_answer).removeprefix(bos)
        text = text if for_answer else text.removesuffix(end)
        parts = []
        for message in messages:
            before, mark, text = text.partition(message["content"])
            if not mark:
                raise ValueError("the template does not show a message")
            parts.append(before)
        return [*parts, text]

    def cut(text: str, *, start: str = "", end: str = "") -> str:
        if not (text.startswith(start) and text.endswith(end)):
            raise ValueError("the text between messages depends on more than their roles")
        return text.removeprefix(start).removesuffix(end)

    try:
        first, user_after = render("user", for_answer=False)
        *_, assistant_after = render("user", "assistant", for_answer=False)
        _, between, to_user, last = render("user", "assistant", "user")
        user_before = cut(to_user, start=assistant_after)
        framing = Pieces(
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
    framing = dataclasses.replace(framing, system=system)
    for messages in probes.conversations():
        # Some templates strip white space from contents. Ollama never does, so compare with
        # contents that were stripped before.
        bare = [{**message, "content": message["content"].strip()} for message in messages]
        try:
            expected = reference.render(bare).removeprefix(bos)
        except ValueError:
            continue
        if framing.render(bare) != expected:
            return None
    return framing


def _parameters(model_dir: Path) -> dict[str, float]:
    """Return the context length, and the sampling parameters of generation_config.json."""
    parameters: dict[str, float] = {"num_ctx": context_length(model_dir)}
    sampling = read_settings(model_dir)
    if is_greedy(sampling):
        # Ollama's own defaults are a temperature of 0.8 and a penalty of 1.1.
        penalty = sampling.get("repetition_penalty", 1.0)
        sampling = {"temperature": 0, "repetition_penalty": penalty}
    for name in _SAMPLING:
        if sampling.get(name) is not None:
            parameters[_NAMES.get(name, name)] = sampling[name]
    if (sampling.get("repetition_penalty") or 1.0) != 1.0:
        # In transformers the penalty concerns the whole text. Ollama's default is 64 tokens. It
        # hands -1, its word for the whole context, to llama-server, which refuses it.
        parameters["repeat_last_n"] = parameters["num_ctx"]
    return parameters


def _write(path: Path, text: str) -> None:
    # newline="": write line ends unchanged, because a text may contain \r.
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(text)


def _go(text: str) -> str:
    """Return `text` escaped for a Go template."""
    return text.replace("{{", '{{ "{{" }}')
