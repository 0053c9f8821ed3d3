"""Versions of the software that a step ran with, for the record of its artifact."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

IMAGE_VARIABLE = "TUNELINE_IMAGE"
"""Environment variable with the name of the container image, with its digest if known."""

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
"""Packages whose version can change an artifact."""


def describe_environment() -> dict[str, str]:
    """Return versions by name, without packages that are not installed."""
    versions = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "os": f"{platform.system()} {platform.release()}",
    }
    image = os.environ.get(IMAGE_VARIABLE)
    if image:
        versions["image"] = image
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    kernels = _kernel_sources()
    if kernels:
        versions["kernels"] = kernels
    return versions


@functools.cache
def _kernel_sources() -> str | None:
    """Return a hash of the sources of `tuneline.kernels`, which can differ within one version."""
    spec = importlib.util.find_spec("tuneline.kernels")
    if spec is None or spec.origin is None:
        return None
    digest = hashlib.sha256()
    for path in sorted(Path(spec.origin).parent.rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]
