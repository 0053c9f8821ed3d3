"""Lay out the repositories: one folder each, hard links where the file system allows."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from tuneline.artifacts import (
    MODELFILE,
    PUBLISHED_BUNDLE,
    DatasetManifest,
    Decision,
    MergeProof,
    ModelOrigin,
    QuantizedModel,
    TrainingSummary,
)
from tuneline.errors import UserError
from tuneline.publish.card import model_card
from tuneline.publish.config import PublishConfig
from tuneline.publish.proven import StoredFile, check_lineage, check_present, check_unchanged
from tuneline.recipe import Recipe
from tuneline.record import Record, hash_files, sha256_of_file
from tuneline.version import VERSION

MARKER_FILE = PUBLISHED_BUNDLE
"""In every repository that we make; one without it is somebody else's and is left alone."""

Kind = Literal["adapter", "merged", "gguf", "gptq"]


@dataclass(frozen=True)
class Sources:
    """The artifacts of a run, with their records."""

    recipe: Recipe
    origin: ModelOrigin
    dataset: DatasetManifest
    training: TrainingSummary
    merge: MergeProof
    decision: Decision
    adapter_dir: Path
    merged_dir: Path
    exports: dict[Path, QuantizedModel]

    @classmethod
    def read(
        cls,
        recipe: Recipe,
        *,
        base_model_dir: Path,
        dataset_dir: Path,
        adapter_dir: Path,
        merged_dir: Path,
        gguf_dirs: list[Path],
        gptq_dirs: list[Path],
        decision: Decision,
    ) -> Self:
        """Read every record, so that a half-made artifact is found before anything is sent.

        Raises:
            WorldError: an artifact has none.
            UserError: a format was exported twice.
            ProofError: one was made from others than these.
        """
        sources = cls(
            recipe=recipe,
            origin=ModelOrigin.read(base_model_dir),
            dataset=DatasetManifest.read(dataset_dir),
            training=TrainingSummary.read(adapter_dir),
            merge=MergeProof.read(merged_dir),
            decision=decision,
            adapter_dir=adapter_dir,
            merged_dir=merged_dir,
            exports={path: QuantizedModel.read(path) for path in [*gguf_dirs, *gptq_dirs]},
        )
        formats = [export.format for export in sources.exports.values()]
        twice = sorted({name for name in formats if formats.count(name) > 1})
        if twice:
            raise UserError(
                f"{twice[0]} was exported {formats.count(twice[0])} times, and a format has one "
                "place: name it once in quantize.gguf or quantize.gptq"
            )
        inputs = [sources.origin, sources.dataset, sources.training, sources.merge]
        check_lineage([*inputs, *sources.exports.values(), decision], inputs)
        return sources


@dataclass(frozen=True)
class StagedRepo:
    """One repository, ready to be sent."""

    repo: str
    """Its Hub id, or its folder's name below a directory target."""
    kind: Kind
    folder: Path

    def files(self) -> list[Path]:
        """Return every file in the folder."""
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


def stage(
    sources: Sources, *, name: str, config: PublishConfig, directory: Path
) -> list[StagedRepo]:
    """Lay out all repositories below `directory`.

    Nothing that differs from run to run goes in (times, paths of this machine), so that the same
    content staged twice is the same tree.
    """
    plans: list[tuple[str, Kind, dict[str, StoredFile]]] = [
        (f"{name}-lora", "adapter", _files(sources.adapter_dir, sources.training)),
        (name, "merged", _files(sources.merged_dir, sources.merge)),
    ]
    gguf: dict[str, StoredFile] = {}
    modelfiles: dict[str, str] = {}
    for path, export in sources.exports.items():
        if export.kind == "gguf":
            file = f"{name.rsplit('/', 1)[-1]}-{export.format}.gguf"
            gguf[file] = StoredFile(path / export.file, export.files.get(export.file))
            text = _modelfile(path, export)
            if text is not None:
                own, there = f"FROM ./{export.file}\n", f"FROM ./{file}\n"
                modelfiles[f"{MODELFILE}-{export.format}"] = text.replace(own, there, 1)
        else:
            plans.append((f"{name}-{export.format}", "gptq", _files(path, export)))
    if gguf:
        plans.append((f"{name}-gguf", "gguf", gguf))
    family = {repo: kind for repo, kind, _ in plans}
    staged = []
    for _, _, files in plans:
        check_present(files)
    for repo, kind, files in plans:
        folder = directory / repo.rsplit("/", 1)[-1]
        for relative, stored in files.items():
            _place(stored.path, folder / relative)
        # Before anything else is written there: what goes out is what was proven.
        content = hash_files(folder, leave_out=set())
        check_unchanged(files, content)
        for relative, text in modelfiles.items() if kind == "gguf" else ():
            (folder / relative).write_text(text, encoding="utf-8")
            content[relative] = hashlib.sha256(text.encode()).hexdigest()
        card = model_card(
            sources,
            repo=repo,
            kind=kind,
            all_repos=family,
            config=config,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        marker = {
            "tuneline": VERSION,
            "recipe": sources.recipe.name,
            "kind": kind,
            "base_revision": sources.origin.revision,
            "base_sha256": sources.origin.sha256,
            "dataset_sha256": sources.dataset.sha256,
            "recipe_sha256": hashlib.sha256(sources.recipe.model_dump_json().encode()).hexdigest(),
            "seed": sources.recipe.train.seed,
            "trained_with": sources.training.environment,
            "files": content,
        }
        (folder / MARKER_FILE).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
        staged.append(StagedRepo(repo, kind, folder))
    return staged


def _modelfile(path: Path, export: QuantizedModel) -> str | None:
    """Return a GGUF export's Modelfile, which goes out under names of its own; None without one."""
    stored = {MODELFILE: StoredFile(path / MODELFILE, export.files.get(MODELFILE))}
    if MODELFILE not in export.files and not (path / MODELFILE).is_file():
        return None
    check_present(stored)
    check_unchanged(stored, {MODELFILE: sha256_of_file(path / MODELFILE)})
    return (path / MODELFILE).read_text(encoding="utf-8")


_LEFT_OUT = {
    *(TrainingSummary.filename, MergeProof.filename, QuantizedModel.filename),
    # A base may have brought these, from its own repository: ours are written beside the files,
    # which are links, and the Hub has its own.
    *("README.md", MARKER_FILE, ".gitattributes"),
}


def _files(directory: Path, record: Record) -> dict[str, StoredFile]:
    """Return an artifact's files by relative name, those that it should have too, no record.

    Records carry times; what a reader needs of them is in the model card.
    """
    found = {
        path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()
    }
    return {
        relative: StoredFile(directory / relative, record.files.get(relative))
        for relative in sorted(found | record.files.keys())
        if relative.rpartition("/")[2] not in _LEFT_OUT
    }


def _place(source: Path, destination: Path) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, destination)
    except FileExistsError:
        raise  # it may be a link to another artifact's file, which a copy would write into
    except OSError:
        # Another file system, or one without links.
        shutil.copyfile(source, destination)
