"""What a step ran with, for the record of the artifact that it made."""

import importlib.metadata
import os
import platform

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
    found = {"python": platform.python_version(), "machine": platform.machine()}
    image = os.environ.get(IMAGE_VARIABLE)
    if image:
        found["image"] = image
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
