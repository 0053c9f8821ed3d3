"""Put together a recipe for a source of rows, and write it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneline.errors import DataError, OutputExistsError, RecipeError, UserError
from tuneline.pipelines.init.base import Base, Lengths, choose_base, measure
from tuneline.pipelines.init.findings import describe
from tuneline.pipelines.init.machine import Machine
from tuneline.pipelines.init.recipe_text import recipe_text
from tuneline.pipelines.init.rows import Rows, look
from tuneline.pipelines.init.settings import (
    MIN_ROWS,
    Setting,
    name_of,
    propose_settings,
    shortage,
    trains_on_cpu,
)
from tuneline.pipelines.plan.early import no_retries
from tuneline.prepare.config import PrepareConfig
from tuneline.prepare.sources.kinds import kind_of
from tuneline.recipe import load_recipe
from tuneline.runtime.redaction import redacted

_PREPARE = "prepare."


@dataclass(frozen=True)
class Proposed:
    """A recipe that was written, and what it is based on."""

    path: Path
    rows: Rows
    base: Base
    lengths: Lengths
    shortage: str
    """A sentence if the gate will have too few rows, or ""."""

    def sentences(self) -> list[str]:
        """Return what was seen and chosen, a line each."""
        return list(describe(self.rows, self.base, self.lengths, self.shortage))


def output_for(source: str, output: Path | None) -> Path:
    """Return the path of the recipe for a source: beside a file or a directory, else here.

    Raises:
        UserError: the name of the given output is not that of a YAML file.
        OutputExistsError: there is such a file.
    """
    if output is not None and output.suffix not in (".yaml", ".yml"):
        raise UserError(f"--output {output}: name a file that ends in .yaml")
    path = output or _beside(source)
    if path.exists():
        raise OutputExistsError(
            f"{path} exists, and nothing is overwritten: name another file with --output, or "
            "remove it"
        )
    if not path.absolute().parent.is_dir():
        raise UserError(f"there is no directory {path.absolute().parent} for --output {output}")
    return path


def init(
    source: str,
    path: Path,
    machine: Machine,
    *,
    base_model: str | None,
    given: dict[str, Any],
) -> Proposed:
    """Write a recipe for the rows of a source to `path`.

    Args:
        source: a source as in a recipe's `dataset`; a path is relative to the working directory.
        path: file to write; it must not exist.
        machine: the machine that the recipe is for.
        base_model: the base model; None: one that fits the machine.
        given: values of the recipe by dotted key, which are kept as they are.

    Raises:
        DataError: there are no rows, they cannot be used, or it is not clear how they are meant.
        ModelError: the base model does not exist, or cannot be tuned.
        RecipeError: a given value is not valid.
        HubError: the Hub or a store could not be reached for the rows.
    """
    config = PrepareConfig.parse(_prepare_of(given), where="--set")
    with no_retries():
        rows = look(source, config)
        if rows.num_usable < MIN_ROWS:
            raise DataError(
                f"{rows.source} has {rows.num_usable} usable rows, but a run needs at least "
                f"{MIN_ROWS} to train on some and to measure on others"
            )
        config = config.model_copy(update={"method": rows.proposal.method})
        base = choose_base(_absolute(base_model or given.get("base_model")), machine, rows)
        lengths = measure(base, rows, config)
    settings = propose_settings(
        rows, base, lengths, machine, name=name_of(path.name), dataset=_dataset(source, path)
    )
    heading = [
        f"Written by `tuneline init {redacted(source)}` for {machine}. Change what you like: "
        "`tuneline plan` checks it, and docs/recipe.md describes every key."
    ]
    text = recipe_text(_with_given(settings, given), heading)
    _write(path, text)
    short = shortage(rows, on_cpu=trains_on_cpu(machine, base))
    return Proposed(path, rows, base, lengths, short)


def _beside(source: str) -> Path:
    """Return the path of a recipe beside a file or a directory, or here for any other source."""
    path = Path(source).expanduser()
    if not path.exists():
        return Path(f"{name_of(source)}.yaml")
    # The name of `.` is that of the working directory.
    name = f"{name_of(os.path.abspath(path))}.yaml"
    return (
        path.parent / name
        if path.name not in ("", "..")
        else Path(os.path.abspath(path)).parent / name
    )


def _prepare_of(given: dict[str, Any]) -> dict[str, Any]:
    """Return the given values of the `prepare` section that say how rows are read."""
    known = PrepareConfig.model_fields
    return {
        key.removeprefix(_PREPARE): value
        for key, value in given.items()
        if key.startswith(_PREPARE) and key.removeprefix(_PREPARE) in known
    }


def _dataset(source: str, recipe: Path) -> str:
    """Return a source as the recipe names it: a path relative to the recipe if it is below it."""
    if kind_of(source) != "files" or "://" in source:
        return source
    path = Path(os.path.abspath(Path(source).expanduser()))
    base = Path(os.path.abspath(recipe.parent))
    return str(path.relative_to(base)) if path.is_relative_to(base) and path != base else str(path)


def _absolute(base_model: str | None) -> str | None:
    """Return a base model; a path absolute, because a recipe's paths are relative to its file."""
    if base_model is None or not Path(base_model).expanduser().exists():
        return base_model
    return os.path.abspath(Path(base_model).expanduser())


def _with_given(settings: list[Setting], given: dict[str, Any]) -> list[Setting]:
    """Return the settings with the given values in place of those that were proposed."""
    kept = [
        setting
        for setting in settings
        if not any(setting.key.startswith(f"{key}.") for key in given)
    ]
    for key, value in given.items():
        keys = [setting.key for setting in kept]
        new = Setting(key, value, "given with --set")
        if key in keys:
            kept[keys.index(key)] = new
            continue
        kept.insert(_place(key, keys), new)
    return kept


def _place(key: str, keys: list[str]) -> int:
    """Return where a key belongs among others: behind those of its section, written only once."""
    section = key
    while section:
        section = section.rpartition(".")[0]
        below = [index for index, other in enumerate(keys) if _is_in(other, section)]
        if below:
            return below[-1] + 1
    return len(keys)


def _is_in(key: str, section: str) -> bool:
    return key.startswith(f"{section}.") if section else "." not in key


def _write(path: Path, text: str) -> None:
    """Write a recipe if it is valid; an existing file is never overwritten."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise OutputExistsError(f"{path} exists, and nothing is overwritten") from None
    try:
        load_recipe(path, needs_files=True)
    except RecipeError:
        path.unlink()
        raise
