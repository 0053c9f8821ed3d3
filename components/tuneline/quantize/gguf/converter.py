"""Run llama.cpp's own converter from safetensors to GGUF.

PyPI does not have the converter in the version that matches the bindings, so tuneline's build of
llama-cpp-python (images/gguf) installs converter and bindings from the same source. The environment
variable TUNELINE_LLAMA_CPP can name a checkout of llama.cpp whose converter is used instead. The
converter runs in a child process, because it puts a package `conversion` and its own version of
the package `gguf` on sys.path.
"""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

from tuneline.errors import ToolError
from tuneline.quantize.gguf import converter_input
from tuneline.quantize.gguf.support import gguf_problem
from tuneline.quantize.machine import raise_if_full

VARIABLE = "TUNELINE_LLAMA_CPP"
SCRIPT = "convert_hf_to_gguf.py"
_TABLE = "TEXT_MODEL_MAP"
"""Name of the converter's table of architectures, a dictionary."""


def find() -> Path:
    """Return the path of the converter's script.

    Raises:
        ToolError: the converter is not installed.
    """
    named = os.environ.get(VARIABLE)
    if named:
        script = Path(named, SCRIPT)
        if not script.is_file():
            raise ToolError(f"{VARIABLE} is {named}, but there is no {SCRIPT} in it")
        return script
    bindings = importlib.util.find_spec("llama_cpp")
    if bindings is None or bindings.origin is None:
        raise ToolError(
            "llama-cpp-python is not installed, but GGUF exports need it: run `make install`, use "
            "the gguf image, or set quantize.gguf to [] in the recipe"
        )
    script = Path(bindings.origin).parent / "converter" / SCRIPT
    if not script.is_file():
        raise ToolError(
            f"llama-cpp-python was installed without llama.cpp's converter script ({script}), "
            f"which images/gguf/llama-cpp.cmake adds: run `make install`, or set {VARIABLE} to a "
            "checkout of llama.cpp"
        )
    return script


def known_architectures() -> frozenset[str]:
    """Return the architectures that the installed converter reads, without running it.

    Returns:
        An empty set if the converter is not installed here.
    """
    try:
        table = find().parent / "conversion" / "__init__.py"
    except ToolError:
        return frozenset()
    if not table.is_file():
        return frozenset()
    for node in ast.parse(table.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == _TABLE and node.value:
            return frozenset(ast.literal_eval(node.value))
    return frozenset()


Part = Literal["all", "vocabulary", "nothing"]
"""What a conversion writes: the whole file, one with tokenizer and metadata only, or, after it has
found a name in GGUF for each tensor, nothing."""
_OPTIONS: dict[Part, list[str]] = {
    "all": [], "vocabulary": ["--vocab-only"], "nothing": ["--dry-run"],
}  # fmt: skip


def convert(
    model_dir: Path,
    file: Path,
    *,
    end_of_turn: int | None = None,
    adds_bos: bool | None = None,
    writes: Part = "all",
) -> None:
    """Convert a model directory with safetensors files to a GGUF file in f16.

    Args:
        model_dir: the model directory.
        file: the file to write.
        end_of_turn: token that ends a turn, besides the tokenizer's EOS token. llama.cpp knows the
            tokens of well-known models by name, and any other one only if the file names it.
        adds_bos: whether programs put the BOS token before a prompt; None: as the tokenizer asks.
        writes: what to write.

    Raises:
        ToolError: the converter failed; the message quotes the last line of the converter's output.
        OSError: the disk is full.
    """
    settings = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    problem = gguf_problem(settings)
    if problem is not None:
        raise ToolError(f"llama.cpp does not compute this model as transformers does: {problem}")
    with converter_input.complete(model_dir) as directory:
        done = subprocess.run(
            [
                # -P: the converter must not import modules from the working directory.
                *(sys.executable, "-P", "-m", "tuneline.quantize.gguf.run_converter"),
                *(json.dumps({"end_of_turn": end_of_turn, "adds_bos": adds_bos}), str(find())),
                *(str(directory), "--outfile", str(file)),
                # --model-name: by default the converter guesses family and size from the name of
                # the directory.
                *(
                    "--outtype",
                    "f16",
                    "--model-name",
                    _name(model_dir, settings),
                    *_OPTIONS[writes],
                ),
            ],
            capture_output=True,
            text=True,
            # One thread: if another process is busy, two OpenMP threads wait for each other (in a
            # busy loop) for longer than they work.
            env={"OMP_NUM_THREADS": "1", **os.environ},
        )
    if done.returncode != 0:
        raise_if_full(file)
        # Leave out progress bars, because one of them may be the last line.
        lines = [line for line in done.stderr.splitlines() if line.strip() and "%|" not in line]
        raise ToolError(
            f"llama.cpp's converter failed: {lines[-1] if lines else 'it printed no message'}; a "
            "model that it does not support can still be exported as gptq"
        )


def _name(model_dir: Path, settings: dict[str, Any]) -> str:
    """Return the model name to write into the GGUF file.

    The special tokens of Phi-3 include the white space that follows them. llama.cpp tokenises in
    this way only if the model name in the file contains "phi-3".
    """
    file = model_dir / "tokenizer.json"
    tokens = json.loads(file.read_text(encoding="utf-8"))["added_tokens"] if file.is_file() else []
    takes_space = any(token["special"] and token["rstrip"] for token in tokens)
    return "phi-3 tuned" if settings.get("model_type") == "phi3" and takes_space else "tuned"
