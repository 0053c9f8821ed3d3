"""Names of the container images: one image per dependency set, pinned by version.

An image's name is part of KFP's cache key, so a name must always mean the same content: never use
the tag `latest`. steps.py says which steps run in each image.
"""

from tuneline.version import VERSION

REGISTRY = "tuneline"
"""Default prefix of the image names; a recipe replaces it with `placement.registry`."""
USER_ID = 65532
"""Numeric user that the images run as; any other user with write access to HOME works too."""


def of_set(name: str) -> str:
    """Return the image of a dependency set (the name of a directory in images/)."""
    return f"{REGISTRY}/{name}:{VERSION}"


LIGHT = of_set("light")
"""kfp, pydantic, numpy and the Kubernetes client; no torch."""
TRAIN = of_set("train")
"""torch, transformers, peft, trl, bitsandbytes and datasets."""
GGUF = of_set("gguf")
"""The llama.cpp converter and quantiser."""
GPTQ = of_set("gptq")
"""gptqmodel, optimum and compressed-tensors."""
EVALUATE = of_set("evaluate")
"""lm-eval."""
PUBLISH = of_set("publish")
"""huggingface_hub."""


def in_registry(image: str, registry: str) -> str:
    """Return the name of an image of this module in another registry."""
    return f"{registry}/{image.removeprefix(f'{REGISTRY}/')}"
