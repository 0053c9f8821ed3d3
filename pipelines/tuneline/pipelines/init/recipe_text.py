"""Write settings as a commented YAML file."""

import textwrap
from collections.abc import Sequence

from tuneline.pipelines.init.settings import Setting
from tuneline.recipe_file.yaml_document import dump_value

_WIDTH = 100
_COLUMN = 40
"""Column at which comments beside values begin, where the values leave room."""


def recipe_text(settings: Sequence[Setting], heading: Sequence[str]) -> str:
    """Return a recipe as YAML; the reason of a setting is beside it, or above if it is long.

    Args:
        settings: the settings, in order; those of one section follow each other.
        heading: sentences for the head of the file.
    """
    lines = [line for sentence in heading for line in _comment(sentence, "")]
    sections: list[str] = []
    for setting in settings:
        *wanted, key = setting.key.split(".")
        for depth, section in enumerate(wanted):
            if sections[: depth + 1] != wanted[: depth + 1]:
                lines.append(f"{'  ' * depth}{section}:")
        sections = wanted
        lines += _entry(key, setting, "  " * len(wanted))
    return "\n".join(lines) + "\n"


def _entry(key: str, setting: Setting, indent: str) -> list[str]:
    entry = f"{indent}{key}: {dump_value(setting.value)}"
    if not setting.why:
        return [entry]
    beside = f"{entry.ljust(_COLUMN - 2)}  # {setting.why}"
    if len(beside) <= _WIDTH:
        return [beside]
    return [*_comment(_sentence(setting.why), indent), entry]


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}{'' if text.endswith(('.', '?')) else '.'}"


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()),
        _WIDTH,
        initial_indent=f"{indent}# ",
        subsequent_indent=f"{indent}# ",
        break_long_words=False,
        break_on_hyphens=False,
    )
