"""Carry a tokenizer's files along as its authors wrote them, and not as they are saved again.

transformers 5 saves every tokenizer under a class of its own, which transformers 4, and servers
built on it, refuse to load; and it leaves out `added_tokens_decoder`, from which llama.cpp's
converter learns the special tokens of models with a sentencepiece vocabulary.
"""

import json
import shutil
from pathlib import Path
from typing import Any

CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
NAMES = (
    CONFIG_FILE,
    TEMPLATE_FILE,
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
)

# What a model that was read from a GGUF file has: transformers 5 wrote it.
_OURS = {"TokenizersBackend", "TokenizersBackendFast"}
_KNOWN_TO_ALL = "PreTrainedTokenizerFast"
# True of the process that loaded a tokenizer, not of the tokenizer.
_OF_LOADING = ("backend", "is_local", "local_files_only", "fix_mistral_regex")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer of a model directory; others of the target's are removed."""
    for name in NAMES:
        (target / name).unlink(missing_ok=True)
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    _name_for_all(target)


def read_chat_template(directory: Path) -> str | None:
    """Return a tokenizer's default chat template; None where it has none."""
    if (directory / TEMPLATE_FILE).is_file():
        return (directory / TEMPLATE_FILE).read_text(encoding="utf-8")
    found = _read(directory).get("chat_template")
    if isinstance(found, list):  # several, by name
        found = next((one["template"] for one in found if one["name"] == "default"), None)
    return found


def set_chat_template(directory: Path, template: str) -> None:
    """Give a tokenizer another default chat template; the same one changes nothing.

    It goes where readers look for it: into a file of its own, and into the tokenizer's settings
    where those had one, which older readers would otherwise still find there.
    """
    if read_chat_template(directory) == template:
        return
    settings = _read(directory)
    if "chat_template" in settings:
        _write(directory, {**settings, "chat_template": template})
    (directory / TEMPLATE_FILE).write_text(template, encoding="utf-8")


def _name_for_all(directory: Path) -> None:
    settings = _read(directory)
    if settings.get("tokenizer_class") not in _OURS:
        return
    kept = {name: value for name, value in settings.items() if name not in _OF_LOADING}
    _write(directory, {**kept, "tokenizer_class": _KNOWN_TO_ALL})


def _read(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write(directory: Path, settings: dict[str, Any]) -> None:
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (directory / CONFIG_FILE).write_text(text, encoding="utf-8")
