"""Wheel and sdist, each built twice: a release is what anyone gets who builds the commit.

The first build is from a copy of the commit. The second builds the sdist from another copy, and the
wheel from the sdist, so that equal wheels also prove that the sdist is complete.
"""

import tarfile
from pathlib import Path

from release.commands import output_of
from release.provenance import sha256_of
from release.source import Source
from tuneline.errors import ProofError


def make_tools(lock: Path, python: str, where: Path) -> Path:
    """Install what a lock names into a new environment; return the environment's Python.

    Args:
        lock: images/tools/requirements.lock.
        python: program with which the environment is made.
        where: directory of the environment.
    """
    output_of([python, "-m", "venv", where])
    own = where / "bin" / "python"
    pip = [str(own), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    output_of([*pip, "--require-hashes", "--only-binary", ":all:", "-r", str(lock)])
    return own


def build_packages(source: Source, python: Path, scratch: Path) -> list[Path]:
    """Build wheel and sdist twice, and return the files.

    Args:
        source: the commit.
        python: a Python that has hatchling.
        scratch: an empty directory for copies and files.

    Raises:
        ProofError: the second build has other bytes than the first one.
    """
    first, second = scratch / "first", scratch / "second"
    # The files' rights differ between the copies, as they do between the clones of two users.
    for made, mask in ((first, "0022"), (second, "0077")):
        _build(source, python, _copy(source, made / "copy", mask), made, "sdist")
    _build(source, python, first / "copy", first, "wheel")
    (sdist,) = second.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(second / "unpacked", filter="data")
    (unpacked,) = (second / "unpacked").iterdir()
    _build(source, python, unpacked, second, "wheel")
    return compare(first, second)


def compare(first: Path, second: Path) -> list[Path]:
    """Return the packages in the directory `first`, if those in `second` are the same.

    Raises:
        ProofError: a file is missing or has other bytes.
    """
    packages = [path for path in sorted(first.iterdir()) if path.is_file()]
    names = [path.name for path in packages]
    again = sorted(path.name for path in second.iterdir() if path.is_file())
    if names != again:
        raise ProofError(f"the first build made {names} and the second {again}")
    for path in packages:
        before, after = sha256_of(path), sha256_of(second / path.name)
        if before != after:
            raise ProofError(
                f"{path.name} has other bytes when it is built again (SHA-256 {before}, then "
                f"{after}): look for times, rights, paths or an order that the build writes"
            )
    return packages


def _copy(source: Source, where: Path, mask: str) -> Path:
    """Write the files of the commit, without the rights in `mask`, to a new directory."""
    where.mkdir(parents=True)
    archive = where.with_suffix(".tar")
    output_of(
        ["git", "-c", f"tar.umask={mask}", "archive", "-o", archive, source.commit],
        where=source.root,
    )
    with tarfile.open(archive) as files:
        files.extractall(where, filter="data")
    archive.unlink()
    return where


def _build(source: Source, python: Path, tree: Path, made: Path, target: str) -> None:
    variables = {"SOURCE_DATE_EPOCH": str(source.epoch), "PYTHONPATH": ""}
    command = [str(python), "-m", "hatchling", "build", "--target", target, "--directory"]
    output_of([*command, made], where=tree, variables=variables)
