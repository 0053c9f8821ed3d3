"""The storage URIs from which KServe downloads a published repository."""

from pathlib import PurePosixPath

from tuneline.runtime.source_names import is_hub_id

UNKNOWN_STORAGE = "pvc://CLAIM"
"""Stands for the claim of files that are in a directory, which only its reader can name. CLAIM is
no name that Kubernetes accepts, so the file cannot be applied by mistake."""

_STORES = ("s3://", "gs://", "hf://", "pvc://", "https://")
"""Storage URIs that KServe reads and that a target of publish may have. Of oci://, KServe reads
only images whose /models has the model, and publish makes artifacts."""
_CLAIM = "claim:"


def storage_uri(repo: str, *, commit: str | None = None, version: str | None = None) -> str:
    """Return the storage URI of a published repository.

    Args:
        repo: Hub ID, URI in a store or a registry, `claim:NAME/PATH`, or path of a directory.
        commit: Hub commit; None: the newest.
        version: tag of the version, which is a directory of a repository in a store.
    """
    if repo.startswith(_CLAIM):
        return f"pvc://{repo.removeprefix(_CLAIM)}"
    if repo.startswith(_STORES):
        return f"{repo}/{version}" if version else repo
    if is_hub_id(repo) and "/" in repo and not repo.startswith(("/", ".")):
        return f"hf://{repo}:{commit}" if commit else f"hf://{repo}"
    return f"{UNKNOWN_STORAGE}/{PurePosixPath(repo).name}"
