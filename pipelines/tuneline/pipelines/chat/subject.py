"""Find the model that a user names: of a run, in a directory or a file, or on the Hub."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tuneline.artifacts import MergeProof, ModelOrigin, QuantizedModel
from tuneline.errors import ModelError, UserError
from tuneline.fetch.gguf.header import check_header
from tuneline.kinds import KINDS
from tuneline.models.stored_quantisation import quantization_in
from tuneline.pipelines.local.run_dir import RECIPE_FILE, LocalRun, find_local_run, local_runs
from tuneline.quantize.formats import FORMATS
from tuneline.runtime.source_names import is_hub_id

MERGED = "merged"
"""Name of the merged model among the formats of a run."""


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model."""

    path: Path
    """A GGUF file, or a directory that transformers loads."""
    kind: Literal["checkpoint", "gguf"]
    title: str
    """What it is, for the user."""


@dataclass(frozen=True)
class Subject:
    """A model to talk to, and what it is compared with."""

    name: str
    tuned: ModelFiles
    base: ModelFiles | None = None
    system: str | None = None
    """System message of the recipe; None: the recipe has none, or is unknown."""
    formats: tuple[str, ...] = ()
    """Formats of the same run that can be named instead."""

    @property
    def gguf_formats(self) -> tuple[str, ...]:
        """Those of the formats that llama.cpp loads."""
        exports = (name for name in self.formats if name != MERGED)
        return tuple(name for name in exports if FORMATS[name].kind == "gguf")


def find_subject(name: str, *, format: str | None, base: str | None, needs_base: bool) -> Subject:
    """Return the model behind a name.

    Args:
        name: a local run's directory or name, a directory with a model, a .gguf file, or the Hub ID
            of a published repository.
        format: which export of a run or of a repository; None: the merged model, or the only file.
        base: the model to compare with, a directory or a .gguf file; None: the run's base model.
        needs_base: whether there has to be one.

    Raises:
        UserError: there is no such model, or it has no such format.
    """
    subject = _find(name, format)
    if base is not None:
        found = _from_path(Path(base), None)
        if found is None:
            raise UserError(f"--base {base}: name a .gguf file or a directory with a config.json")
        return replace(subject, base=found)
    if needs_base and subject.base is None:
        raise UserError(
            f"the base model of {name} is not known: name its directory or .gguf file with --base"
        )
    return subject


def _find(name: str, format: str | None) -> Subject:
    path = Path(name)
    run = find_local_run(name)
    if run is not None:
        return _of_run(run, format)
    if path.exists():
        found = _from_path(path, format)
        if found is None:
            raise UserError(
                f"{name} is neither a run nor a model: it has no {RECIPE_FILE}, no config.json and "
                "no .gguf file"
            )
        runs_around = (find_local_run(str(each)) for each in path.resolve().parents)
        whole = next(filter(None, runs_around), None)
        if whole is None:
            return Subject(path.resolve().name, found)
        return Subject(whole.name, found, _base_of(whole.artifact_dirs()), _system(whole))
    if "/" in name and is_hub_id(name):
        # Imported here, because huggingface_hub takes a moment.
        from tuneline.pipelines.chat.hub import download

        path = download(name, lambda file: _has_format(file, format))
        return Subject(name, _from_directory(path, format))
    runs = ", ".join(each.name for each in local_runs()[:5])
    raise UserError(
        f"there is no run, directory or file {name}: name one, or the Hub ID of a repository "
        f"(ORG/NAME). {f'The newest runs here are {runs}' if runs else 'There are no runs here'}"
    )


def _of_run(run: LocalRun, format: str | None) -> Subject:
    """Return a model of a run; the run may have failed or been held after it made the model."""
    places = run.artifact_dirs()
    exports = {
        record.format: place / record.file
        for place in places
        if (place / QuantizedModel.filename).is_file()
        for record in [QuantizedModel.read(place)]
    }
    merged = next((place for place in places if (place / MergeProof.filename).is_file()), None)
    formats = (*([MERGED] if merged else ()), *exports)
    if not formats:
        raise UserError(
            f"{run.name} ({run.state()}) has no model yet: its step merge has not finished, or "
            f"its artifacts were deleted. tuneline status {run.name} shows its steps"
        )
    chosen = format or formats[0]
    if chosen not in formats:
        raise UserError(f"{run.name} has no {chosen}: choose --format from {', '.join(formats)}")
    path = merged if chosen == MERGED else exports[chosen]
    assert path is not None
    kind: Literal["checkpoint", "gguf"] = "gguf" if path.suffix == ".gguf" else "checkpoint"
    title = KINDS["merged"].title if chosen == MERGED else chosen
    return Subject(
        name=run.name,
        tuned=ModelFiles(path, kind, title),
        base=_base_of(places),
        system=_system(run),
        formats=formats,
    )


def _base_of(places: Sequence[Path]) -> ModelFiles | None:
    for place in places:
        if (place / ModelOrigin.filename).is_file():
            return ModelFiles(place, "checkpoint", ModelOrigin.read(place).source)
    return None


def _system(run: LocalRun) -> str | None:
    system = (run.recipe_values().get("prepare") or {}).get("system_prompt")
    return system if isinstance(system, str) else None


def _from_path(path: Path, format: str | None) -> ModelFiles | None:
    """Return the model in a file or a directory; None if there is none."""
    if path.is_dir():
        has_model = (path / "config.json").is_file() or any(path.glob("*.gguf"))
        return _from_directory(path, format) if has_model else None
    if path.suffix != ".gguf":
        return None
    check_header(path)
    return ModelFiles(path.absolute(), "gguf", path.stem)


def _has_format(name: str, format: str | None) -> bool:
    """Return whether a GGUF file's name ends with a format, in any case; None is every format."""
    return format is None or name.lower().endswith(f"{format.lower()}.gguf")


def _from_directory(path: Path, format: str | None) -> ModelFiles:
    files = sorted(path.glob("*.gguf"))
    named = [file for file in files if _has_format(file.name, format)]
    if len(named) == 1:
        return ModelFiles(named[0].absolute(), "gguf", named[0].stem)
    if files:
        raise UserError(
            f"{path} has {', '.join(file.name for file in files)}: name one of these files, or the "
            "end of its name with --format, e.g. --format q4_k_m"
        )
    if (path / "adapter_config.json").is_file():
        raise ModelError(f"{path} is an adapter: name the merged model or a GGUF file of it")
    settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    quantised = (quantization_in(settings) or {}).get("quant_method")
    return ModelFiles(path.absolute(), "checkpoint", str(quantised or KINDS["merged"].title))
