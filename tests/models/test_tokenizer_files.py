"""A tokenizer that is carried along stays what its authors wrote, and loads in older readers."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tuneline.models.tokenizer.files import (
    NAMES,
    append_no_token,
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


def test_the_list_of_transformers_5_gets_the_name_that_4_reads(
    source: Path, tmp_path: Path
) -> None:
    saved, target = tmp_path / "saved", tmp_path / "target"
    target.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokens = ["<|user|>", "<|tool|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.save_pretrained(saved)
    assert settings_of(saved)["extra_special_tokens"] == tokens, "transformers has changed"
    copy_tokenizer(saved, target)
    assert "extra_special_tokens" not in settings_of(target)
    assert settings_of(target)["additional_special_tokens"] == tokens
    ours = AutoTokenizer.from_pretrained(target)
    assert ours.all_special_tokens == tokenizer.all_special_tokens
    assert ours("a<|tool|>b")["input_ids"] == tokenizer("a<|tool|>b")["input_ids"]


def test_named_extra_tokens_stay_as_they_are(source: Path, tmp_path: Path) -> None:
    named = settings_of(source) | {"extra_special_tokens": {"image_token": "<image>"}}
    (source / "tokenizer_config.json").write_text(json.dumps(named))
    copy_tokenizer(source, tmp_path)
    assert settings_of(tmp_path)["extra_special_tokens"] == {"image_token": "<image>"}


@pytest.mark.parametrize("nested", [False, True])
def test_no_token_is_appended_to_a_prompt(source: Path, tmp_path: Path, nested: bool) -> None:
    plain = AutoTokenizer.from_pretrained(source)("a prompt")["input_ids"]
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    end, text = {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}, {"id": "A", "type_id": 0}
    first, second = {"Sequence": text}, {"Sequence": text | {"id": "B"}}
    template = {
        "type": "TemplateProcessing",
        "single": [end, first, end],
        "pair": [end, first, end, second, end],
        "special_tokens": {
            "<|im_end|>": {"id": "<|im_end|>", "ids": [2], "tokens": ["<|im_end|>"]}
        },
    }
    tokenizer["post_processor"] = (
        {"type": "Sequence", "processors": [template]} if nested else template
    )
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    (source / "tokenizer_config.json").write_text(
        json.dumps(settings_of(source) | {"add_eos_token": True})
    )
    assert AutoTokenizer.from_pretrained(source)("a prompt")["input_ids"] == [2, *plain, 2]
    target = tmp_path / "target"
    target.mkdir()
    copy_tokenizer(source, target)
    # What begins a text stays.
    assert AutoTokenizer.from_pretrained(target)("a prompt")["input_ids"] == [2, *plain]
    assert settings_of(target)["add_eos_token"] is False
    assert not append_no_token(target)
