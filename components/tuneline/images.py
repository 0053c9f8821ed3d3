"""Names of the container images: one image per dependency set, pinned by version.

An image's name is part of KFP's cache key, so a name must always mean the same content: never use
the tag `latest`. steps.py says which steps run in each image.

No registry on the internet is ours, so no name here can be pulled from one. `make images` builds
under `localhost/`, which container engines take for a registry on the same machine. A recipe names
the registry to which the images were pushed, or says that the nodes have them
(`placement.registry`).
"""

from tuneline.version import VERSION

LOCAL = "local"
"""Value of `placement.registry` for images that the nodes have; `local:PREFIX` gives their names
another beginning than LOCAL_PREFIX."""
LOCAL_PREFIX = "localhost/tuneline"
"""Beginning of the names that `make images` gives."""
USER_ID = 65532
"""Numeric user that the images run as; any other user with write access to HOME works too."""


def of_set(name: str) -> str:
    """Return the image of a dependency set (the name of a directory in images/)."""
    return f"{LOCAL_PREFIX}/{name}:{VERSION}"


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


def is_on_nodes(registry: str | None) -> bool:
    """Return whether a value of `placement.registry` means that the nodes have the images.

    None means it too, because a compiled file has to name some images.
    """
    return registry is None or registry.partition(":")[0] == LOCAL


def has_host(name: str) -> bool:
    """Return whether a name begins with the host of a registry.

    Container engines look for other names on a public hub.
    """
    host, _, path = name.partition("/")
    return "." in host or host == "localhost" or (":" in host and bool(path))


def in_registry(image: str, registry: str | None) -> str:
    """Return the name that an image of this module has under a value of `placement.registry`."""
    prefix = registry or LOCAL
    if is_on_nodes(registry):
        prefix = prefix.partition(":")[2] or LOCAL_PREFIX
    return f"{prefix}/{image.removeprefix(f'{LOCAL_PREFIX}/')}"


def origin_in_words(registry: str | None) -> str:
    """Say which images the pods of a run use, and where the nodes get them."""
    names = in_registry(of_set("*"), registry)
    if is_on_nodes(registry):
        return f"{names}, which the nodes must have: they are never pulled"
    return f"{names}, which the nodes pull"
