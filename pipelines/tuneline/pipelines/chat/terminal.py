"""A conversation in the terminal: answers go to the standard output, all else to stderr."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tuneline.errors import UserError
from tuneline.models.sampling import PRESETS
from tuneline.pipelines.chat.session import Answer, Session, Voice
from tuneline.pipelines.chat.settings import NUMBERS, Settings, describe
from tuneline.pipelines.chat.speakers import Messages
from tuneline.runtime.printable import printable

MIN_WIDTH_BESIDE = 100
"""Narrower terminals show two answers one after the other."""
_PROMPT = "> "
_WAITING = "..."
"""Shown side by side until a model has computed the first word of its answer."""


@dataclass
class TerminalChat:
    """A conversation with each voice of a session, about the same messages of the user."""

    session: Session
    settings: Settings
    out: Console
    """Where answers go."""
    notes: Console
    """Where everything else goes."""
    histories: dict[str, Messages] = field(default_factory=dict)
    """Messages without the system message, by the name of the voice."""

    def introduce(self) -> None:
        """Say which models answer, and how."""
        for voice in self.session.voices:
            self._note(f"{voice.name}: {voice.title} of {self.session.name}, {voice.speaker.where}")
        self._note(f"sampling: {describe(self.settings.sampling)}; {_words(self.session.system)}")
        if not self.session.has_template:
            self._note("The model has no chat template: it continues each text that you type.")
        self._note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends")

    def run(self, read: Callable[[], str]) -> None:
        """Answer the user's messages until `read` raises EOFError or the user quits.

        Args:
            read: returns the next line that the user typed.
        """
        while True:
            try:
                line = read().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._note("\nCtrl-D ends")
                continue
            if line == "/quit":
                return
            try:
                if line.startswith("/"):
                    self._command(line)
                elif line:
                    self.ask(line)
            except UserError as error:
                self._note(f"error: {error}")

    def ask(self, text: str) -> bool:
        """Answer one message; return whether the user stopped the answer, which stays as it is.

        Raises:
            UserError: the conversation does not fit into the context of a model.
        """
        before = {name: list(messages) for name, messages in self.histories.items()}
        for voice in self.session.voices:
            history = self.histories.setdefault(voice.name, [])
            history.append({"role": "user", "content": text})
        voices = self.session.voices
        try:
            if len(voices) > 1 and self.out.is_terminal and self.out.width >= MIN_WIDTH_BESIDE:
                stopped = self._answer_beside()
            else:
                stopped = self._answer_one_by_one()
        except BaseException:
            self.histories = before
            raise
        if stopped:
            self._note("(stopped)")
            for voice in voices:
                # A message without an answer would be followed by the next message.
                if self.histories[voice.name][-1]["role"] == "user":
                    self.histories[voice.name].pop()
        return stopped

    def _answer_one_by_one(self) -> bool:
        """Stream the answers of all voices; return whether the user stopped them."""
        for index, voice in enumerate(self.session.voices):
            if index:
                self.out.print()
            if len(self.session.voices) > 1:
                self.out.print(Text(self._heading(voice), style="bold"))
            if self._answer_alone(voice):
                return True
        return False

    def _answer_alone(self, voice: Voice) -> bool:
        """Stream an answer; return whether the user stopped it."""
        answer = self._begin(voice)
        with _stoppable(answer) as interrupted:
            for piece in answer:
                self.out.file.write(printable(piece))
                self.out.file.flush()
        self.out.file.write("\n")
        self.out.file.flush()
        self._end(voice, answer)
        return bool(interrupted)

    def _answer_beside(self) -> bool:
        """Stream the answers of two voices in columns; return whether the user stopped them."""
        texts = {voice.name: "" for voice in self.session.voices}
        stopped = False
        with Live(console=self.out, transient=True, auto_refresh=False) as live:
            for voice in self.session.voices:
                texts[voice.name] = _WAITING
                live.update(self._columns(texts), refresh=True)
                answer = self._begin(voice)
                with _stoppable(answer) as interrupted:
                    for _ in answer:
                        texts[voice.name] = answer.text
                        live.update(self._columns(texts), refresh=True)
                texts[voice.name] = answer.text
                self._end(voice, answer)
                if interrupted:
                    stopped = True
                    break
        self.out.print(self._columns(texts))
        return stopped

    def _begin(self, voice: Voice) -> Answer:
        messages = list(self.histories[voice.name])
        if self.session.system is not None:
            messages.insert(0, {"role": "system", "content": self.session.system})
        return self.session.answer(voice, messages, self.settings)

    def _end(self, voice: Voice, answer: Answer) -> None:
        self.histories[voice.name].append({"role": "assistant", "content": answer.text})
        if answer.is_cut:
            self._note(
                f"({voice.name}: cut after {self.settings.max_tokens} tokens, or at the end of the "
                "context: --max-tokens allows more)"
            )

    def _columns(self, texts: dict[str, str]) -> Table:
        table = Table(box=None, expand=True, padding=(0, 2, 0, 0), show_edge=False)
        for voice in self.session.voices:
            table.add_column(Text(self._heading(voice)), ratio=1, overflow="fold")
        table.add_row(*(Text(printable(text)) for text in texts.values()))
        return table

    def _heading(self, voice: Voice) -> str:
        return f"{voice.name} ({printable(voice.title, in_one_line=True)})"

    def _command(self, line: str) -> None:
        """Carry out a command.

        Raises:
            UserError: there is no such command, or its value is not allowed.
        """
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/help":
            self._note(_HELP)
        elif name == "/reset":
            self.histories = {}
            self._note("a new conversation")
        elif name == "/system":
            self.session.system = rest or None
            self.histories = {}
            self._note(f"a new conversation, with {_words(self.session.system)}")
        elif name == "/preset":
            if rest:
                self.settings = self.settings.with_numbers(rest)
            self._note(f"sampling: {describe(self.settings.sampling)}")
        elif name == "/set":
            key, _, value = rest.partition(" ")
            self._set(key, value.strip())
            self._note(f"sampling: {describe(self.settings.sampling)}")
        else:
            raise UserError(f"there is no command {name}: /help lists them")

    def _set(self, key: str, value: str) -> None:
        try:
            number = int(value) if key == "top_k" else float(value)
        except ValueError:
            number = None
        if key not in NUMBERS or number is None:
            raise UserError(
                f"/set takes a name and a number, e.g. /set temperature 0.7; the names are "
                f"{', '.join(NUMBERS)}"
            )
        self.settings = self.settings.with_numbers(None, **{key: number})

    def _note(self, text: str) -> None:
        self.notes.print(printable(text), markup=False, highlight=False, soft_wrap=True)


_HELP = f"""\
/reset           begin a new conversation
/system TEXT     begin a new conversation with this system message; without TEXT, with none
/preset NAME     sample as {", ".join(PRESETS)}; without NAME, show how
/set NAME VALUE  set one number: {", ".join(NUMBERS)}
/quit            end
Ctrl-C stops an answer, Ctrl-D ends."""


def read_line() -> str:
    """Return a line that the user types, with editing and a history."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, input() uses it once it is imported
    return input(_PROMPT)


def _words(system: str | None) -> str:
    return "no system message" if system is None else f"the system message: {system}"


@contextlib.contextmanager
def _stoppable(answer: Answer) -> Iterator[list[bool]]:
    """End the answer on Ctrl-C; yield a list that then has an entry."""
    interrupted: list[bool] = []
    try:
        yield interrupted
    except KeyboardInterrupt:
        interrupted.append(True)
    finally:
        answer.close()
