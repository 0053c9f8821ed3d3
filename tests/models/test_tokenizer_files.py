"""A tokenizer that is carried along stays what its authors wrote, and loads in older readers."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tuneline.models.tokenizer_files import (
    NAMES,
    copy_tokenizer,
    read_chat_template,
    set_chat_template,
)


@pytest.fixture
def source(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A tokenizer as a Hub repository has it: a class that every version knows."""
    path = tmp_path / "source"
    path.mkdir()
    copy_tokenizer(tiny_model_dir, path)
    return path


def settings_of(directory: Path) -> dict:
    return json.loads((directory / "tokenizer_config.json").read_text())


def test_files_are_copied_byte_by_byte(source: Path, tmp_path: Path) -> None:
    written = json.dumps({"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": {"0": {}}})
    (source / "tokenizer_config.json").write_text(written)
    (source / "model.safetensors").touch()
    target = tmp_path / "target"
    target.mkdir()
    (target / "vocab.json").write_text("of another tokenizer")
    (target / "config.json").write_text("{}")
    copy_tokenizer(source, target)
    copied = {path.name: path.read_bytes() for path in target.iterdir() if path.name in NAMES}
    assert copied == {
        path.name: path.read_bytes()
        for path in source.iterdir()
        if path.suffix in (".json", ".jinja")
    }
    assert (target / "config.json").read_text() == "{}"


def test_the_class_of_transformers_5_gets_a_name_that_4_knows(source: Path, tmp_path: Path) -> None:
    saved, target = tmp_path / "saved", tmp_path / "target"
    target.mkdir()
    AutoTokenizer.from_pretrained(source).save_pretrained(saved)
    assert settings_of(saved)["tokenizer_class"] == "TokenizersBackend", "transformers has changed"
    copy_tokenizer(saved, target)
    settings = settings_of(target)
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"is_local", "local_files_only", "backend"} & set(settings)
    text = "3Gi in Mi?<|im_end|>"
    ids = [AutoTokenizer.from_pretrained(path)(text)["input_ids"] for path in (source, target)]
    assert ids[0] == ids[1]


def test_another_template_goes_where_readers_look(source: Path) -> None:
    settings = {**settings_of(source), "chat_template": "old"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "chat_template.jinja").unlink(missing_ok=True)
    before = (source / "tokenizer_config.json").read_bytes()
    set_chat_template(source, "old")
    assert (source / "tokenizer_config.json").read_bytes() == before
    set_chat_template(source, "new")
    assert (source / "chat_template.jinja").read_text() == "new"
    assert settings_of(source)["chat_template"] == "new" == read_chat_template(source)
    assert AutoTokenizer.from_pretrained(source).chat_template == "new"


def test_the_default_of_several_templates(source: Path) -> None:
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (source / "chat_template.jinja").unlink(missing_ok=True)
    settings = {**settings_of(source), "chat_template": several}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    assert read_chat_template(source) == "d"
    set_chat_template(source, "d")
    assert settings_of(source)["chat_template"] == several
