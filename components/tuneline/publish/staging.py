"""Stage the repositories: one folder each, with hard links if the file system supports them."""

import hashlib
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tuneline.artifacts import (
    MODELFILE,
    OLLAMA_PARAMS,
    OLLAMA_TEMPLATE,
    PROGRESS_FILE,
    MergeProof,
    PublishedRepo,
    QuantizedModel,
    TrainingSummary,
)
from tuneline.kinds import RepoKind
from tuneline.placement import PlacementConfig
from tuneline.publish.allowed import may_be_published
from tuneline.publish.card import model_card
from tuneline.publish.card_parts import CARD_FILE, join_card, split_card
from tuneline.publish.config import PublishConfig
from tuneline.publish.previous import MARKER_FILE
from tuneline.publish.proven import StoredFile, check_inside, check_present, check_unchanged
from tuneline.publish.sources import Repository, Sources, repositories
from tuneline.record import Record, files_below, hash_files, sha256_of_file
from tuneline.recorded_recipe import RecordedRecipe
from tuneline.records.earlier import EVALUATED_KEY
from tuneline.seals import sealed_json
from tuneline.serving.manifests import FOLDER, Model, Repo, public_placement, serving_files
from tuneline.serving.storage import UNKNOWN_STORAGE, storage_uri
from tuneline.version import VERSION

logger = logging.getLogger(__name__)

# Files that are not copied from an artifact. Records and progress.jsonl contain times; what readers
# need to know is in the model card. Files with the other names may come from the base model's
# repository. publish writes its own files of these names, which must not overwrite the artifact's
# through a hard link.
_LEFT_OUT = {
    TrainingSummary.filename,
    MergeProof.filename,
    QuantizedModel.filename,
    MARKER_FILE,
    CARD_FILE,
    PROGRESS_FILE,
    ".gitattributes",
}


@dataclass(frozen=True)
class StagedRepo:
    """One repository that is ready to be sent."""

    repo: str
    """Hub ID, or the name of the folder in a directory target."""
    kind: RepoKind
    folder: Path
    left_out: tuple[str, ...] = ()
    """Files of the artifacts that are not published."""

    def files(self) -> dict[str, Path]:
        """Return every file in the folder, by its relative path."""
        return files_below(self.folder)


def stage(
    sources: Sources,
    *,
    name: str,
    config: PublishConfig,
    recipe: RecordedRecipe,
    directory: Path,
    run_id: str = "",
) -> list[StagedRepo]:
    """Stage all repositories below `directory`.

    The staged files depend only on the arguments (they contain no date and no path of this
    machine), so staging the same artifacts twice gives the same tree.

    Args:
        sources: the artifacts.
        name: Hub ID of the merged model, or name of its folder in a directory target.
        config: the `publish` section of the recipe.
        recipe: the recipe as the records of the run state it.
        directory: where the folders are made.
        run_id: ID of the run; "" if it is not known.

    Raises:
        ProofError: a file is missing, or was changed after its step checked it.
    """
    family = repositories(sources, name)
    files = {repo.name: _files_of(sources, repo) for repo in family}
    for stored in files.values():
        check_present(stored)
    return [
        _stage_one(sources, repo, family, files[repo.name], config, recipe, directory, run_id)
        for repo in family
    ]


def _stage_one(
    sources: Sources,
    repo: Repository,
    family: Sequence[Repository],
    files: dict[str, StoredFile],
    config: PublishConfig,
    recipe: RecordedRecipe,
    directory: Path,
    run_id: str,
) -> StagedRepo:
    """Stage one repository.

    Args:
        sources: the artifacts.
        repo: the repository.
        family: all repositories of the run, for the model card.
        files: files of the artifacts, by their names in the repository.
        config: the `publish` section of the recipe.
        recipe: the recipe as the records of the run state it.
        directory: where the folder is made.
        run_id: ID of the run; "" if it is not known.
    """
    folder = directory / repo.short_name
    with_code = sources.origin.runs_own_code
    # A file that its record does not list was added later, which is refused, whatever its name.
    left_out = sorted(
        name
        for name, file in files.items()
        if file.recorded is not None and not may_be_published(name, with_code=with_code)
    )
    if left_out:
        logger.warning(
            "%s: not published, because their names are not those of a model's files: %s",
            *(repo.name, ", ".join(left_out)),
        )
    files = {name: file for name, file in files.items() if name not in left_out}
    for relative, stored in files.items():
        _place(stored.path, folder / relative)
    # Checked before publish adds its own files, which no record has.
    hashes = hash_files(folder, leave_out=set())
    check_unchanged(files, hashes)
    ours = _modelfiles(repo) | _serving_files(sources, repo)
    for relative, text in ours.items():
        (folder / relative).parent.mkdir(exist_ok=True)
        (folder / relative).write_bytes(text.encode())
        hashes[relative] = hashlib.sha256(text.encode()).hexdigest()
    card = join_card(
        model_card(sources, repo, family=family, config=config, recipe=recipe, run_id=run_id)
    )
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    parts = split_card(card)
    assert parts is not None, "a new card has both markers"
    marker: dict[str, Any] = {
        "record_sha256": "",
        "tuneline": VERSION,
        "recipe": sources.header.name,
        "run_id": run_id,
        "kind": repo.kind,
        "base_revision": sources.origin.revision,
        "base_sha256": sources.origin.sha256,
        "dataset_sha256": sources.dataset.sha256,
        "recipe_sha256": recipe.sha256,
        "differs_from_recipe": list(recipe.differences),
        "seed": sources.training.settings.get("seed"),
        "trained_with": sources.training.environment,
        "held_exports": sources.decision.held_exports(),
        "files": hashes,
        # From these, the next push sees what people changed in the card.
        "card": {
            "sha256": hashlib.sha256(parts.ours.encode()).hexdigest(),
            "front_matter": parts.front_matter,
        },
    }
    if repo.kind == "merged" and sources.evaluated is not None:
        marker[EVALUATED_KEY] = sources.evaluated
    (folder / MARKER_FILE).write_text(sealed_json(marker), encoding="utf-8")
    return StagedRepo(repo.name, repo.kind, folder, tuple(left_out))


