"""Tokens without an embedding are refused before training."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from tuneline.errors import DataError
from tuneline.prepare import PrepareConfig
from tuneline.prepare.run import run


@pytest.fixture
def beyond_dir(tmp_path, tiny_model_dir):
    """Return the tiny model with two tokens for which it has no embedding."""
    path = tmp_path / "beyond"
    shutil.copytree(tiny_model_dir, path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.add_tokens(["<|new1|>", "<|new2|>"], special_tokens=True)
    tokenizer.save_pretrained(path)
    return path


def prepare(tmp_path, base_dir, rows, **settings):
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    return run(
        PrepareConfig.parse({"heldout": {"max_rows": 0}, **settings}),
        source=str(source),
        base_model_dir=str(base_dir),
        dataset_dir=str(tmp_path / "data"),
        statistics_path=str(tmp_path / "page.html"),
    )


def rows(answer):
    return [{"prompt": f"Question {n}?", "completion": f"{answer} {n}."} for n in range(20)]


@pytest.mark.parametrize("method", ["sft", "dpo", "kto", "cpt"])
def test_a_token_beyond_the_embedding_is_named(tmp_path, beyond_dir, method):
    data = rows("Answer <|new2|>")
    if method == "dpo":
        data = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "No."} for r in data]
    elif method == "kto":
        data = [row | {"label": True} for row in data]
    elif method == "cpt":
        data = [{"text": row["completion"]} for row in data]
    with pytest.raises(DataError, match=r"'<\|new2\|>' \(ID 49153\).*embedding ends at ID 49151"):
        prepare(tmp_path, beyond_dir, data, method=method)
    assert not (tmp_path / "data").exists()


def test_a_held_out_row_with_such_a_token_is_refused_too(tmp_path, beyond_dir):
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"prompt": "Why?", "completion": "<|new1|>!"}))
    with pytest.raises(DataError, match=r"'<\|new1\|>' \(ID 49152\)"):
        prepare(tmp_path, beyond_dir, rows("Answer"), heldout={"source": str(held), "max_rows": 1})


def test_such_tokens_do_no_harm_where_no_row_has_them(tmp_path, beyond_dir):
    assert prepare(tmp_path, beyond_dir, rows("Answer")).num_train_rows == 19
