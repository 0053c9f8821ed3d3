"""How a release was made: an in-toto statement (v1) with SLSA's provenance (v1).

The statement names every file and image with its SHA-256, the commit, the locks that the build
installed from, and the machine's tools. It is worth as much as its signature and its builder:
`urn:tuneline:builder:local` is some machine on which somebody ran `make release`.
"""

import datetime
import hashlib
import os
import platform
import uuid
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from release.containers import Image
from release.source import Source

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:tuneline:make-release:v1"
"""The build is `make release` of the Makefile at the commit, with the external parameters as
variables of make."""
LOCAL_BUILDER = "urn:tuneline:builder:local"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def statement(
    source: Source,
    *,
    files: Iterable[Path],
    images: Iterable[Image],
    locks: Iterable[Path],
    materials: Iterable[Mapping[str, Any]],
    parameters: Mapping[str, Any],
    tools: Mapping[str, str],
    started: datetime.datetime,
) -> dict[str, Any]:
    """Return the statement.

    Args:
        source: the commit.
        files: files of the release.
        images: images of the release; those that were not pushed are no subjects.
        locks: locks below the checkout.
        materials: more resources that the build used, with their digests.
        parameters: variables of make that decide what is built.
        tools: versions of programs, by name.
        started: time at which the build began.
    """
    subjects = [{"name": path.name, "digest": {"sha256": sha256_of(path)}} for path in files]
    subjects += [
        {"name": image.name, "digest": {"sha256": image.digest.removeprefix("sha256:")}}
        for image in images
        if image.digest
    ]
    commit: dict[str, Any] = {"name": "source", "digest": {"gitCommit": source.commit}}
    if source.uri:
        commit["uri"] = source.uri
    dependencies = [commit]
    dependencies += [
        {"name": path.relative_to(source.root).as_posix(), "digest": {"sha256": sha256_of(path)}}
        for path in locks
    ]
    dependencies += [dict(each) for each in materials]
    builder, invocation = _builder(os.environ)
    # zlib decides on the bytes of equal content.
    own = {"python": platform.python_version(), "zlib": zlib.ZLIB_RUNTIME_VERSION}
    versions = {**own, **tools}
    return {
        "_type": STATEMENT,
        "subject": subjects,
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"version": source.version, **parameters},
                "internalParameters": {"SOURCE_DATE_EPOCH": source.epoch},
                "resolvedDependencies": dependencies,
            },
            "runDetails": {
                "builder": {"id": builder, "version": versions},
                "metadata": {
                    "invocationId": invocation,
                    "startedOn": _time(started),
                    "finishedOn": _time(datetime.datetime.now(datetime.UTC)),
                },
            },
        },
    }


def _builder(variables: Mapping[str, str]) -> tuple[str, str]:
    """Return the URI of the builder and that of this build."""
    names = ("GITHUB_SERVER_URL", "GITHUB_WORKFLOW_REF", "GITHUB_REPOSITORY", "GITHUB_RUN_ID")
    server, workflow, repository, run = (variables.get(name, "") for name in names)
    if server and workflow and repository and run:
        attempt = variables.get("GITHUB_RUN_ATTEMPT", "1")
        address = f"{server}/{repository}/actions/runs/{run}/attempts/{attempt}"
        return f"{server}/{workflow}", address
    return LOCAL_BUILDER, f"urn:uuid:{uuid.uuid4()}"


def _time(moment: datetime.datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