def write_serving(
    sources: Sources, name: str, published: Sequence[PublishedRepo], directory: Path
) -> None:
    """Write the InferenceServices of every repository, with the recipe's placement and the commits.

    Args:
        sources: the artifacts.
        name: name of the merged model's repository.
        published: where the repositories are. If one is in several places, servers take it from the
            first place that they can read.
        directory: where the folder `serving/` is made, with a folder per repository.
    """
    for repo in repositories(sources, name):
        uris = [
            storage_uri(each.repo, commit=each.commit, version=each.tag)
            for each in published
            if PurePosixPath(each.repo).name == repo.short_name
        ]
        known = (uri for uri in uris if not uri.startswith(UNKNOWN_STORAGE))
        uri = next(known, storage_uri(repo.short_name))
        for relative, text in _serving_files(sources, repo, uri=uri).items():
            path = directory / FOLDER / repo.short_name / PurePosixPath(relative).name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def _serving_files(sources: Sources, repo: Repository, *, uri: str | None = None) -> dict[str, str]:
    """Return the InferenceServices of a repository, by their paths in it.

    Args:
        sources: the artifacts.
        repo: the repository.
        uri: storage URI of the repository, for the files of those who ran the pipeline, which have
            the recipe's placement. None: for the repository itself, without names of a cluster.
    """
    placement = PlacementConfig.parse((sources.header.model_extra or {}).get("placement") or {})
    model = Model(sources.origin, sources.merge, sources.adapter_dir, sources.merged_dir)
    exports = {
        "." if repo.traits.has_repo_per_format else _file_name(repo, export): (path, export)
        for path, export in repo.exports.items()
    }
    place = uri or storage_uri(repo.name)
    served = Repo(repo.short_name, repo.kind, place, exports)
    return serving_files(model, served, placement if uri else public_placement(placement))


def _files_of(sources: Sources, repo: Repository) -> dict[str, StoredFile]:
    """Return the files that a repository gets from artifacts, by their names in the repository."""
    if repo.kind == "adapter":
        return _all_files(sources.adapter_dir, sources.training)
    if repo.kind == "merged":
        return _all_files(sources.merged_dir, sources.merge)
    if repo.traits.has_repo_per_format:
        ((path, export),) = repo.exports.items()
        return _all_files(path, export)
    for path, export in repo.exports.items():
        check_inside(path, (export.file, MODELFILE))
    return {
        _file_name(repo, export): StoredFile(path / export.file, export.files.get(export.file))
        for path, export in repo.exports.items()
    }


def _file_name(repo: Repository, export: QuantizedModel) -> str:
    """Return the name of an export's file in a repository for several formats."""
    model = repo.short_name.removesuffix(repo.traits.suffix)
    return f"{model}-{export.format}{Path(export.file).suffix}"


def _all_files(directory: Path, record: Record) -> dict[str, StoredFile]:
    """Return the files of an artifact and of its record, by their relative paths."""
    names = sorted(files_below(directory).keys() | record.files.keys())
    check_inside(directory, names)
    return {
        relative: StoredFile(directory / relative, record.files.get(relative))
        for relative in names
        if relative.rpartition("/")[2] not in _LEFT_OUT
    }


def _modelfiles(repo: Repository) -> dict[str, str]:
    """Return the files for Ollama, by their names in the repository.

    Each export has a Modelfile, with FROM set to the new file name. `template` and `params`, which
    `ollama run hf.co/...` reads, apply to all exports of a repository, so they are left out if the
    exports' own differ.
    """
    texts: dict[str, str] = {}
    shared: dict[str, set[str | None]] = {OLLAMA_TEMPLATE: set(), OLLAMA_PARAMS: set()}
    for path, export in repo.exports.items():
        if repo.traits.has_repo_per_format:
            continue  # the files keep their names, so a Modelfile needs no change
        for name, found in shared.items():
            found.add(_proven_text(path, export, name))
        text = _proven_text(path, export, MODELFILE)
        if text is not None:
            before, after = f"FROM ./{export.file}\n", f"FROM ./{_file_name(repo, export)}\n"
            texts[f"{MODELFILE}-{export.format}"] = text.replace(before, after, 1)
    for name, found in shared.items():
        text = found.pop() if len(found) == 1 else None
        if text is not None:
            texts[name] = text
    return texts


def _proven_text(directory: Path, export: QuantizedModel, name: str) -> str | None:
    """Return a text file of an export; None if the export has none of this name.

    Raises:
        ProofError: the file is missing, or was changed after its step checked it.
    """
    source = directory / name
    if name not in export.files and not source.is_file():
        return None
    stored = {name: StoredFile(source, export.files.get(name))}
    check_present(stored)
    check_unchanged(stored, {name: sha256_of_file(source)})
    # newline="": a template may contain \r.
    with open(source, encoding="utf-8", newline="") as file:
        return file.read()


def _place(source: Path, destination: Path) -> None:
    """Put a file at `destination`, as a hard link where possible."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, destination)
    except FileExistsError:
        raise  # a copy could overwrite an artifact, if `destination` is a hard link to its file
    except OSError:
        # Another file system, or one without hard links.
        shutil.copyfile(source, destination)
