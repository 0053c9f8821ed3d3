"""What a recipe's sources need on a cluster: claims to mount, and files of this machine to send.

A source is a file of this machine if it exists here, or if it is a relative path or has the name of
a file of rows and does not exist. An absolute path that does not exist here is taken for one in the
image, and so is file:///PATH, whether it exists here or not. /cache is the cache claim, if the
recipe names one.
"""

import glob
from dataclasses import dataclass
from pathlib import Path

from tuneline.errors import DataError, RecipeError
from tuneline.html.units import size
from tuneline.pods import CACHE_PATH
from tuneline.prepare.sources.local import files_below, matching_files
from tuneline.prepare.uploads import MAX_CHARACTERS, pack
from tuneline.recipe import Recipe
from tuneline.runtime.source_names import (
    CLAIMS_PATH,
    UPLOAD_PREFIX,
    builtin_name,
    claim_name,
    fixed_part,
    is_claim,
    is_data_file,
    looks_like_a_path,
    scheme_of,
)

MAX_FILE_BYTES = 16 << 20
"""Largest sum of files that are compressed to see whether they can be sent."""
ELSEWHERE = (
    "copy it to a store (s3://, gs://, abfs://, oci://), to a claim (claim:NAME/PATH) or to a "
    "dataset on the Hub"
)
_MODEL_ELSEWHERE = "copy it to a claim (claim:NAME/PATH) or to a repository on the Hub"


def claims_of(recipe: Recipe, step: str) -> list[str]:
    """Return the names of the claims that hold what a step reads, or publishes.

    Raises:
        RecipeError: a source begins with claim: but names no claim.
    """
    if step in ("look-up-data", "prepare"):
        sources = recipe.data_sources
    elif step in ("look-up-model", "fetch"):
        sources = [recipe.base_model]
    elif step in ("look-up-published", "publish"):
        sources = [target.text for target in recipe.targets]
    else:
        return []
    names = []
    for source in filter(is_claim, sources):
        name = claim_name(source)
        if name is None:
            raise RecipeError(f"'{source}' is not claim:NAME/PATH, e.g. claim:datasets/rows.jsonl")
        names.append(name)
    return list(dict.fromkeys(names))


def is_local(source: str, *, cache_claim: str | None) -> bool:
    """Return whether a source of a recipe is a path of this machine."""
    if scheme_of(source) or builtin_name(source) or is_claim(source):
        return False
    if source.startswith(UPLOAD_PREFIX):
        return False
    roots = [CLAIMS_PATH, *([CACHE_PATH] if cache_claim else [])]
    if any(source == root or source.startswith(f"{root}/") for root in roots):
        return False
    if _is_here(source):
        return True
    return not source.startswith("/") and (looks_like_a_path(source) or is_data_file(source))


def local_sources(recipe: Recipe) -> list[str]:
    """Return the sources of rows that are paths of this machine."""
    claim = recipe.placement.cache_claim
    return [source for source in recipe.data_sources if is_local(source, cache_claim=claim)]


def local_problems(recipe: Recipe) -> list[str]:
    """Return a sentence for each source, and for the model, if it is a path of this machine."""
    problems = [
        f"{source} is a path of this machine, which the pods of a cluster do not have: "
        f"{ELSEWHERE}; `tuneline submit` sends files that are small"
        for source in local_sources(recipe)
    ]
    if is_local(recipe.base_model, cache_claim=recipe.placement.cache_claim):
        problems.append(
            f"base_model {recipe.base_model} is a path of this machine, which the pods of a "
            f"cluster do not have: {_MODEL_ELSEWHERE}"
        )
    return problems


@dataclass(frozen=True)
class Upload:
    """A recipe whose files of this machine are sent with the run."""

    recipe: Recipe
    """The recipe with upload:NAME instead of the files."""
    archive: str | None
    """The files as `tuneline.prepare.uploads` packs them; None if there are none."""
    files: list[str]
    """The sources that are sent."""


def prepare_upload(recipe: Recipe) -> Upload:
    """Pack the files of this machine that a recipe names as sources of rows.

    Raises:
        DataError: a file does not exist, or the files are too large to be sent.
    """
    sources = local_sources(recipe)
    if not sources:
        return Upload(recipe, None, [])
    names: dict[str, str] = {}
    files: dict[str, Path] = {}
    for number, source in enumerate(sources):
        if not _is_here(source):
            raise DataError(f"there is no file or directory {source}")
        names[source] = _add(source, files, f"{number}-" if len(sources) > 1 else "")
    num_bytes = sum(path.stat().st_size for path in files.values())
    listed = ", ".join(sources)
    if num_bytes > MAX_FILE_BYTES:
        raise DataError(_too_large(listed, size(num_bytes)))
    archive = pack(files)
    if len(archive) > MAX_CHARACTERS:
        compressed = f"{size(num_bytes)}, {size(len(archive) * 3 // 4)} compressed"
        raise DataError(_too_large(listed, compressed))
    return Upload(_renamed(recipe, names), archive, sources)


def _too_large(listed: str, how_large: str) -> str:
    return (
        f"{listed} ({how_large}) is a path of this machine and too large to be sent with the run, "
        f"which can hold {size(MAX_CHARACTERS * 3 // 4)} of compressed files: {ELSEWHERE}"
    )


def _is_here(source: str) -> bool:
    """Return whether a source is a path, or a pattern of paths, that this machine has."""
    path = Path(source).expanduser()
    return path.exists() or (glob.has_magic(source) and any(glob.iglob(str(path), recursive=True)))


def _add(source: str, files: dict[str, Path], prefix: str) -> str:
    """Add the files of a source to those that are sent; return the name that it has there."""
    path = Path(source).expanduser()
    if path.is_file():
        files[f"{prefix}{path.name}"] = path
        return f"{UPLOAD_PREFIX}{prefix}{path.name}"
    if path.is_dir():
        root = path
        found = sorted(files_below(path))
        name = f"{prefix}{path.resolve().name}"
        whole = name
    else:
        root = Path(fixed_part(str(path)))
        found = matching_files(str(path))
        name = f"{prefix}{root.resolve().name or 'files'}"
        whole = f"{name}/{path.relative_to(root).as_posix()}"
    for file in found:
        relative = file.relative_to(root)
        if not any(part.startswith(".") for part in relative.parts):
            files[f"{name}/{relative.as_posix()}"] = file
    return f"{UPLOAD_PREFIX}{whole}"


def _renamed(recipe: Recipe, names: dict[str, str]) -> Recipe:
    values = recipe.model_dump(mode="json")
    places = [values, *values["datasets"], values["prepare"]["heldout"]]
    places += [values["prepare"]["general"]] if values["prepare"]["general"] else []
    for place in places:
        for key in ("dataset", "source"):
            if place.get(key) in names:
                place[key] = names[place[key]]
    return Recipe.parse(values)
