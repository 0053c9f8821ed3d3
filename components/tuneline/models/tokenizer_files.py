"""Copy a tokenizer's files as its authors wrote them, instead of saving the tokenizer again.

transformers 5 saves every tokenizer under a new class name, which transformers 4 and servers built
on it refuse to load. transformers 5 also leaves out `added_tokens_decoder`, from which llama.cpp's
converter reads the special tokens of models with a sentencepiece vocabulary.
"""

import json
import shutil
from pathlib import Path
from typing import Any

CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATES_DIR = "additional_chat_templates"
"""Directory with further chat templates, e.g. tool_use.jinja."""
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

SPECIAL_TOKENS = ("eos_token", "pad_token")
"""Settings that a copied tokenizer always has."""

# Class names that transformers 5 writes when it saves a tokenizer, e.g. one read from a GGUF file.
_NEW_CLASSES = {"TokenizersBackend", "TokenizersBackendFast"}
_PORTABLE_CLASS = "PreTrainedTokenizerFast"
# Settings that describe how a tokenizer was loaded, not the tokenizer.
_LOADING_DETAILS = ("backend", "is_local", "local_files_only", "fix_mistral_regex")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Replace the tokenizer files in `target` with those of the model directory `source`.

    If these name no end-of-sequence or no padding token, the copy names one: servers and trainers
    need both.
    """
    copy_templates(source, target)
    for name in NAMES:
        (target / name).unlink(missing_ok=True)
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    _use_portable_class(target)
    _name_missing_tokens(source, target)


def copy_templates(source: Path, target: Path) -> None:
    """Replace the further chat templates in `target` with those of the directory `source`."""
    shutil.rmtree(target / TEMPLATES_DIR, ignore_errors=True)
    for file in sorted((source / TEMPLATES_DIR).glob("*.jinja")):
        (target / TEMPLATES_DIR).mkdir(exist_ok=True)
        shutil.copyfile(file, target / TEMPLATES_DIR / file.name)


def read_chat_template(directory: Path) -> str | None:
    """Return the tokenizer's default chat template; None if transformers finds none."""
    if (directory / TEMPLATE_FILE).is_file():
        return (directory / TEMPLATE_FILE).read_text(encoding="utf-8")
    template = _read(directory).get("chat_template")
    if isinstance(template, list):  # several templates, each with a name
        return next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return None if template is None else str(template)


def set_chat_template(directory: Path, template: str) -> None:
    """Set the tokenizer's default chat template; write nothing if it is `template` already.

    The template is written to a file of its own. If tokenizer_config.json contains a template too,
    that template is also replaced, because older software reads it there.
    """
    if read_chat_template(directory) == template:
        return
    settings = _read(directory)
    if "chat_template" in settings:
        _write(directory, {**settings, "chat_template": template})
    (directory / TEMPLATE_FILE).write_text(template, encoding="utf-8")


def _use_portable_class(directory: Path) -> None:
    settings = _read(directory)
    if settings.get("tokenizer_class") not in _NEW_CLASSES:
        return
    kept = {name: value for name, value in settings.items() if name not in _LOADING_DETAILS}
    _write(directory, {**kept, "tokenizer_class": _PORTABLE_CLASS})


def _name_missing_tokens(source: Path, target: Path) -> None:
    special = target / "special_tokens_map.json"
    named = json.loads(special.read_text(encoding="utf-8")) if special.is_file() else {}
    named |= _read(target)
    if not (target / "tokenizer.json").is_file() or all(map(named.get, SPECIAL_TOKENS)):
        return
    # Imported here, because most tokenizers are complete, and steps without torch copy them too.
    from transformers import AutoTokenizer

    from tuneline.models.special_tokens import add_missing_tokens

    added = add_missing_tokens(AutoTokenizer.from_pretrained(str(source)), source)
    if added:
        _write(target, _read(target) | added)


def _read(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    settings: dict[str, Any] = (
        json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    )
    return settings


def _write(directory: Path, settings: dict[str, Any]) -> None:
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (directory / CONFIG_FILE).write_text(text, encoding="utf-8")
