"""Directories that describe their own splits: with a dataset card, or saved by `datasets`."""

import json
import re
from typing import Any

import yaml
from datasets.data_files import sanitize_patterns
from fsspec.utils import glob_translate

from tuneline.bounded_yaml import MAX_CHARACTERS, load_yaml, split_front_matter
from tuneline.errors import DataError
from tuneline.prepare.sources.files import can_read
from tuneline.prepare.sources.row import DEFAULT_SPLIT, Selection
from tuneline.prepare.sources.split_names import Splits, holds_rows, split_by_name
from tuneline.prepare.sources.stored import StoredFile

CARD = "README.md"
SAVED_DATASET, SAVED_DICT = "state.json", "dataset_dict.json"


def saved_splits(source: str, by_name: dict[str, StoredFile]) -> Splits:
    """Return the files of a directory that save_to_disk of the `datasets` library wrote."""
    if SAVED_DICT in by_name:
        names = _read_json(by_name[SAVED_DICT]).get("splits", [])
        return {name: _saved_files(source, by_name, f"{name}/") for name in names}
    return {DEFAULT_SPLIT: _saved_files(source, by_name, "")}


def _saved_files(source: str, by_name: dict[str, StoredFile], prefix: str) -> list[StoredFile]:
    state = by_name.get(f"{prefix}{SAVED_DATASET}")
    names = [] if state is None else _read_json(state).get("_data_files", [])
    found = [by_name.get(f"{prefix}{entry['filename']}") for entry in names]
    files = [file for file in found if file is not None]
    if not files or len(files) < len(found):
        raise DataError(
            f"{source} was saved with save_to_disk, but of the {len(found)} files of "
            f"{prefix or 'the dataset'} {len(found) - len(files)} are absent: copy the whole "
            "directory again"
        )
    return files


def _read_json(file: StoredFile) -> dict[str, Any]:
    try:
        with file.open() as opened:
            value = json.loads(opened.read())
    except ValueError:
        raise DataError(f"{file.name} is not JSON: copy the directory again") from None
    return value if isinstance(value, dict) else {}


def card_configs(card: StoredFile) -> list[dict[str, Any]]:
    """Return the entries of `configs` in the front matter of a dataset card."""
    with card.open() as opened:
        text = opened.read(MAX_CHARACTERS).decode("utf-8", errors="replace")
    try:
        content = load_yaml(split_front_matter(text)[0], where=f"the dataset card {card.name}")
    except yaml.YAMLError as error:
        raise DataError(
            f"the dataset card {card.name} is not YAML: {' '.join(str(error).split())[:120]}"
        ) from None
    configs = content.get("configs") if isinstance(content, dict) else None
    configs = configs if isinstance(configs, list) else []
    return [entry for entry in configs if isinstance(entry, dict)]


def card_splits(
    source: str,
    configs: list[dict[str, Any]],
    by_name: dict[str, StoredFile],
    selection: Selection,
) -> Splits:
    """Return the files of the selected subset by split, as the entries of a card name them."""
    names = [str(entry.get("config_name", "default")) for entry in configs]
    config = _wanted_config(source, configs, names, selection)
    if "data_files" in config:
        patterns = _patterns(source, config["data_files"])
    else:
        folder = str(config.get("data_dir", "")).strip("/")
        prefix = f"{folder}/" if folder else ""
        below = [file for file in by_name.values() if file.name.startswith(prefix)]
        return split_by_name([file for file in below if holds_rows(file.name)])[0]
    base = str(config.get("data_dir", "")).strip("/")
    splits = {
        split: _matching([f"{base}/{name}" if base else name for name in wanted], by_name)
        for split, wanted in patterns.items()
    }
    return {split: files for split, files in splits.items() if files}


def _patterns(source: str, data_files: Any) -> dict[str, Any]:
    """Return the patterns of `data_files` in a card by split.

    Raises:
        DataError: it has another form than `datasets` reads.
    """
    try:
        patterns: dict[str, Any] = sanitize_patterns(data_files)
        if all(isinstance(name, str) for names in patterns.values() for name in names):
            return patterns
    except (ValueError, TypeError):
        pass
    raise DataError(
        f"the dataset card of {source} has data_files {data_files!r:.100}, but data_files must be "
        "a pattern, a list of patterns, or a list of `split:` with `path:`. Correct the card, or "
        "name the files in dataset"
    )


def _wanted_config(
    source: str, configs: list[dict[str, Any]], names: list[str], selection: Selection
) -> dict[str, Any]:
    if selection.subset is not None:
        if selection.subset in names:
            return configs[names.index(selection.subset)]
    elif len(configs) == 1:
        return configs[0]
    else:
        for entry, name in zip(configs, names, strict=True):
            if entry.get("default") is True or name == "default":
                return entry
    asked = f"no subset '{selection.subset}'" if selection.subset else "several subsets"
    raise DataError(f"{source} has {asked}: set prepare.subset to one of {', '.join(names)}")


def _matching(patterns: list[str], by_name: dict[str, StoredFile]) -> list[StoredFile]:
    expressions = [re.compile(glob_translate(pattern.removeprefix("./"))) for pattern in patterns]
    return [
        file
        for name, file in by_name.items()
        if can_read(name) and any(expression.match(name) for expression in expressions)
    ]
