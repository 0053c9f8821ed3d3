"""The file that `tuneline compile` writes: where it goes, and which files it may replace."""

import re
from pathlib import Path

from tuneline.errors import OutputExistsError, UserError
from tuneline.pipelines.catalog import is_shipped

_READ_CHARACTERS = 1 << 20
_COMPILED = re.compile(
    r"^# PIPELINE DEFINITION$|^pipelineInfo:|^apiVersion: pipelines\.kubeflow\.org/", re.MULTILINE
)
"""Lines of a compiled pipeline, and of one as Kubernetes resources."""


def output_beside(recipe: str, name: str) -> Path:
    """Return the default output: NAME.pipeline.yaml beside the file of a recipe.

    That of a shipped recipe is in the working directory.

    Args:
        recipe: the recipe's file or name, as it was given.
        name: the name in the recipe.
    """
    directory = Path.cwd() if is_shipped(recipe) else Path(recipe).parent
    return directory / f"{name}.pipeline.yaml"


def check_output(path: Path) -> None:
    """Check that a compiled pipeline can be written to a file.

    Raises:
        UserError: the file's name or directory cannot be used.
        OutputExistsError: the file is something else than a compiled pipeline, e.g. a recipe.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"--output {path}: name a file that ends in .yaml")
    if not path.parent.is_dir():
        raise UserError(
            f"--output {path}: the directory {path.parent} does not exist: create it first"
        )
    if path.is_dir():
        raise UserError(f"--output {path}: this is a directory: name a file in it")
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        content = file.read(_READ_CHARACTERS)
    if content.strip() and not _COMPILED.search(content):
        raise OutputExistsError(
            f"{path} exists and is not a compiled pipeline, so it is not replaced: name another "
            "file with --output, or delete it"
        )
