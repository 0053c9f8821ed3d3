"""Choose the files of a directory or glob that hold the rows of one split.

The rules are those of the `datasets` library: the configurations in a dataset card, else the names
of directories, else the names of files. Unlike the library, what a split leaves out is named, and a
directory with other splits but without the wanted one is refused.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import PurePosixPath

from datasets.data_files import FILES_TO_IGNORE

from tuneline.errors import DataError
from tuneline.prepare.sources.described import (
    CARD,
    SAVED_DATASET,
    SAVED_DICT,
    card_configs,
    card_splits,
    saved_splits,
)
from tuneline.prepare.sources.files import can_read, supported_types
from tuneline.prepare.sources.local import is_hidden
from tuneline.prepare.sources.row import DEFAULT_SPLIT, Remarks, Selection
from tuneline.prepare.sources.split_names import (
    Splits,
    holds_rows,
    split_by_name,
    split_of_name,
)
from tuneline.prepare.sources.stored import Listing, StoredFile


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
    visible = [file for file in listing.files if not is_hidden(file.name)]
    if listing.is_directory:
        is_clone = len(visible) < len(listing.files) and _is_clone(listing.files)
        splits, others = _splits_of_directory(source, visible, selection, is_clone=is_clone)
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


def _only_file(source: str, file: StoredFile, selection: Selection) -> list[StoredFile]:
    if not can_read(file.name):
        raise DataError(
            f"{source} has a type that cannot be read; supported types: {supported_types()}"
        )
    _refuse_subset(source, selection)
    known = split_of_name(file.name) or DEFAULT_SPLIT
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
    source: str, files: list[StoredFile], selection: Selection, *, is_clone: bool
) -> tuple[Splits, list[StoredFile]]:
    by_name = {file.name: file for file in files}
    if SAVED_DICT in by_name or SAVED_DATASET in by_name:
        _refuse_subset(source, selection)
        return saved_splits(source, by_name), []
    configs = card_configs(by_name[CARD]) if CARD in by_name else []
    if configs:
        return card_splits(source, configs, by_name, selection), []
    _refuse_subset(source, selection)
    rows = [file for file in files if holds_rows(file.name)]
    if rows:
        return split_by_name(rows)
    documents = [
        file for file in files if can_read(file.name) and not (is_clone and file.name == CARD)
    ]
    splits, others = split_by_name(documents)
    # The name of a document, such as training.md, rarely means a split, unless all names do.
    return ({DEFAULT_SPLIT: documents}, []) if others else (splits, others)


def _is_clone(files: Iterable[StoredFile]) -> bool:
    """Return whether a directory is a clone of a repository, whose README is about the files."""
    return any(file.name == ".gitattributes" or file.name.startswith(".git/") for file in files)


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
    has_rows = any(holds_rows(file.name) for file in visible)
    ignored = [
        file
        for file in visible
        if not can_read(file.name)
        or (listing.is_directory and has_rows and not holds_rows(file.name))
    ]
    ignored = [file for file in ignored if PurePosixPath(file.name).name not in FILES_TO_IGNORE]
    if ignored:
        remarks.add(f"files of other types are left out: {_files(ignored)}", source)


def _files(files: list[StoredFile]) -> str:
    names = ", ".join(file.name for file in files[:2])
    return f"{names} and {len(files) - 2} more" if len(files) > 2 else names
