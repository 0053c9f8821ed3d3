"""Tokenizers whose files name no end of a sequence and no padding."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from tuneline.models.tokenizer.files import copy_tokenizer
from tuneline.models.tokenizer.special_tokens import add_missing_tokens


@pytest.fixture
def bare_dir(tmp_path, tiny_model_dir):
    """Return a function that copies the tiny model without some of its special tokens."""

    def make(*missing, **config):
        path = tmp_path / "bare"
        shutil.copytree(tiny_model_dir, path, ignore=shutil.ignore_patterns("*.safetensors"))
        (path / "special_tokens_map.json").unlink(missing_ok=True)
        file = path / "tokenizer_config.json"
        settings = json.loads(file.read_text())
        file.write_text(json.dumps({k: v for k, v in settings.items() if k not in missing}))
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        (path / "generation_config.json").unlink(missing_ok=True)
        return path

    return make


def test_the_end_is_the_one_of_the_config_and_padding_is_no_end(bare_dir, caplog):
    path = bare_dir("eos_token", "pad_token")
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.eos_token is None and tokenizer.pad_token is None
    added = add_missing_tokens(tokenizer, path)
    # SmolLM2's config names token 2, which ends a turn; its <|endoftext|> appears in no template.
    assert added == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 0)
    assert "names no eos_token and no pad_token: using eos_token <|im_end|>" in caplog.text


def test_without_a_config_a_usual_end_is_taken(bare_dir):
    path = bare_dir("eos_token", eos_token_id=None)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert add_missing_tokens(tokenizer, path) == {"eos_token": "<|im_end|>"}


def test_a_complete_tokenizer_stays_as_it_is(tiny_model_dir, tmp_path, caplog):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    assert add_missing_tokens(tokenizer, tiny_model_dir) == {} and caplog.text == ""
    copy_tokenizer(tiny_model_dir, tmp_path)
    copied = (tmp_path / "tokenizer_config.json").read_text()
    assert json.loads(copied)["pad_token"] == tokenizer.pad_token


def test_a_copy_names_the_tokens(bare_dir, tmp_path):
    target = tmp_path / "copy"
    target.mkdir()
    copy_tokenizer(bare_dir("pad_token"), target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
