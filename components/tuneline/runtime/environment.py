"""Versions of the software that a step runs with, and whether the step was made for them.

The metadata of the installed tuneline names the packages and their bounds, in the extra of each
dependency set. Where tuneline is not installed but only on the path, nothing is known or checked.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tuneline.errors import ToolError
from tuneline.steps import IMAGE_SETS, STEPS

if TYPE_CHECKING:
    from packaging.requirements import Requirement

IMAGE_VARIABLE = "TUNELINE_IMAGE"
"""Environment variable with the name of the container image, with its digest if known."""

NO_USAGE_REPORTS = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
"""Variables that keep TRL and `evaluate` from reporting their use to others; without the internet,
each report is a request that fails. The images and local runs set them."""

PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "compressed-tensors",
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
    versions |= _installed(PACKAGES)
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
    requirements = _requirements(_image_sets(step))
    installed = _installed(requirement.name for requirement in requirements)
    wrong = []
    for requirement in requirements:
        version = installed.get(requirement.name)
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
    deciding = [name for name in PACKAGES if name not in _WITHOUT_EFFECT | others]
    return ", ".join(f"{name} {version}" for name, version in _installed(deciding).items())


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
    return sorted({entry.image for entry in STEPS.values() if entry.module.startswith(modules)})


def _requirements(image_sets: Collection[str]) -> "list[Requirement]":
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


def _installed(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed, by name."""
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
