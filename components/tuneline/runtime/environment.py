"""Versions of the software that a step runs with: what they are, and whether they may be so.

The metadata of the installed tuneline names the packages and their bounds, in the extra of each
dependency set. Where tuneline is not installed but only on the path, nothing is known or checked.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from tuneline.errors import ToolError
from tuneline.steps import IMAGE_SETS, STEPS

if TYPE_CHECKING:
    from packaging.requirements import Requirement

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
_WITHOUT_EFFECT = {"huggingface_hub"}
"""Packages whose versions are recorded, but decide no result."""


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
        version = _version(name)
        if version is not None:
            versions[name] = version
    kernels = _kernel_sources()
    if kernels:
        versions["kernels"] = kernels
    return versions


def check_versions(step: str) -> None:
    """Refuse an environment whose packages have other versions than a step was made for.

    Args:
        step: Name of a step, or of a package that has several steps: "quantize".

    Raises:
        ToolError: a package has another version; the message names all of them.
    """
    wrong = []
    for requirement in _requirements(_image_sets(step)):
        version = _version(requirement.name)
        if version is not None and not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version} instead of {requirement.specifier}")
    if wrong:
        raise ToolError(
            f"the environment has packages that {step} was not made for, which can give wrong "
            f"results without an error: {', '.join(dict.fromkeys(wrong))}. Install these versions "
            "with pip, or run the step in its image"
        )


def versions_of(image_set: str) -> str:
    """Return the versions that decide the results of the steps of a dependency set, in one line."""
    own = {requirement.name for requirement in _requirements([image_set])}
    others = {requirement.name for requirement in _requirements(IMAGE_SETS)} - own
    # What no dependency set names, such as numpy, comes with the others, and counts for all sets.
    names = [
        name
        for name in PACKAGES
        if name not in _WITHOUT_EFFECT and name not in others and _version(name) is not None
    ]
    return ", ".join(f"{name} {_version(name)}" for name in names)


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


def _image_sets(step: str) -> list[str]:
    if step in STEPS:
        return [STEPS[step].image]
    modules = f"tuneline.{step}."
    return sorted({step.image for step in STEPS.values() if step.module.startswith(modules)})


def _requirements(image_sets: "list[str] | tuple[str, ...]") -> "list[Requirement]":
    """Return the requirements in the extras of dependency sets; the set "light" has no extra."""
    try:
        # The images without an extra lack the package `packaging`.
        from packaging.requirements import Requirement

        texts = importlib.metadata.requires("tuneline") or []
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return []
    found = [Requirement(text) for text in texts if "extra" in text]
    return [
        requirement
        for requirement in found
        if requirement.marker is not None
        and any(requirement.marker.evaluate({"extra": extra}) for extra in image_sets)
    ]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
