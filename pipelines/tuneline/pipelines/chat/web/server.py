"""The server of the page: three files, and answers that are streamed as lines of JSON.

The server keeps no conversation: the page sends all messages with each question. It answers only
requests that a page of its own makes: the names in Host and Origin are checked, because any site
that the user visits can send requests to this machine, and can have a name that resolves to it.
"""

import contextlib
import json
import logging
from collections.abc import Generator
from dataclasses import replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pydantic import Field

from tuneline.errors import TunelineError, UserError
from tuneline.html.stylesheet import STYLESHEET
from tuneline.models.sampling import PRESETS, Sampling
from tuneline.pipelines.chat.ports import ADDRESS, port_problem
from tuneline.pipelines.chat.session import Session, Voice
from tuneline.pipelines.chat.settings import Settings
from tuneline.strict_model import StrictModel

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 8 << 20
_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Message(StrictModel):
    """A message of a conversation."""

    role: str
    content: str


class Question(StrictModel):
    """What the page sends."""

    voice: str
    """Which model is asked."""
    messages: list[Message] = Field(min_length=1)
    sampling: Sampling
    max_tokens: int = Field(ge=1)
    seed: int | None = None


class ChatServer(ThreadingHTTPServer):
    """The server; port 0 takes a free port."""

    daemon_threads = True

    def __init__(self, session: Session, settings: Settings, *, port: int) -> None:
        self.session = session
        self.settings = settings
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            raise UserError(port_problem(port, error)) from None
        self.own_names = {f"{name}:{self.server_port}" for name in (ADDRESS, "localhost")}

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{ADDRESS}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Send a file of the page, or what the page has to know."""
        if not self._is_own():
            return
        if self.path == "/session":
            self._send(json.dumps(_describe(self.server)).encode(), "application/json")
        elif self.path in _FILES:
            name, kind = _FILES[self.path]
            content = Path(__file__).with_name(name).read_text(encoding="utf-8")
            if name == "page.css":
                content = STYLESHEET + content
            self._send(content.encode(), f"{kind}; charset=utf-8")
        else:
            self._refuse(HTTPStatus.NOT_FOUND, f"there is no page {self.path}")

    def do_POST(self) -> None:
        """Stream an answer: one line of JSON per piece of text, and a last line."""
        if not self._is_own():
            return
        size = self.headers.get("Content-Length", "")
        is_json = self.headers.get("Content-Type", "").partition(";")[0] == "application/json"
        if self.path != "/answer" or not is_json or not size.isdecimal():
            self._refuse(HTTPStatus.BAD_REQUEST, "POST JSON to /answer")
            return
        if int(size) > MAX_BODY_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "the conversation is too long")
            return
        try:
            question = Question.parse(self.rfile.read(int(size)).decode("utf-8", "replace"))
            voice = _voice(self.server.session, question.voice)
        except UserError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
            return
        self._head(HTTPStatus.OK, "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        # A user who stops an answer closes the connection.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            with contextlib.closing(_lines(self.server, question, voice)) as lines:
                for line in lines:
                    self._chunk(json.dumps(line).encode() + b"\n")
            self._chunk(b"")

    def log_message(self, format: str, *args: Any) -> None:
        """Log requests for debugging only."""
        logger.debug(format, *args)

    def _is_own(self) -> bool:
        """Return whether the request is of the server's own page; otherwise refuse it."""
        names = self.server.own_names
        origin = self.headers.get("Origin")
        if self.headers.get("Host") in names and (
            origin is None or origin.removeprefix("http://") in names
        ):
            return True
        self._refuse(HTTPStatus.FORBIDDEN, f"open {self.server.url}")
        return False

    def _head(self, status: HTTPStatus, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")

    def _send(self, body: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._head(status, kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        # The body of the request was not read, so the connection cannot go on.
        self.close_connection = True
        self._send(json.dumps({"error": reason}).encode(), "application/json", status)

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


def _describe(server: ChatServer) -> dict[str, Any]:
    session, settings = server.session, server.settings
    return {
        "name": session.name,
        "voices": [
            {"name": voice.name, "title": voice.title, "where": voice.speaker.where}
            for voice in session.voices
        ],
        "has_template": session.has_template,
        "system": session.system,
        "sampling": settings.sampling.model_dump(),
        "published": session.settings.sampling.model_dump(),
        "presets": {name: preset.model_dump() for name, preset in PRESETS.items()},
        "max_tokens": settings.max_tokens,
        "seed": settings.seed,
    }


def _voice(session: Session, name: str) -> Voice:
    for voice in session.voices:
        if voice.name == name:
            return voice
    names = ", ".join(voice.name for voice in session.voices)
    raise UserError(f"there is no voice {name}: choose one of {names}")


def _lines(
    server: ChatServer, question: Question, voice: Voice
) -> Generator[dict[str, Any], None, None]:
    settings = replace(
        server.settings,
        sampling=question.sampling,
        max_tokens=question.max_tokens,
        seed=question.seed,
    )
    messages = [message.model_dump() for message in question.messages]
    answer = server.session.answer(voice, messages, settings)
    try:
        for piece in answer:
            yield {"text": piece}
        yield {"end": True, "is_cut": answer.is_cut}
    except TunelineError as error:
        yield {"error": str(error)}
    finally:
        answer.close()
