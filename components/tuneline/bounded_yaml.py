"""Read YAML that others wrote, within bounds.

A few hundred bytes of YAML can stand for gigabytes: every alias (`*name`) repeats the value of its
anchor, and anchors may hold aliases ("billion laughs"). Deep nesting ends in a RecursionError.
"""

import re
from typing import Any

import yaml

from tuneline.errors import DataError

MAX_CHARACTERS = 4 << 20
MAX_DEPTH = 100
MAX_NODES = 200_000
"""Bounds of a document: its size, its nesting, and its values with every alias written out."""


_FRONT_MATTER = re.compile(
    r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE
)


def split_front_matter(text: str) -> tuple[str, str]:
    """Return the YAML between two lines `---` that a Markdown file begins with, and the rest of it.

    The YAML is empty if there is none. A byte order mark before it and either kind of line end are
    taken, and a `---` within a line belongs to the YAML.
    """
    found = _FRONT_MATTER.match(text)
    return (found[1], text[found.end() :]) if found else ("", text)


def load_yaml(text: str, *, where: str = "the document") -> Any:
    """Read a YAML document of plain values.

    Args:
        text: the document.
        where: its name, for messages.

    Raises:
        DataError: the document exceeds a bound.
        yaml.YAMLError: the text is not YAML.
    """
    loader = yaml.SafeLoader(text)
    try:
        root = compose(loader, text, where=where)
        return None if root is None else loader.construct_document(root)
    finally:
        loader.dispose()


def check_yaml(text: str, *, where: str = "the document") -> None:
    """Check the bounds of a YAML document that another library will read, with any tags.

    Args:
        text: the document.
        where: its name, for messages.

    Raises:
        DataError: the document exceeds a bound.
        yaml.YAMLError: the text is not YAML.
    """
    loader = yaml.SafeLoader(text)
    try:
        compose(loader, text, where=where)
    finally:
        loader.dispose()


def compose(loader: yaml.SafeLoader, text: str, *, where: str) -> yaml.Node | None:
    """Return the node of the only document of `text`, within bounds; None if there is none.

    Args:
        loader: a loader of `text`.
        text: the document.
        where: its name, for messages.

    Raises:
        DataError: the document exceeds a bound.
        yaml.YAMLError: the text is not YAML.
    """
    if len(text) > MAX_CHARACTERS:
        raise DataError(
            f"{where} has {len(text):,} characters of YAML, but at most {MAX_CHARACTERS:,} are read"
        )
    try:
        root = loader.get_single_node()
        if root is not None:
            _check(root, where)
        return root
    except RecursionError:
        raise DataError(f"{where} is nested deeper than YAML is read: simplify it") from None


def _check(root: yaml.Node, where: str) -> None:
    """Check the size and the depth of a document with its aliases written out."""
    num_nodes, depth = _size(root, {}, set(), where)
    if num_nodes > MAX_NODES or depth > MAX_DEPTH:
        raise DataError(
            f"{where} stands for {num_nodes:,} values, nested {depth} deep, once its aliases are "
            f"written out, but at most {MAX_NODES:,} values and a depth of {MAX_DEPTH} are read"
        )


def _size(
    node: yaml.Node, known: dict[int, tuple[int, int]], open_: set[int], where: str
) -> tuple[int, int]:
    """Return the number of values in a node, and its depth.

    Args:
        node: the node.
        known: the results so far, by the nodes' identities: the value of an alias is measured once.
        open_: identities of the nodes that contain this one.
        where: name of the document, for messages.
    """
    if id(node) in known:
        return known[id(node)]
    if id(node) in open_:
        raise DataError(f"{where} has an alias that contains itself")
    open_.add(id(node))
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    sizes = [_size(child, known, open_, where) for child in children]
    open_.discard(id(node))
    total = 1 + sum(number for number, _ in sizes)
    known[id(node)] = total, 1 + max((depth for _, depth in sizes), default=0)
    return known[id(node)]
