"""llama-cpp-python's own server answers requests of OpenAI clients as the model was published."""

import http.client
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
from app_server import serving

from tuneline.errors import UserError
from tuneline.models.sampling import PRESETS
from tuneline.pipelines.chat import serve
from tuneline.pipelines.chat.serve import check_can_serve, gguf_app
from tuneline.pipelines.chat.subject import Subject, find_subject

QUESTION = [{"role": "user", "content": "How many Mi are 3Gi?"}]


def subject_of(run_dir: Path, format: str) -> Subject:
    return find_subject(str(run_dir), format=format, base=None, needs_base=False)


@pytest.fixture(scope="module")
def port(run_dir: Path) -> Iterator[int]:
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    with serving(gguf_app(subject_of(run_dir, "f16"), PRESETS["greedy"])) as port:
        yield port


def post(port: int, **body: Any) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    plain = {"model": "tiny-run", "messages": QUESTION, "max_tokens": 8}
    content = json.dumps(plain | body)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", content, headers)
    return connection.getresponse()


def test_a_streamed_chat_completion(port: int, run_dir: Path) -> None:
    events = [
        line.decode().removeprefix("data: ").strip()
        for line in post(port, stream=True, model=None)
        if line.startswith(b"data: ")
    ]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    # Without a model in the request, the library names the path of the file.
    assert {chunk["model"] for chunk in chunks} == {"tiny-run"}
    streamed = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    # Requests that do not say how to sample are answered greedily, as the chat answers them.
    whole = json.loads(post(port, temperature=None).read())
    assert whole["choices"][0]["message"]["content"] == streamed != ""
    hot = json.loads(post(port, temperature=2.0, top_k=0, seed=1).read())
    assert hot["choices"][0]["message"]["content"] != streamed


def test_the_command_serves_a_gguf_file_where_vllm_is_missing(run_dir: Path) -> None:
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tuneline.pipelines.cli.main"]
    command += ["chat", str(run_dir), "--serve", "--port", str(port)]
    with subprocess.Popen(
        command, env=os.environ | {"PATH": ""}, stdout=PIPE, stderr=PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            loading, ready = process.stdout.readline(), process.stdout.readline()
            assert loading == "loading f16 of tiny-run\n"
            assert ready.startswith(f"tiny-run: http://127.0.0.1:{port}/v1 ")
            answer = json.loads(_post_soon(port, process).read())
            assert answer["choices"][0]["message"]["content"]
        finally:
            process.terminate()
        assert "vLLM, which serves a merged model, is not installed" in process.stderr.read()


def _post_soon(port: int, process: "subprocess.Popen[str]") -> http.client.HTTPResponse:
    """Post as soon as the server listens, which it does a moment after it has said so."""
    while True:
        assert process.poll() is None
        try:
            return post(port)
        except ConnectionRefusedError:
            time.sleep(0.02)


def test_what_to_install_is_named(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"needs vLLM, which is not .* with --format \(f16\)"):
        check_can_serve(subject_of(run_dir, "merged"))
    monkeypatch.setattr(serve, "_SERVER_PACKAGES", ("json", "no_such_server"))
    assert importlib.util.find_spec("no_such_server") is None
    with pytest.raises(UserError, match=r"installed: .* pip install no_such_server$"):
        check_can_serve(subject_of(run_dir, "f16"))
