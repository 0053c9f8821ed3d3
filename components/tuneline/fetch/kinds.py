"""The kinds of base models: how a kind is recognised, fetched and fingerprinted."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tuneline.errors import ModelError
from tuneline.fetch import builtin, directory, hub
from tuneline.fetch.config import FetchConfig
from tuneline.fetch.gguf.convert import convert
from tuneline.fetch.model_card import licence_of
from tuneline.fetch.quantised import Quantisation
from tuneline.runtime.source_names import (
    builtin_name,
    claim_problem,
    is_claim,
    is_hub_id,
    list_builtins,
    looks_like_a_path,
    path_on_claim,
)

KindName = Literal["builtin", "directory", "gguf", "hub"]


@dataclass(frozen=True)
class Provenance:
    """Origin of a model, as far as its source states it."""

    licence: str | None
    revision: str | None = None
    """Commit on the Hub; None if the model is not from the Hub."""
    quantisation: Quantisation | None = None
    """How the source's weights are quantised; None: they are not."""


@dataclass(frozen=True)
class Kind:
    """The functions for one kind of source, and which settings apply to that kind."""

    take: Callable[[str, Path, FetchConfig, str | None], Provenance]
    """Function that puts the model of a source into an empty directory; it takes the version that
    was looked up, if that is known."""
    fingerprint: Callable[[str, FetchConfig], str]
    """Function that returns a text that changes when the model changes."""
    has_revisions: bool = False
    """Whether the setting `fetch.revision` applies to this kind."""
    may_bring_code: bool = False
    """Whether the setting `fetch.trust_remote_code` applies to this kind."""


def kind_of(source: str) -> KindName:
    """Return the kind of a recipe's `base_model`; an existing path is never taken for a Hub ID.

    Raises:
        ModelError: the source does not exist or is of no known kind.
    """
    if builtin_name(source) is not None:
        return "builtin"
    if is_claim(source):
        problem = claim_problem(source)
        if problem is not None:
            raise ModelError(problem)
    path = path_of(source)
    if path.is_dir():
        return "directory"
    if path.is_file():
        if path.suffix == ".gguf":
            return "gguf"
        raise ModelError(
            f"{source} is a file of another kind: a base model is a directory with safetensors, "
            f"a .gguf file, a Hub ID or {list_builtins(list(builtin.BUILTINS))}"
        )
    if looks_like_a_path(source) or source.endswith(".gguf") or not is_hub_id(source):
        raise ModelError(
            f"there is no directory or file '{source}', and it is not a Hub ID such as "
            "'HuggingFaceTB/SmolLM2-135M-Instruct'"
        )
    return "hub"


def path_of(source: str) -> Path:
    """Return the path of a model that is a directory or a file, on this machine or on a claim."""
    return Path(path_on_claim(source) if is_claim(source) else source).expanduser()


def _take_builtin(
    source: str, target: Path, config: FetchConfig, version: str | None
) -> Provenance:
    return Provenance(builtin.unpack(builtin_name(source) or "", target))


def _take_directory(
    source: str, target: Path, config: FetchConfig, version: str | None
) -> Provenance:
    path = path_of(source)
    trusted = config.trust_remote_code is not None
    quantisation = directory.take(path, target, source=source, trusted=trusted)
    return Provenance(licence_of(path), quantisation=quantisation)


def _take_gguf(source: str, target: Path, config: FetchConfig, version: str | None) -> Provenance:
    return Provenance(convert(path_of(source), target))


def _take_from_hub(
    source: str, target: Path, config: FetchConfig, version: str | None
) -> Provenance:
    trusted = config.trust_remote_code is not None
    snapshot = hub.download(source, revision=config.revision, with_code=trusted, commit=version)
    quantisation = directory.take(snapshot.path, target, source=source, trusted=trusted)
    return Provenance(snapshot.licence, snapshot.commit, quantisation)


def _builtin_name(source: str, config: FetchConfig) -> str:
    """Return the name alone, as the fingerprint of a built-in model.

    The model's package is part of the image, and the image is part of KFP's cache key.
    """
    return source


def _hash_files(source: str, config: FetchConfig) -> str:
    path = path_of(source)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            digest.update(f"{file.relative_to(path)}\0".encode())
            with open(file, "rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _commit(source: str, config: FetchConfig) -> str:
    return hub.commit_of(source, revision=config.revision)


KINDS: dict[KindName, Kind] = {
    "builtin": Kind(_take_builtin, _builtin_name),
    "directory": Kind(_take_directory, _hash_files, may_bring_code=True),
    "gguf": Kind(_take_gguf, _hash_files),
    "hub": Kind(_take_from_hub, _commit, has_revisions=True, may_bring_code=True),
}
