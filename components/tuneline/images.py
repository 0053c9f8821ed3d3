"""Names of the container images: one image per dependency set, pinned by version.

The name is part of KFP's cache key, so a name must stand for one content: never use `latest`.
Which steps run in an image is in steps.py.
"""

from tuneline.version import VERSION

REGISTRY = "tuneline"
"""Prefix of the names below; `placement.registry` of a recipe replaces it."""
USER_ID = 65532
"""Numeric user that the images run as; any other user works too if it can write to HOME."""


def of_set(name: str) -> str:
    """Return the image of a dependency set, a directory in images/."""
    return f"{REGISTRY}/{name}:{VERSION}"


LIGHT = of_set("light")
"""kfp, pydantic, numpy and the Kubernetes client; no torch."""
TRAIN = of_set("train")
"""torch, transformers, peft, trl, bitsandbytes and datasets."""
GGUF = of_set("gguf")
"""The llama.cpp converter and quantiser."""
GPTQ = of_set("gptq")
"""gptqmodel and optimum."""
EVALUATE = of_set("evaluate")
"""lm-eval."""
PUBLISH = of_set("publish")
"""huggingface_hub."""


def in_registry(image: str, registry: str) -> str:
    """Return the name that one of the images above has in another registry."""
    return f"{registry}/{image.removeprefix(f'{REGISTRY}/')}"
