"""Read a YAML document as YAML 1.2 has it, with the line of every key.

PyYAML reads YAML 1.1, in which `off` is false, `1e-4` is a text and `1:30` is 90. Here, numbers,
true, false and null are those of YAML 1.2's core schema, and everything else is a text. The last of
two equal keys would win without a word, so equal keys are refused.
"""

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from tuneline.bounded_yaml import compose
from tuneline.errors import DataError, RecipeError
from tuneline.schema.keys import Path

_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"


class _Loader(yaml.SafeLoader):
    """A loader whose plain scalars are those of YAML 1.2's core schema, without .inf and .nan."""

    yaml_implicit_resolvers: dict[Any, Any] = {}

    def construct_whole_number(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, 0 if text.startswith(("0x", "0o")) else 10)


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes what YAML 1.1 or YAML 1.2 would not read as a text."""


for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"^(?:{_pattern})$"), _first)
    _Dumper.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_whole_number)

_BACKSLASH = "a backslash in \"...\" begins an escape: write '...', or each backslash twice"
_EXPLAINED = (
    ("cannot start any token", "'\\t'", "a tab stands there: indent with spaces"),
    ("while scanning an alias", "", "a text that begins with * has to be quoted"),
    ("while scanning an anchor", "", "a text that begins with & has to be quoted"),
    ("found undefined alias", "", "a text that begins with * has to be quoted"),
    ("cannot start any token", "", "a text that begins with this character has to be quoted"),
    ("while scanning a directive", "", "a text that begins with % has to be quoted"),
    (
        "mapping values are not allowed",
        "",
        "a colon is where none can be: quote a text that contains ': ', or check the indentation",
    ),
    ("could not find expected ':'", "", "this is no KEY: VALUE, because the colon is missing"),
    ("expected <block end>", "", "the indentation differs from that of the lines before"),
    ("did not find expected", "", "the indentation differs from that of the lines before"),
    ("while parsing a flow sequence", "", "the list that begins here with [ does not end with ]"),
    ("while parsing a flow mapping", "", "the mapping that begins here with { does not end with }"),
    ("unexpected end of stream", "", "the text that begins here with a quote does not end with it"),
    ("expected escape sequence", "", _BACKSLASH),
    ("unknown escape character", "", _BACKSLASH),
    ("expected a single document", "", "a second document begins here, but a recipe is one"),
    ("could not determine a constructor", "", "recipes have no tags such as !name: remove it"),
    ("unhashable key", "", "a key is a list or a mapping, but keys are words"),
)
"""Parts of PyYAML's messages -> what to say instead."""
_AT_START = ("flow sequence", "flow mapping", "simple key", "quoted scalar")
"""Constructs whose error is shown at their first line, where the mistake is."""


@dataclass(frozen=True)
class YamlDocument:
    """A document's values, and where they are."""

    values: Any
    lines: dict[Path, int]
    """Line, from 1, of the key or list item at each path."""

    def line_of(self, path: Path) -> int | None:
        """Return the line of a key; if the document does not have it, that of the one above it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path)


def dump_document(values: Any) -> str:
    """Return plain values as YAML that readers of YAML 1.1 and of YAML 1.2 read alike."""
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def dump_value(value: Any) -> str:
    """Return a plain value as YAML on one line, e.g. [a, b], that all readers read alike."""
    text = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=True,
        width=float("inf"),
    )  # fmt: skip
    return str(text).removesuffix("\n").removesuffix("\n...")


def decode(content: bytes, where: str) -> str:
    """Return the text of a file in UTF-8, or in UTF-16 with a byte order mark.

    Raises:
        RecipeError: the content is in another encoding, or no text.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    else:
        encoding = "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        name = "UTF-8" if encoding == "utf-8-sig" else "UTF-16"
        raise RecipeError(
            f"{where}:{line}: not {name} text (byte 0x{content[error.start]:02x}): save the file "
            "as UTF-8, e.g. with iconv -f cp949 -t utf-8"
        ) from None


def parse_document(text: str, where: str) -> YamlDocument:
    """Read a YAML document.

    Args:
        text: the document.
        where: its name, for messages.

    Raises:
        RecipeError: the text is not YAML, or gives a key twice.
    """
    loader = None
    try:
        loader = _Loader(text)
        root = compose(loader, text, where=where)
        if root is None:
            return YamlDocument(None, {})
        # Before the values are made, which writes merged keys beside those that replace them.
        lines: dict[Path, int] = {}
        repeated = list(_walk(root, (), lines))
        values = loader.construct_document(root)
    except DataError as error:
        raise RecipeError(str(error)) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            f"{where}:{line}: the character #x{error.character:04x} is not allowed in YAML: "
            "remove it, or check that the file is a text"
        ) from None
    except yaml.MarkedYAMLError as error:
        raise RecipeError(_explain(error, where)) from None
    except ValueError as error:
        # E.g. a number with more digits than Python converts.
        raise RecipeError(f"{where} is not YAML: {error}") from None
    finally:
        if loader is not None:
            loader.dispose()
    if repeated:
        raise RecipeError("\n".join(f"{where}:{line}: {words}" for line, words in repeated))
    return YamlDocument(values, lines)


def _explain(error: yaml.MarkedYAMLError, where: str) -> str:
    said = f"{error.context or ''}: {error.problem or ''}"
    mark = error.problem_mark or error.context_mark
    if error.context_mark is not None and any(part in said for part in _AT_START):
        mark = error.context_mark
    words = next(
        (words for part, also, words in _EXPLAINED if part in said and also in said),
        said.strip(": "),
    )
    place = f":{mark.line + 1}" if mark is not None else ""
    return f"{where}{place}: not YAML: {words}"


def _walk(node: yaml.Node, path: Path, lines: dict[Path, int]) -> Iterator[tuple[int, str]]:
    """Note the line of every key and list item; yield a line and a sentence per repeated key."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines.setdefault((*path, index), item.start_mark.line + 1)
            yield from _walk(item, (*path, index), lines)
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in first and key.tag != _MERGE:
            yield line, f"{name} is given twice, first in line {first[name]}: remove one"
        first.setdefault(name, line)
        lines.setdefault((*path, name), line)
        yield from _walk(value, (*path, name), lines)
