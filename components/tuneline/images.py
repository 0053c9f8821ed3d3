"""The container images that the components run in: one a dependency set, pinned by version.

KFP's cache keys on the image's name, so a name stands for one content: never `latest`.
"""

from tuneline.version import VERSION

REGISTRY = "tuneline"

LIGHT = f"{REGISTRY}/light:{VERSION}"
"""kfp, pydantic, numpy, the Kubernetes client: plan, gate, report, diagnose, train-on-nodes."""
TRAIN = f"{REGISTRY}/train:{VERSION}"
"""torch, transformers, peft, trl, bitsandbytes, datasets: fetch, prepare, train, merge."""
GGUF = f"{REGISTRY}/gguf:{VERSION}"
"""The llama.cpp converter and quantiser."""
GPTQ = f"{REGISTRY}/gptq:{VERSION}"
"""gptqmodel, optimum."""
EVALUATE = f"{REGISTRY}/evaluate:{VERSION}"
"""lm-eval."""
PUBLISH = f"{REGISTRY}/publish:{VERSION}"
"""huggingface_hub."""


def in_registry(image: str, registry: str) -> str:
    """Return the name that one of the images above has in another registry."""
    return f"{registry}/{image.removeprefix(f'{REGISTRY}/')}"
