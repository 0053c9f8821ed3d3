"""The conversation in a terminal: its commands, its columns, and what goes to which stream."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tuneline.pipelines.chat.session import Answer, Session, Voice
from tuneline.pipelines.chat.settings import Settings
from tuneline.pipelines.chat.speakers import Messages
from tuneline.pipelines.chat.terminal import TerminalChat
from tuneline.pipelines.cli import main

NewSession = Callable[..., Session]


def screen(width: int = 80, *, is_terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=is_terminal)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def chat(session: Session, *lines: str | type[BaseException], width: int = 80) -> TerminalChat:
    """Hold a conversation of lines that a user types, until the standard input ends."""
    typed: Iterator[str | type[BaseException]] = iter(lines)

    def read() -> str:
        line = next(typed, EOFError)
        if isinstance(line, str):
            return line
        raise line

    talk = TerminalChat(session, session.settings, out=screen(width), notes=screen(200))
    talk.introduce()
    talk.run(read)
    return talk


def test_a_conversation_and_its_commands(new_session: NewSession) -> None:
    talk = chat(
        *(new_session("f16"), "3Gi?", "And 4Gi?", "/preset creative", "/set top_p 0.5"),
        *("/set top_p 7", "/nonsense", "/help", KeyboardInterrupt, "/quit", "never read"),
    )
    roles = [message["role"] for message in talk.histories["tuned"]]
    assert roles == ["user", "assistant", "user", "assistant"]
    first, second = (talk.histories["tuned"][index]["content"] for index in (1, 3))
    # Nothing but answers goes to the standard output.
    assert shown(talk.out) == f"{first}\n{second}\n"
    notes = shown(talk.notes)
    assert "tuned: f16 of tiny-run, llama.cpp" in notes
    assert "sampling: greedy; the system message: 당신은 친절한 상담원입니다." in notes
    assert "(tuned: cut after 8 tokens" in notes
    assert "sampling: creative (temperature 0.8, top_p 0.95, top_k 50" in notes
    assert "sampling: custom (temperature 0.8, top_p 0.5," in notes
    assert "error: top_p is 7.0, but must be a number above 0 and at most 1" in notes
    assert "error: there is no command /nonsense: /help lists them" in notes
    assert "/reset           begin a new conversation" in notes


def test_a_new_conversation_forgets(
    new_session: NewSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = new_session("f16")
    asked: list[Messages] = []

    def answer(voice: Voice, messages: Messages, settings: Settings) -> Answer:
        asked.append(messages)
        return Session.answer(session, voice, messages, settings)

    monkeypatch.setattr(session, "answer", answer)
    chat(session, "3Gi?", "/reset", "4Gi?", "/system 짧게.", "5Gi?", "/system", "6Gi?")
    assert [[message["content"] for message in messages] for messages in asked] == [
        ["당신은 친절한 상담원입니다.", "3Gi?"],
        ["당신은 친절한 상담원입니다.", "4Gi?"],
        ["짧게.", "5Gi?"],
        ["6Gi?"],
    ]


@pytest.mark.slow
def test_two_models_answer_beside_or_below_each_other(new_session: NewSession) -> None:
    session = new_session("f16", compare=True)
    narrow = chat(session, "3Gi?")
    base, tuned = (narrow.histories[name][1]["content"] for name in ("base", "tuned"))
    lines = shown(narrow.out)
    assert lines == f"base (tiny)\n{base}\n\ntuned (f16)\n{tuned}\n"
    out = screen(120, is_terminal=True)
    wide = TerminalChat(session, session.settings, out=out, notes=screen())
    assert wide.ask("3Gi?") is False
    assert wide.histories == narrow.histories
    head = next(line for line in shown(out).splitlines() if "base (tiny)" in line)
    assert "tuned (f16)" in head


def test_what_a_model_writes_cannot_steer_the_terminal(
    new_session: NewSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = new_session("f16")

    def hostile(*_: object, **__: object) -> Iterator[str]:
        yield "한국어 \x1b[2J\x1b]0;x\x07"
        return True

    monkeypatch.setattr(session.voices[-1].speaker, "stream", hostile)
    assert shown(chat(session, "x").out) == "한국어 \\x1b[2J\\x1b]0;x\\x07\n"


def test_a_stopped_answer_stays(new_session: NewSession, monkeypatch: pytest.MonkeyPatch) -> None:
    session = new_session("f16", compare=True)

    def stopped(*_: object, **__: object) -> Iterator[str]:
        yield "half"
        raise KeyboardInterrupt

    monkeypatch.setattr(session.voices[0].speaker, "stream", stopped)
    talk = chat(session, "3Gi?")
    assert "(stopped)" in shown(talk.notes)
    assert [message["content"] for message in talk.histories["base"]] == ["3Gi?", "half"]
    # The tuned model was not asked: it does not get a second question after this one.
    assert talk.histories["tuned"] == []


def test_the_command_answers_once(run_dir: Path) -> None:
    line = ["chat", str(run_dir), "--format", "f16", "--max-tokens", "8"]
    once = CliRunner().invoke(main.app, [*line, "--prompt", "3Gi?"])
    assert once.exit_code == 0, once.output
    piped = CliRunner().invoke(main.app, line, input="3Gi?\n")
    assert piped.stdout == once.stdout != ""
    assert "cut after 8 tokens" in once.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--web", "--serve"], "--web, --serve and --prompt exclude each other"),
        (["--serve", "--compare"], "--serve takes one model"),
        (["--port", "8000"], "--port is the port of --web or --serve"),
        (["--temperature", "9"], "temperature is 9.0, but must be a number above 0"),
        (["--preset", "nice"], "there is no preset nice: choose one of greedy, factual"),
        (["--format", "f16"], "the standard input is empty: pipe a message in"),
    ],
)
def test_options_that_cannot_be_meant(run_dir: Path, options: list[str], message: str) -> None:
    done = CliRunner().invoke(main.app, ["chat", str(run_dir), *options])
    assert message in str(done.exception)
