"""What a step ran with, for the record of the artifact that it made."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

IMAGE_VARIABLE = "TUNELINE_IMAGE"
"""Where a container tells its image, with its digest if it is known."""

# Those whose version can change an artifact.
PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "gptqmodel",
    "huggingface_hub",
    "llama-cpp-python",
    "lm-eval",
    "numpy",
    "peft",
    "safetensors",
    "sentencepiece",
    "tokenizers",
    "torch",
    "transformers",
    "triton",
    "trl",
    "tuneline",
)


def describe_environment() -> dict[str, str]:
    """Return versions by name; a package that is not installed has none."""
    found = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "os": f"{platform.system()} {platform.release()}",
    }
    image = os.environ.get(IMAGE_VARIABLE)
    if image:
        found["image"] = image
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    kernels = _kernel_sources()
    if kernels:
        found["kernels"] = kernels
    return found


@functools.cache
def _kernel_sources() -> str | None:
    """Return a hash over the sources of `tuneline.kernels`: it changes between releases too."""
    spec = importlib.util.find_spec("tuneline.kernels")
    if spec is None or spec.origin is None:
        return None
    digest = hashlib.sha256()
    for path in sorted(Path(spec.origin).parent.rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]
