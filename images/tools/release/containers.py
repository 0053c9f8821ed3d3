"""The images of a release: built by `make images`, pushed, and asked what is in them."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from release.bills import QUERY
from release.commands import output_of, run
from tuneline import images
from tuneline.errors import ProofError, ToolError

BILL = "/opt/tuneline/sbom.cdx.json"
DIGEST = re.compile(r"^sha256:[0-9a-f]{64}$")


@dataclass(frozen=True)
class Image:
    """One image of a release."""

    set_name: str
    """Its dependency set, a directory in images/."""
    name: str
    """Its name with the tag; in the registry, if it was pushed."""
    identity: str
    """Digest of its configuration, by which the engine knows it."""
    digest: str | None
    """Digest of its manifest in the registry; None: it was not pushed."""

    @property
    def reference(self) -> str | None:
        """Name with the digest, which always means the same content; None if it has none."""
        return f"{self.name.rpartition(':')[0]}@{self.digest}" if self.digest else None

    @property
    def subject(self) -> dict[str, Any]:
        """The image as a component of CycloneDX."""
        name, _, version = self.name.rpartition(":")
        known = self.digest or self.identity
        algorithm = [{"alg": "SHA-256", "content": known.removeprefix("sha256:")}]
        ref = {"bom-ref": f"{name}@{known}"}
        return {"type": "container", **ref, "name": name, "version": version, "hashes": algorithm}


def engine_version() -> str:
    """Return the version of the container engine.

    Raises:
        ToolError: no engine answers.
    """
    try:
        return output_of(["docker", "version", "--format", "{{.Server.Version}}"]).strip()
    except ToolError as error:
        reason = str(error).splitlines()[-1]
        raise ToolError(
            f"no container engine answers ({reason}): start Docker or set DOCKER_HOST, or release "
            "without images by `make release IMAGES=no`"
        ) from None


def build(sets: list[str], root: Path) -> None:
    """Build images as `make images` does, with the variables of make that this process was given.

    Args:
        sets: dependency sets.
        root: the checkout.
    """
    make = os.environ.get("MAKE", "make")
    run(
        [make, "--no-print-directory", "images", f"SETS={' '.join(sets)}"], where=root, variables={}
    )


def push(set_name: str, registry: str | None) -> Image:
    """Return an image that was built; if a registry is given, push the image to it first.

    Args:
        set_name: the image's dependency set.
        registry: registry with a path, as in `placement.registry`; None: do not push.

    Raises:
        ProofError: the engine does not say which digest the registry gave the image.
    """
    local = images.of_set(set_name)
    identity = _inspect(local, "{{.Id}}")
    if registry is None:
        return Image(set_name, local, identity, None)
    name = images.in_registry(local, registry)
    output_of(["docker", "tag", local, name])
    output_of(["docker", "push", name])
    known = json.loads(_inspect(name, "{{json .RepoDigests}}"))
    digests = {
        each.rpartition("@")[2] for each in known if each.startswith(f"{name[: name.rfind(':')]}@")
    }
    if len(digests) != 1 or not DIGEST.match(digest := digests.pop()):
        raise ProofError(
            f"the engine knows {known} of {name}, so its digest in the registry is not certain: "
            f"remove the image's other digests (docker image rm {name}) and release again"
        )
    return Image(set_name, name, identity, digest)


def contents(image: Image) -> tuple[dict[str, Any], str, str]:
    """Return what an image has: its bill of Python, its packages of Debian, its os-release."""
    identity = image.identity
    bill = _read(identity, "cat", BILL)
    packages = _read(identity, "dpkg-query", "--show", f"--showformat={QUERY}")
    return json.loads(bill), packages, _read(identity, "cat", "/etc/os-release")


def base_image(build_arguments: str, root: Path) -> dict[str, Any]:
    """Return the base of the images as a resource of a provenance.

    Args:
        build_arguments: BUILD_ARGS of make, which may name another base than the Dockerfile does.
        root: the checkout.
    """
    text = (root / "images" / "Dockerfile").read_text(encoding="utf-8")
    names = re.findall(r"\bBASE=(\S+)", build_arguments) or re.findall(
        r"^ARG BASE=(\S+)", text, re.M
    )
    name = names[-1]
    known = json.loads(_inspect(name, "{{json .RepoDigests}}"))
    digest = known[0].rpartition("@")[2] if known else _inspect(name, "{{.Id}}")
    return {"name": name, "digest": {"sha256": digest.removeprefix("sha256:")}}


def _inspect(name: str, form: str) -> str:
    return output_of(["docker", "image", "inspect", "--format", form, name]).strip()


def _read(identity: str, program: str, *arguments: str) -> str:
    start = ["docker", "run", "--rm", "--network=none", f"--entrypoint={program}"]
    return output_of([*start, identity, *arguments])
