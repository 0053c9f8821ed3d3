"""The syntax that the source of a model and the source of a dataset have in common in a recipe.

`base_model` and `dataset` may be a path, the ID of a repository on the Hub, or `builtin:NAME`. A
dataset may also be an address in a store (`s3://BUCKET/PATH`), a path on a claim
(`claim:NAME/PATH`), or a file that `tuneline submit` sent with the run (`upload:NAME`).

A path may be a link to any place. What is below a directory that a recipe names has to be in that
directory: a link that leads out is refused by name (`check_link`), because the person who names a
directory may not know the link, and its target would be learnt, sent or published.
"""

import glob
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuneline.errors import UserError

_BUILTIN_PREFIX = "builtin:"
_CLAIM_PREFIX = "claim:"
UPLOAD_PREFIX = "upload:"
"""Prefix of the name of a file that `tuneline submit` sends with a run."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_CLAIM = re.compile(r"claim:(?P<name>[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?)(?:/(?P<path>.*))?")
_ADDRESS = re.compile(r"(?P<store>[a-z0-9]+)://.+")

DATA_SUFFIXES = (
    *(".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".md"),
    *(".parquet", ".arrow", ".feather"),
)
"""Suffixes of files of rows, by which data/rows.jsonl is told from a Hub ID."""
COMPRESSION_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
"""Suffixes that may follow those of text files."""

CLAIMS_PATH = "/claims"
"""Directory in which a pod has the claims that hold data, each in a directory with its name."""
CLAIMS_VARIABLE = "TUNELINE_CLAIMS"
"""Environment variable that names another directory than CLAIMS_PATH, for runs without pods."""


@dataclass(frozen=True)
class Store:
    """A kind of store of files."""

    package: str
    """Package with which fsspec reads the store."""
    credentials: str
    """What to try if the store refuses a request."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options with which fsspec opens the store, so that it uses the proxy of the environment."""


_S3 = Store(
    "s3fs",
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for a public bucket set "
    "FSSPEC_S3_ANON=true, and for a store that is not Amazon's AWS_ENDPOINT_URL",
)
_AZURE = Store(
    "adlfs",
    "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN or "
    "AZURE_STORAGE_CONNECTION_STRING; with AZURE_STORAGE_ANON=false, Azure's default credential is "
    "used",
)
_GOOGLE = Store(
    "gcsfs",
    "set GOOGLE_APPLICATION_CREDENTIALS to the file of a service account, or use workload identity",
    {"session_kwargs": {"trust_env": True}},
)
_WEB = Store(
    "aiohttp", "the address needs a login; use a signed address, or copy the file to a store"
)
STORES = {
    "s3": _S3,
    "gs": _GOOGLE,
    "gcs": _GOOGLE,
    "abfs": _AZURE,
    "abfss": _AZURE,
    "az": _AZURE,
    "oci": Store("ocifs", "set OCI_CONFIG_PROFILE or write ~/.oci/config, as OCI's own tools do"),
    "https": _WEB,
    "http": _WEB,
    "hf": Store("huggingface_hub", "set HF_TOKEN, and accept the terms of the dataset"),
}
"""Stores by the scheme of their addresses."""


def builtin_name(source: str) -> str | None:
    """Return NAME of `builtin:NAME`; None for any other source."""
    return source.removeprefix(_BUILTIN_PREFIX) if source.startswith(_BUILTIN_PREFIX) else None


def list_builtins(names: list[str]) -> str:
    """Return the names as builtin:NAME, sorted and separated by commas, for an error message."""
    return ", ".join(f"{_BUILTIN_PREFIX}{name}" for name in sorted(names))


def looks_like_a_path(source: str) -> bool:
    """Return whether `source` begins with /, . or ~, so that it can only be a path."""
    return source.startswith(("/", ".", "~"))


def is_hub_id(source: str) -> bool:
    """Return whether `source` has the form of a Hub ID: NAME or NAMESPACE/NAME."""
    return _HUB_ID.fullmatch(source) is not None


def scheme_of(source: str) -> str | None:
    """Return SCHEME of an address SCHEME://..., in lower case; None for any other source."""
    match = _ADDRESS.fullmatch(source)
    return match["store"] if match else None


