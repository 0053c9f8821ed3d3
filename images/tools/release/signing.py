"""SHA256SUMS of a release, and signatures by cosign where a key is given.

The provenance, the bills and images.json are in SHA256SUMS, so that one signature covers all files,
and the digests of the images.
"""

import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path

from release.commands import output_of
from release.containers import Image
from release.provenance import sha256_of
from tuneline.errors import ToolError

SUMS = "SHA256SUMS"
BUNDLE = "SHA256SUMS.sigstore.json"


def write_sums(directory: Path) -> Path:
    """Write the SHA-256 of every file of a directory, as `sha256sum --check` reads it."""
    sums = directory / SUMS
    files = sorted(path for path in directory.iterdir() if path.is_file() and path != sums)
    lines = [f"{sha256_of(path)}  {path.name}\n" for path in files]
    sums.write_text("".join(lines), encoding="utf-8")
    return sums


def check_cosign() -> None:
    """Check that cosign can be called, before anything is built.

    Raises:
        ToolError: it is not on the PATH.
    """
    if shutil.which("cosign") is None:
        raise ToolError(
            "COSIGN_KEY is set, but there is no program cosign on the PATH: install it, or unset "
            "COSIGN_KEY for a release that is not signed"
        )


def sign(sums: Path, images: Iterable[Image], key: str, options: str) -> list[str]:
    """Sign SHA256SUMS and the pushed images with cosign; return what was signed.

    Args:
        sums: the file SHA256SUMS, beside which the signature is written.
        images: the images.
        key: file or KMS address of the key; cosign reads the password from COSIGN_PASSWORD.
        options: more options of cosign, as in a shell.

    Raises:
        ToolError: cosign failed.
    """
    common = ["--yes", "--key", key, *shlex.split(options)]
    bundle = sums.with_name(BUNDLE)
    output_of(["cosign", "sign-blob", *common, "--bundle", bundle, sums])
    signed = [sums.name]
    for image in images:
        if image.reference:
            output_of(["cosign", "sign", *common, image.reference])
            signed.append(image.reference)
    return signed
