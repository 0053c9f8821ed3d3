"""Lint checks for what KFP does not pass on as it is written: texts, and lists of artifacts.

The rules are listed in `lint.py`. Documents may have any shape: a value that should be a mapping
but is not counts as empty.
"""

import re
from collections.abc import Iterator
from typing import Any

from tuneline.pipelines.lint.required import Problems, mapping
from tuneline.runtime.parameter_text import find_replaced

_KFP_PLACEHOLDER = re.compile(
    r"\{\{\$\.(inputs\.parameters\[[^]]*\]|pipeline_job_(name|resource_name|uuid))\}\}"
)
"""Reference to a task's input, which the SDK writes into constants, or to the run, which KFP's
driver replaces."""

_NOT_PASSED = re.compile(r"\.container\.(command|args)\[\d+\]$|^pipelineInfo\.description$")


def check_lists(pipeline: dict[str, Any]) -> Problems:
    """Check that no list of artifacts is an input of a DAG, of which KFP passes one item."""
    fix = "give the list to a task outside; a single task can have a condition (triggerPolicy)"
    for name, component in mapping(pipeline, "components").items():
        if "dag" not in mapping(component):
            continue
        for artifact, declared in mapping(component, "inputDefinitions", "artifacts").items():
            if mapping(declared).get("isArtifactList"):
                path = f"components.{name}.inputDefinitions.artifacts.{artifact}"
                words = "a condition, loop or nested pipeline gets only the first item of the list"
                yield path, "list-into-dag", words, fix


def check_texts(document: dict[str, Any]) -> Problems:
    """Check that no text holds a sequence that Kubernetes, Argo or KFP would replace.

    The commands of executors are left out, because their placeholders and shell code are KFP's own,
    and so is the description of the pipeline, which only the UI shows.
    """
    fix = "write the first character as a Unicode escape in JSON, as `tuneline compile` does"
    for path, text in _texts(document, ""):
        found = find_replaced(_KFP_PLACEHOLDER.sub("", text))
        if found and not _NOT_PASSED.search(path):
            yield path, "replaced-text", found, fix


def _texts(node: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield every text below a node, keys included, with its path."""
    if isinstance(node, str):
        yield path, node
    elif isinstance(node, dict):
        for name, value in node.items():
            inner = f"{path}.{name}" if path else str(name)
            yield inner, str(name)
            yield from _texts(value, inner)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _texts(value, f"{path}[{index}]")
