"""Run llama.cpp's own converter from safetensors to GGUF.

It is not on PyPI in the version that fits: our build of llama-cpp-python (images/gguf) puts it
beside the bindings, from the same source. TUNELINE_LLAMA_CPP names a checkout of llama.cpp to use
in its place. It runs as a process of its own, because it puts a package `conversion` and its own
`gguf` on sys.path.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from tuneline.errors import ToolError
from tuneline.quantize.disk import raise_if_full

VARIABLE = "TUNELINE_LLAMA_CPP"
SCRIPT = "convert_hf_to_gguf.py"


def find() -> Path:
    """Return the converter's path.

    Raises:
        ToolError: it is not installed.
    """
    named = os.environ.get(VARIABLE)
    if named:
        script = Path(named, SCRIPT)
        if not script.is_file():
            raise ToolError(f"{VARIABLE} is {named}, and there is no {SCRIPT} in it")
        return script
    bindings = importlib.util.find_spec("llama_cpp")
    if bindings is None or bindings.origin is None:
        raise ToolError(
            "llama-cpp-python is not installed, and GGUF exports need it: `make install`, the gguf "
            "image, or set quantize.gguf to [] in the recipe"
        )
    script = Path(bindings.origin).parent / "converter" / SCRIPT
    if not script.is_file():
        raise ToolError(
            f"llama-cpp-python has no converter beside it ({script}): it was not built with "
            f"images/gguf/llama-cpp.cmake; `make install` does, or let {VARIABLE} name a checkout "
            "of llama.cpp"
        )
    return script


def convert(model_dir: Path, file: Path) -> None:
    """Convert a directory with safetensors to a GGUF file in f16.

    Raises:
        ToolError: the converter refused the model; the message is its own last line.
        OSError: the disk is full.
    """
    done = subprocess.run(
        [
            *(sys.executable, str(find()), str(model_dir), "--outfile", str(file)),
            # The directory's name would otherwise be read for a model's family and size.
            *("--outtype", "f16", "--model-name", _name(model_dir)),
        ],
        capture_output=True,
        text=True,
        # Two OpenMP threads beside another busy process spin longer than they work.
        env={"OMP_NUM_THREADS": "1", **os.environ},
    )
    if done.returncode != 0:
        raise_if_full(file)
        # A progress bar may be the last that it wrote.
        lines = [line for line in done.stderr.splitlines() if line.strip() and "%|" not in line]
        raise ToolError(
            f"llama.cpp's converter refused the model: {lines[-1] if lines else 'no message'}; "
            "models it does not know can still be exported as gptq"
        )


def _name(model_dir: Path) -> str:
    """Return the name that stands in the file.

    llama.cpp knows from nothing but "phi-3" in it that the special tokens of these models take the
    white space after them along.
    """
    settings = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    file = model_dir / "tokenizer.json"
    tokens = json.loads(file.read_text(encoding="utf-8"))["added_tokens"] if file.is_file() else []
    takes_space = any(token["special"] and token["rstrip"] for token in tokens)
    return "phi-3 tuned" if settings.get("model_type") == "phi3" and takes_space else "tuned"
