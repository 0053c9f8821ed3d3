"""An OpenAI-compatible API for a model, by the server of a library that is installed."""

import importlib.util
import json
import os
import shutil
import socket
from collections.abc import Callable
from typing import Any

from tuneline.errors import UserError
from tuneline.models.sampling import Sampling
from tuneline.pipelines.chat.ports import ADDRESS, port_problem
from tuneline.pipelines.chat.published import read_context, read_published
from tuneline.pipelines.chat.settings import Settings
from tuneline.pipelines.chat.subject import Subject
from tuneline.quantize.machine import num_threads

_SERVER_PACKAGES = ("fastapi", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings")
_COMPLETIONS = ("/v1/completions", "/v1/chat/completions")

Scope = dict[str, Any]


def check_can_serve(subject: Subject) -> None:
    """Check that a server for the model is installed.

    Raises:
        UserError: there is none; the message says what to install.
    """
    files = subject.tuned
    if files.kind == "checkpoint" and shutil.which("vllm") is None:
        exports = ", ".join(subject.gguf_formats)
        other = f", or choose a GGUF file with --format ({exports})" if exports else ""
        raise UserError(
            f"serving a {files.title} needs vLLM, which is not installed: install it (pip install "
            f"vllm, for machines with a GPU){other}"
        )
    missing = [name for name in _SERVER_PACKAGES if importlib.util.find_spec(name) is None]
    if files.kind == "gguf" and missing:
        raise UserError(
            "serving a GGUF file needs packages of llama-cpp-python's server, which are not "
            f"installed: run `make install`, or pip install {' '.join(missing)}"
        )


def serve(
    subject: Subject,
    *,
    port: int,
    preset: str | None,
    numbers: dict[str, float | None],
    announce: Callable[[], None],
) -> None:
    """Serve a model on 127.0.0.1 until the process is stopped.

    Args:
        subject: the model.
        port: port to listen on.
        preset: preset of the sampling for requests that do not say; None: as published.
        numbers: single numbers of the sampling, which replace those of the preset.
        announce: is called when a GGUF file is loaded, just before it is served; for vLLM, which
            loads the model itself and says so, when it starts.

    Raises:
        UserError: a number is out of its bounds, or the port is taken.
    """
    settings = Settings(read_published(subject.tuned)).with_numbers(preset, **numbers)
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((ADDRESS, port))
        except OSError as error:
            raise UserError(port_problem(port, error)) from None
    if subject.tuned.kind == "gguf":
        # Imported here, because the package is optional.
        import uvicorn

        app = gguf_app(subject, settings.sampling)
        announce()
        uvicorn.run(app, host=ADDRESS, port=port, log_level="warning")
        return
    # vLLM replaces this process. It reads generation_config.json itself.
    command = ["vllm", "serve", str(subject.tuned.path), "--served-model-name", subject.name]
    command += ["--host", ADDRESS, "--port", str(port)]
    if preset is not None or any(value is not None for value in numbers.values()):
        numbers_json = json.dumps(settings.sampling.model_dump())
        command += ["--override-generation-config", numbers_json]
    announce()
    os.execvp(command[0], command)


def gguf_app(subject: Subject, sampling: Sampling) -> "WithDefaults":
    """Return the ASGI application of llama-cpp-python's server for a GGUF file.

    Args:
        subject: the model.
        sampling: how to sample if a request does not say.
    """
    from llama_cpp.server.app import create_app
    from llama_cpp.server.settings import ModelSettings, ServerSettings

    num_context = read_context(subject.tuned)
    model = ModelSettings(
        model=str(subject.tuned.path),
        model_alias=subject.name,
        n_ctx=num_context,
        n_gpu_layers=-1,
        # By default the server computes prompts on all cores, whose threads wait for each other.
        n_threads=num_threads(),
        n_threads_batch=num_threads(),
        last_n_tokens_size=num_context,
        verbose=False,
    )
    app = create_app(server_settings=ServerSettings(), model_settings=[model])
    # The chunks of a stream name the model of the request, or else the path of the file.
    return WithDefaults(app, {"model": subject.name, **llama_defaults(sampling)})


def llama_defaults(sampling: Sampling) -> dict[str, float]:
    """Return a sampling under the names of llama-cpp-python's requests."""
    return {
        "temperature": 0.0 if sampling.is_greedy else sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "repeat_penalty": sampling.repetition_penalty,
        "min_p": 0.0,
    }


class WithDefaults:
    """An ASGI application whose requests for completions get values that they do not state.

    llama-cpp-python samples at a temperature of 0.8 unless a request says otherwise, whatever the
    file's metadata say.
    """

    def __init__(self, app: Any, defaults: dict[str, float | str]) -> None:
        self._app = app
        self._defaults = defaults

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Answer a request."""
        if scope["type"] != "http" or scope["path"] not in _COMPLETIONS:
            await self._app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        try:
            given = json.loads(body)
        except ValueError:
            given = None  # the application says what is wrong with it
        if isinstance(given, dict):
            stated = {key: value for key, value in given.items() if value is not None}
            body = json.dumps({**self._defaults, **stated}).encode()
        headers = [each for each in scope["headers"] if each[0] != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        replayed = False

        async def replay() -> Any:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app({**scope, "headers": headers}, replay, send)
