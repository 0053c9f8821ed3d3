"""Choose the files of a directory or glob that hold the rows of one split.

The rules are those of the `datasets` library: the configurations in a dataset card, else the names
of directories, else the names of files. Unlike the library, what a split leaves out is named, and a
directory with other splits but without the wanted one is refused.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import yaml
from datasets.data_files import (
    FILES_TO_IGNORE,
    NON_WORDS_CHARS,
    SPLIT_KEYWORDS,
    sanitize_patterns,
)
from fsspec.utils import glob_translate

from tuneline.errors import DataError
from tuneline.prepare.sources.files import can_read, is_document, supported_types
from tuneline.prepare.sources.row import DEFAULT_SPLIT, Remarks, Selection
from tuneline.prepare.sources.stored import Listing, StoredFile

CARD = "README.md"
SAVED_DATASET, SAVED_DICT = "state.json", "dataset_dict.json"
_SEPARATOR = f"[{NON_WORDS_CHARS}]"
_WORDS = {str(split): "|".join(words) for split, words in SPLIT_KEYWORDS.items()}
_IN_DIRECTORY = {
    split: re.compile(rf"(?:.*{_SEPARATOR})?(?:{words})(?:{_SEPARATOR}.*)?")
    for split, words in _WORDS.items()
}
_IN_NAME = {
    split: re.compile(rf"(?:.*{_SEPARATOR})?(?:{words}){_SEPARATOR}.*")
    for split, words in _WORDS.items()
}
_SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")
"""Name of a file that push_to_hub writes."""
_FRONT_MATTER = re.compile(r"\s*---\r?\n(.*?)\r?\n---", re.DOTALL)

Splits = dict[str, list[StoredFile]]


def choose(
    source: str, listing: Listing, selection: Selection, remarks: Remarks
) -> list[StoredFile]:
    """Return the files of a source that hold the rows of the selected split.

    Args:
        source: the source as the recipe names it, for messages.
        listing: the files of the source.
        selection: the split and subset to read.
        remarks: receives what is left out.

    Raises:
        DataError: there is no file that can be read, or the split or subset does not exist.
    """
    if selection.revision is not None:
        raise DataError(
            f"revision {selection.revision} is set for {source}, but only datasets on the Hub have "
            "revisions: remove it"
        )
    if listing.is_file:
        return _only_file(source, listing.files[0], selection)
    visible = [file for file in listing.files if not _is_hidden(file.name)]
    if listing.is_directory:
        splits, others = _splits_of_directory(source, visible, selection)
    else:
        _refuse_subset(source, selection)
        readable = [file for file in visible if can_read(file.name)]
        splits, others = split_by_name(readable)
        if list(splits) != [DEFAULT_SPLIT] and len(splits) == 1 and not others:
            # The glob itself names the split.
            selection = replace(selection, takes_only_split=True)
    if not splits:
        raise DataError(
            f"{source} has no file that can be read; supported types: {supported_types()}"
        )
    split = _wanted(source, splits, others, selection)
    chosen = splits[split]
    for name, files in splits.items():
        if name != split:
            remarks.add(f"files of the split {name} are left out: {_files(files)}", source)
    if others:
        remarks.add(f"files of no split are left out: {_files(others)}", source)
    _name_unreadable(source, visible, listing, remarks)
    return chosen


def split_by_name(files: Iterable[StoredFile]) -> tuple[Splits, list[StoredFile]]:
    """Return the files by split, as the `datasets` library names splits, and the other files.

    If no name contains the name of a split, all files are the split train.
    """
    files = list(files)
    for split_of in (_shard_split, _directory_split, _name_split):
        splits: Splits = {}
        others = []
        for file in files:
            split = split_of(file.name)
            if split is None:
                others.append(file)
            else:
                splits.setdefault(split, []).append(file)
        if splits:
            return splits, others
    return ({DEFAULT_SPLIT: files} if files else {}), []


def _shard_split(name: str) -> str | None:
    match = _SHARD.fullmatch(name)
    return match[1] if match else None


def _directory_split(name: str) -> str | None:
    for part in PurePosixPath(name).parts[:-1]:
        for split, pattern in _IN_DIRECTORY.items():
            if pattern.fullmatch(part):
                return split
    return None


def _name_split(name: str) -> str | None:
    last = PurePosixPath(name).name
    return next((split for split, mark in _IN_NAME.items() if mark.fullmatch(last)), None)


def _only_file(source: str, file: StoredFile, selection: Selection) -> list[StoredFile]:
    if not can_read(file.name):
        raise DataError(
            f"{source} has a type that cannot be read; supported types: {supported_types()}"
        )
    _refuse_subset(source, selection)
    known = _name_split(file.name) or DEFAULT_SPLIT
    if selection.split not in (None, known, DEFAULT_SPLIT):
        raise DataError(
            f"split {selection.split} is set for {source}, but a single file has no splits: remove "
            "it, or name a directory whose files have names such as train.jsonl and test.jsonl"
        )
    return [file]


def _refuse_subset(source: str, selection: Selection) -> None:
    if selection.subset is not None:
        raise DataError(
            f"subset {selection.subset} is set for {source}, which has no subsets: only datasets "
            "on the Hub and directories with a dataset card have them"
        )


def _splits_of_directory(
    source: str, files: list[StoredFile], selection: Selection
) -> tuple[Splits, list[StoredFile]]:
    by_name = {file.name: file for file in files}
    if SAVED_DICT in by_name or SAVED_DATASET in by_name:
        _refuse_subset(source, selection)
        return _saved_splits(source, by_name), []
    configs = _card_configs(by_name[CARD]) if CARD in by_name else []
    if configs:
        return _card_splits(source, configs, by_name, selection), []
    _refuse_subset(source, selection)
    rows = [file for file in files if _holds_rows(file.name)]
    if not rows:
        # A directory of documents.
        rows = [file for file in files if can_read(file.name)]
    return split_by_name(rows)


def _holds_rows(name: str) -> bool:
    is_about = PurePosixPath(name).name in FILES_TO_IGNORE
    return can_read(name) and not is_document(name) and not is_about


def _saved_splits(source: str, by_name: dict[str, StoredFile]) -> Splits:
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


def _card_configs(card: StoredFile) -> list[dict[str, Any]]:
    """Return the entries of `configs` in the front matter of a dataset card."""
    with card.open() as opened:
        text = opened.read().decode("utf-8", errors="replace")
    match = _FRONT_MATTER.match(text)
    try:
        content = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        raise DataError(
            f"the dataset card {card.name} is not YAML: {' '.join(str(error).split())[:120]}"
        ) from None
    configs = content.get("configs") if isinstance(content, dict) else None
    return [entry for entry in configs or [] if isinstance(entry, dict)]


def _card_splits(
    source: str,
    configs: list[dict[str, Any]],
    by_name: dict[str, StoredFile],
    selection: Selection,
) -> Splits:
    names = [str(entry.get("config_name", "default")) for entry in configs]
    config = _wanted_config(source, configs, names, selection)
    if "data_files" in config:
        patterns = sanitize_patterns(config["data_files"])
    else:
        folder = str(config.get("data_dir", "")).strip("/")
        below = [file for file in by_name.values() if file.name.startswith(f"{folder}/")]
        return split_by_name([file for file in below if _holds_rows(file.name)])[0]
    base = str(config.get("data_dir", "")).strip("/")
    splits = {
        split: _matching([f"{base}/{name}" if base else name for name in wanted], by_name)
        for split, wanted in patterns.items()
    }
    return {split: files for split, files in splits.items() if files}


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


def _wanted(source: str, splits: Splits, others: list[StoredFile], selection: Selection) -> str:
    wanted = selection.split or selection.default_split
    if wanted in splits:
        return wanted
    if selection.split is None and selection.takes_only_split and len(splits) == 1:
        return next(iter(splits))
    found = "; ".join(f"{name}: {_files(files)}" for name, files in splits.items())
    more = f"; no split: {_files(others)}" if others else ""
    raise DataError(
        f"{source} has no split '{wanted}'. By the names of its files and directories it has "
        f"{found}{more}. Set prepare.split, or name the files to read, e.g. with a glob"
    )


def _name_unreadable(
    source: str, visible: list[StoredFile], listing: Listing, remarks: Remarks
) -> None:
    is_saved = any(file.name in (SAVED_DICT, SAVED_DATASET) for file in visible)
    if is_saved or not listing.files:
        return
    holds_rows = any(_holds_rows(file.name) for file in visible)
    ignored = [
        file
        for file in visible
        if not can_read(file.name)
        or (listing.is_directory and holds_rows and not _holds_rows(file.name))
    ]
    ignored = [file for file in ignored if PurePosixPath(file.name).name not in FILES_TO_IGNORE]
    if ignored:
        remarks.add(f"files of other types are left out: {_files(ignored)}", source)


def _files(files: list[StoredFile]) -> str:
    names = ", ".join(file.name for file in files[:2])
    return f"{names} and {len(files) - 2} more" if len(files) > 2 else names


def _is_hidden(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return any(part.startswith((".", "__")) for part in parts)
