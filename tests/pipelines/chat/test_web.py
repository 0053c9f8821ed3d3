"""The page of a chat: its files, its streamed answers, and whom the server answers."""

import http.client
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tuneline.errors import UserError
from tuneline.models.sampling import PRESETS
from tuneline.pipelines.chat.session import Session
from tuneline.pipelines.chat.web.server import ChatServer

NewSession = Callable[..., Session]
GREEDY = PRESETS["greedy"].model_dump()


@pytest.fixture
def server(new_session: NewSession) -> Iterator[ChatServer]:
    session = new_session("f16", compare=True)
    with ChatServer(session, session.settings, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def request(
    server: ChatServer, method: str, path: str, body: Any = None, **headers: str
) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    sent = {"Content-Type": "application/json"} if body is not None else {}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    content = body if isinstance(body, str | None) else json.dumps(body)
    connection.request(method, path, content, sent)
    return connection.getresponse()


def question(**values: Any) -> dict[str, Any]:
    plain = {
        "voice": "tuned",
        "messages": [{"role": "user", "content": "3Gi?"}],
        "sampling": GREEDY,
        "max_tokens": 8,
        "seed": None,
    }
    return plain | values


def test_answers_are_streamed(server: ChatServer) -> None:
    texts = {}
    for name in ("base", "tuned"):
        response = request(server, "POST", "/answer", question(voice=name))
        assert response.status == 200
        lines = [json.loads(line) for line in response]
        assert lines[-1] == {"end": True, "is_cut": True}
        texts[name] = "".join(line["text"] for line in lines[:-1])
    session = server.session
    for voice in session.voices:
        messages = question()["messages"]
        answer = session.answer(voice, messages, session.settings)
        assert "".join(answer) == texts[voice.name]


def test_the_page_loads_nothing_from_elsewhere(server: ChatServer) -> None:
    for path in ("/", "/page.css", "/page.js"):
        response = request(server, "GET", path)
        text = response.read().decode()
        assert response.status == 200 and text
        assert "default-src 'none'" in (response.getheader("Content-Security-Policy") or "")
        assert not re.search(r"https?://|innerHTML|insertAdjacentHTML|document\.write", text)
    described = json.loads(request(server, "GET", "/session").read())
    assert [voice["name"] for voice in described["voices"]] == ["base", "tuned"]
    assert described["system"] == "당신은 친절한 상담원입니다."
    assert described["published"]["top_k"] == 1


def test_other_sites_get_no_answer(server: ChatServer) -> None:
    port = server.server_port
    for headers in (
        {"Host": "evil.example"},
        {"Host": f"evil.example:{port}"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
    ):
        response = request(server, "POST", "/answer", question(), **headers)
        assert response.status == 403, headers
        assert json.loads(response.read())["error"] == f"open http://127.0.0.1:{port}/"
    own = request(server, "GET", "/session", Origin=f"http://localhost:{port}")
    assert own.status == 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (question(voice="other"), "there is no voice other: choose one of base, tuned"),
        (question(messages=[]), "messages is [], but must be a list of mappings"),
        (question(sampling=GREEDY | {"temperature": 9}), "sampling.temperature is 9, but must be"),
        (question(max_tokens=0), "max_tokens is 0"),
        ("{", "JSON"),
    ],
)
def test_a_wrong_question_is_explained(server: ChatServer, body: Any, message: str) -> None:
    response = request(server, "POST", "/answer", body)
    assert response.status == 400
    assert message in json.loads(response.read())["error"]


def test_a_conversation_that_does_not_fit_is_explained(server: ChatServer) -> None:
    long = [{"role": "user", "content": "Mi " * 3000}]
    response = request(server, "POST", "/answer", question(messages=long))
    (line,) = [json.loads(line) for line in response]
    assert "tokens, and the model tuned holds 2048: begin a new one" in line["error"]


def test_a_user_who_goes_away_ends_the_computation(server: ChatServer) -> None:
    voice = server.session.voices[-1]
    response = request(server, "POST", "/answer", question(max_tokens=1900))
    assert json.loads(response.readline())["text"]
    assert voice.lock.locked()
    response.close()
    deadline = time.monotonic() + 30
    while voice.lock.locked():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_port_that_is_taken(server: ChatServer) -> None:
    port = server.server_port
    with pytest.raises(UserError, match=f"port {port} is taken by another program: name another"):
        ChatServer(server.session, server.settings, port=port)