def store_of(source: str) -> str | None:
    """Return the key in STORES of an address in a store; None for any other source."""
    scheme = scheme_of(source)
    return scheme if scheme in STORES else None


def store_options(address: str) -> dict[str, Any]:
    """Return the options with which fsspec opens the store of an address."""
    store = STORES.get(scheme_of(address) or "")
    return dict(store.options) if store else {}


def is_web_address(source: str) -> bool:
    """Return whether `source` begins with https:// or http://."""
    return scheme_of(source) in ("https", "http")


def without_query(address: str) -> str:
    """Return an address without the query, which may hold a signature, and without a fragment."""
    return re.split(r"[?#]", address, maxsplit=1)[0] if is_web_address(address) else address


def is_claim(source: str) -> bool:
    """Return whether `source` begins with claim:, so that it can only be a path on a claim."""
    return source.startswith(_CLAIM_PREFIX)


def claim_name(source: str) -> str | None:
    """Return NAME of `claim:NAME/PATH`; None for any other source, and if NAME is no such name."""
    match = _CLAIM.fullmatch(source)
    return match["name"] if match else None


def claim_directory(name: str) -> str:
    """Return the directory where this process finds the files of a claim, if the claim is there."""
    return f"{os.environ.get(CLAIMS_VARIABLE, CLAIMS_PATH)}/{name}"


def claim_problem(source: str) -> str | None:
    """Return why the files of `claim:NAME/PATH` cannot be read here; None if they can."""
    name = claim_name(source)
    if name is None or ".." in source.split("/"):
        return f"'{source}' is not claim:NAME/PATH, e.g. claim:datasets/support/rows.jsonl"
    directory = claim_directory(name)
    if os.path.isdir(directory):
        return None
    return (
        f"{source}: the claim {name} is not mounted here, at {directory}. On a cluster, the pods "
        "get the claims that the recipe named when it was compiled: compile it again. On this "
        f"machine, put the files into DIRECTORY/{name} and set {CLAIMS_VARIABLE} to DIRECTORY"
    )


def is_data_file(source: str) -> bool:
    """Return whether `source` ends like the name of a file of rows."""
    name = source.lower()
    for suffix in COMPRESSION_SUFFIXES:
        name = name.removesuffix(suffix)
    return name.endswith(DATA_SUFFIXES)


def fixed_part(pattern: str) -> str:
    """Return the directory in front of the first wildcard of a pattern of paths."""
    parts = pattern.split("/")
    count = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return "/".join(parts[:count]) or ("/" if pattern.startswith("/") else "")


def path_on_claim(source: str) -> str:
    """Return the path of the file or directory that `claim:NAME/PATH` names."""
    match = _CLAIM.fullmatch(source)
    assert match is not None, source
    directory = claim_directory(match["name"])
    return f"{directory}/{match['path']}" if match["path"] else directory


_CACHED = ("models--", "datasets--")
"""Beginnings of the names of repositories in the Hub's cache."""


def check_link(path: Path, directory: Path, error: type[UserError]) -> None:
    """Check that a file or directory below a directory is in it, and not behind a link out of it.

    The snapshots of the Hub's cache consist of links to the blobs of the same repository, which
    they may lead to. So may the directories that huggingface-hub filled with links, up to its
    release 0.22.

    Args:
        path: the file or directory, which may be a link or behind one.
        directory: the directory that the recipe names, or a part of it.
        error: the class of the error to raise.

    Raises:
        UserError: the path leads out of the directory.
    """
    # Unlike Path.resolve, os.path.realpath accepts links that lead to themselves.
    target, root = (Path(os.path.realpath(each)) for each in (path, directory))
    roots = [root]
    for above in (root, *root.parents):
        if above.parent.name == "snapshots":
            roots.append(Path(os.path.realpath(above.parent.parent / "blobs")))
    is_blob = target.parent.name == "blobs" and target.parents[1].name.startswith(_CACHED)
    if not is_blob and not any(target.is_relative_to(each) for each in roots):
        raise error(
            f"{path} is a link that leads out of {directory}, to {target}. Only what is in a "
            "directory is read or copied: put a copy in the link's place, or remove the link"
        )
