"""The command that talks to a model."""

import contextlib
import shutil
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from tuneline.errors import UserError
from tuneline.models.sampling import PRESETS, Sampling
from tuneline.pipelines.chat.ports import ADDRESS
from tuneline.pipelines.chat.settings import DEFAULT_MAX_TOKENS, Settings
from tuneline.pipelines.chat.subject import Subject, find_subject
from tuneline.pipelines.cli.run import PANEL
from tuneline.pipelines.cli.terminal import console, say
from tuneline.runtime.printable import printable

if TYPE_CHECKING:
    from tuneline.pipelines.chat.session import Session

WEB_PORT, SERVE_PORT = 8765, 8000
_CTRL_C = 130
"""Exit code of programs that Ctrl-C stopped."""
_NOTES = Console(stderr=True)

app = typer.Typer()


@app.command(rich_help_panel=PANEL)
def chat(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="Local run (directory or name), directory of a model, .gguf file, or published "
            "repository ORG/NAME.",
            show_default=False,
        ),
    ],
    format: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="Export to talk to, e.g. q4_k_m.",
            show_default="the merged model",
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Answer this message and exit."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Let the base model answer too, side by side.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Model to compare with, a directory or a .gguf file; implies --compare.",
            show_default="base model of the run",
        ),
    ] = None,
    web: Annotated[
        bool, typer.Option("--web", help=f"Talk on a page at {ADDRESS} instead of the terminal.")
    ] = False,
    serve: Annotated[
        bool,
        typer.Option(
            "--serve", help=f"Serve an OpenAI-compatible API at {ADDRESS} (vLLM or llama.cpp)."
        ),
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65535,
            metavar="PORT",
            help="Port of --web or --serve.",
            show_default=f"{WEB_PORT} or {SERVE_PORT}",
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="System message.", show_default="prepare.system_prompt of the run"
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="PRESET",
            help=f"Sampling: {', '.join(PRESETS)}.",
            show_default="as published",
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Divisor of the logits; 0 takes the likeliest token.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Probability of the likeliest tokens to draw from.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Number of the likeliest tokens to draw from.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Divisor of the logits of tokens that the text has.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="COUNT",
            help="Largest number of tokens per answer.",
            show_default=str(DEFAULT_MAX_TOKENS),
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
) -> None:
    """Talk to a tuned model in the terminal, on a local page, or through an API.

    Answers are generated with the chat template, the stop tokens and the sampling that the model is
    published with. Without a terminal, the standard input is the message.
    """
    if sum((web, serve, prompt is not None)) > 1:
        raise UserError("--web, --serve and --prompt exclude each other: give one of them")
    if serve and (compare or base or system is not None or max_tokens or seed is not None):
        raise UserError(
            "--serve takes one model, a format, a port and the sampling; system message, length "
            "and seed are in each request"
        )
    if port is not None and not (web or serve):
        raise UserError("--port is the port of --web or --serve: give one of them")
    numbers = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
    }
    # Refuse what is out of bounds before a model is downloaded and loaded.
    Settings(Sampling()).with_numbers(preset, **numbers)
    compare = compare or base is not None
    subject = find_subject(model, format=format, base=base, needs_base=compare)
    if serve:
        if format is None:
            subject = _servable(model, subject)
        _serve(subject, SERVE_PORT if port is None else port, preset, numbers)
        return
    text = prompt
    if text is None and not web and not sys.stdin.isatty():
        text = sys.stdin.read().strip()
        if not text:
            raise UserError("the standard input is empty: pipe a message in, or give --prompt")
    if web or sys.stderr.isatty():
        _note(_loading(subject, compare=compare))
    # Imported here only, because importing numpy and llama.cpp takes a second.
    from tuneline.pipelines.chat.session import Session

    session = Session(subject, compare=compare)
    settings = session.settings.with_numbers(preset, **numbers)
    settings = replace(settings, max_tokens=max_tokens or settings.max_tokens, seed=seed)
    if system is not None:
        session.system = system or None
    if web:
        _show_page(session, settings, WEB_PORT if port is None else port)
    else:
        _talk(session, settings, text)


def _talk(session: "Session", settings: Settings, text: str | None) -> None:
    """Answer one message, or hold a conversation if `text` is None."""
    from tuneline.pipelines.chat.terminal import TerminalChat, read_line

    talk = TerminalChat(session, settings, out=console, notes=_NOTES)
    if text is not None:
        if talk.ask(text):
            raise typer.Exit(_CTRL_C)
        return
    talk.introduce()
    talk.run(read_line)


def _show_page(session: "Session", settings: Settings, port: int) -> None:
    from tuneline.pipelines.chat.web.server import ChatServer

    with ChatServer(session, settings, port=port) as server:
        say(f"{session.name}: {server.url}  (Ctrl-C ends)")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


def _loading(subject: Subject, *, compare: bool) -> str:
    """Return a line that says what the user waits for, and what would be ready sooner."""
    models = [subject.tuned, *([subject.base] if compare and subject.base else [])]
    text = f"loading {' and its base '.join(files.title for files in models)} of {subject.name}"
    if subject.tuned.kind == "checkpoint":
        text += " with transformers"
        if subject.gguf_formats:
            text += f" (on a CPU, --format {subject.gguf_formats[0]} loads and answers faster)"
    return text


def _note(text: str) -> None:
    _NOTES.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def _servable(name: str, subject: Subject) -> Subject:
    """Return the run's first GGUF file if its merged model needs vLLM, and vLLM is missing."""
    exports = subject.gguf_formats
    if subject.tuned.kind == "gguf" or shutil.which("vllm") is not None or not exports:
        return subject
    _note(
        f"vLLM, which serves a {subject.tuned.title}, is not installed: llama.cpp serves "
        f"{exports[0]} instead. --format chooses the model"
    )
    return find_subject(name, format=exports[0], base=None, needs_base=False)


def _serve(
    subject: Subject, port: int, preset: str | None, numbers: dict[str, float | None]
) -> None:
    from tuneline.pipelines.chat.serve import check_can_serve, serve

    check_can_serve(subject)
    say(f"loading {subject.tuned.title} of {subject.name}")

    def announce() -> None:
        say(
            f"{subject.name}: http://{ADDRESS}:{port}/v1  (OpenAI-compatible; Ctrl-C ends)\n"
            f"model: {subject.name} ({subject.tuned.title})"
        )

    serve(subject, port=port, preset=preset, numbers=numbers, announce=announce)
