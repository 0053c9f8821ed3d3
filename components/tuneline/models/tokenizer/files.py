"""Copy a tokenizer's files as its authors wrote them, instead of saving the tokenizer again.

transformers 5 saves every tokenizer under a new class name and lists its extra special tokens under
a new key. transformers 4 and servers built on it refuse to load such files. transformers 5 also
leaves out `added_tokens_decoder`, from which llama.cpp's converter reads the special tokens of
models with a sentencepiece vocabulary.
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
    _make_portable(target)
    append_no_token(target)
    _name_missing_tokens(source, target)


def copy_templates(source: Path, target: Path) -> None:
    """Replace the further chat templates in `target` with those of the directory `source`."""
    shutil.rmtree(target / TEMPLATES_DIR, ignore_errors=True)
    for file in sorted((source / TEMPLATES_DIR).glob("*.jinja")):
        (target / TEMPLATES_DIR).mkdir(exist_ok=True)
        shutil.copyfile(file, target / TEMPLATES_DIR / file.name)


def append_no_token(directory: Path) -> bool:
    """Make the tokenizer append no special token to a text; return whether it appended one.

    A base model may be published with the settings of its own training, which put an end-of-text
    token after each text (`add_eos_token`, or a post-processor in tokenizer.json). Servers tokenise
    prompts with these settings, so the model would see an end of text before its answer.
    """
    settings = _read(directory)
    appended = settings.get("add_eos_token") is True
    if appended:
        _write(directory, {**settings, "add_eos_token": False})
    path = directory / "tokenizer.json"
    if not path.is_file():
        return appended
    text = path.read_text(encoding="utf-8")
    # Vocabularies are large, and most tokenizers have no such post-processor.
    if '"TemplateProcessing"' not in text:
        return appended
    tokenizer = json.loads(text)
    if not _cut_templates(tokenizer.get("post_processor") or {}):
        return appended
    path.write_text(json.dumps(tokenizer, indent=2, ensure_ascii=False), encoding="utf-8")
    return True


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


def _make_portable(directory: Path) -> None:
    """Rename what transformers 5 renamed to the names that transformers 4 and 5 both read."""
    settings = _read(directory)
    extra = settings.get("extra_special_tokens")
    if settings.get("tokenizer_class") not in _NEW_CLASSES and not isinstance(extra, list):
        return
    kept = {name: value for name, value in settings.items() if name not in _LOADING_DETAILS}
    if kept.get("tokenizer_class") in _NEW_CLASSES:
        kept["tokenizer_class"] = _PORTABLE_CLASS
    if isinstance(extra, list):
        del kept["extra_special_tokens"]
        tokens = kept.get("additional_special_tokens") or []
        kept["additional_special_tokens"] = [
            *tokens,
            *(token for token in extra if token not in tokens),
        ]
    _write(directory, kept)


def _cut_templates(processor: dict[str, Any]) -> bool:
    """Remove the special tokens after a text from the templates of a post-processor, in place.

    Returns:
        Whether there were any.
    """
    if processor.get("type") == "Sequence":
        return any([_cut_templates(part) for part in processor["processors"]])
    if processor.get("type") != "TemplateProcessing":
        return False
    was_cut = False
    for name in ("single", "pair"):
        while "SpecialToken" in (processor[name] or [{}])[-1]:
            del processor[name][-1]
            was_cut = True
    return was_cut


def _name_missing_tokens(source: Path, target: Path) -> None:
    special = target / "special_tokens_map.json"
    named = json.loads(special.read_text(encoding="utf-8")) if special.is_file() else {}
    named |= _read(target)
    if not (target / "tokenizer.json").is_file() or all(map(named.get, SPECIAL_TOKENS)):
        return
    # Imported here, because most tokenizers are complete, and steps without torch copy them too.
    from transformers import AutoTokenizer

    from tuneline.models.tokenizer.special_tokens import add_missing_tokens

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
