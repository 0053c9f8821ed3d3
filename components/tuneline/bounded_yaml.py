"""Read YAML that others wrote, within bounds.

A few hundred bytes of YAML can stand for gigabytes: every alias (`*name`) repeats the value of its
anchor, and anchors may hold aliases ("billion laughs"). Deep nesting ends in a RecursionError.
"""

import re
from collections.abc import Callable
from typing import Any

import yaml

from tuneline.errors import DataError

MAX_CHARACTERS = 4 << 20
MAX_DEPTH = 100
MAX_NODES = 200_000
"""Bounds of a document: its size, its nesting, and its values with every alias written out."""
MAX_DIGITS = 1000
"""Bound of a whole number, in characters: Python refuses to write numbers of more than 4,300."""


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
        DataError: the document exceeds a bound, or has a value that does not exist, such as a date.
        yaml.YAMLError: the text is not YAML.
    """
    loader = yaml.SafeLoader(text)
    try:
        return _value(loader, compose(loader, text, where=where), where)
    finally:
        loader.dispose()


def load_documents(text: str, *, where: str = "the file") -> list[Any]:
    """Read all YAML documents of a text; see `load_yaml`."""
    loader = yaml.SafeLoader(text)
    documents = []
    try:
        _check_length(text, where)
        while loader.check_node():
            documents.append(_value(loader, _bounded(loader.get_node, where), where))
        return documents
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
    _check_length(text, where)
    return _bounded(loader.get_single_node, where)


def _check_length(text: str, where: str) -> None:
    if len(text) > MAX_CHARACTERS:
        raise DataError(
            f"{where} has {len(text):,} characters of YAML, but at most {MAX_CHARACTERS:,} are read"
        )


def _bounded(get: Callable[[], yaml.Node | None], where: str) -> yaml.Node | None:
    """Return a document from the loader's method `get`, within bounds."""
    try:
        root = get()
        if root is not None:
            _check(root, where)
        return root
    except RecursionError:
        raise DataError(f"{where} is nested deeper than YAML is read: simplify it") from None


def _value(loader: yaml.SafeLoader, root: yaml.Node | None, where: str) -> Any:
    """Return the value of a document."""
    try:
        return None if root is None else loader.construct_document(root)
    except (ValueError, OverflowError) as error:
        # Text that has the form of a date or a number, e.g. 2026-02-30.
        raise DataError(f"{where} has a value that cannot be read ({error}): quote it") from None


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
    if isinstance(node, yaml.ScalarNode):
        _check_number(node, where)
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


def _check_number(node: yaml.ScalarNode, where: str) -> None:
    if node.tag == "tag:yaml.org,2002:int" and len(node.value) > MAX_DIGITS:
        raise DataError(
            f"{where} has a whole number of {len(node.value):,} characters in line "
            f"{node.start_mark.line + 1}, but at most {MAX_DIGITS:,} are read"
        )
