"""Rows with the templates of models, from a file to the record; each was once prepared wrongly."""

import datetime
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from template_families import EMPTY_THINK, TEMPLATES, TOOLS, answer, user

from tuneline.errors import DataError
from tuneline.models.tokenizer.special_tokens import end_token
from tuneline.prepare.formats.example import Example
from tuneline.prepare.sources.kinds import date_of
from tuneline.prepare.tokens.render import Renderer
from tuneline.prepare.tokens.tokenizer import load_tokenizer


@pytest.fixture
def model(tiny_model_dir: Path, marked: Any, tmp_path: Path) -> Callable[..., Path]:
    """Make a model directory whose tokenizer has a template, or a dict of templates."""

    def make(template: str | dict[str, str]) -> Path:
        path = tmp_path / "model"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(tiny_model_dir, path)
        (path / "chat_template.jinja").unlink(missing_ok=True)
        marked.chat_template = template
        marked.save_pretrained(path)
        # A model with an embedding for every marker. Prepare needs no weights.
        for file in path.glob("*.safetensors*"):
            file.unlink()
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        config["vocab_size"] = len(marked)
        (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return path

    return make


def family(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def learnt(tokenizer: Any, row: dict[str, Any]) -> list[str]:
    """The learnt runs of a row of train.parquet, decoded."""
    found: list[list[int]] = []
    for number, (token, bit) in enumerate(zip(row["input_ids"], row["loss_mask"], strict=True)):
        if bit and not (number and row["loss_mask"][number - 1]):
            found.append([])
        if bit:
            found[-1].append(token)
    return [tokenizer.decode(run) for run in found]


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("cohere2", "<|END_OF_TURN_TOKEN|>"),
        ("llama3_1", "<|eot_id|>"),
        ("phi3", "<|end|>"),
        ("qwen3", "<|im_end|>"),
    ],
)
def test_generation_stops_at_the_last_token_of_the_end(marked: Any, name: str, end: str) -> None:
    marked.chat_template = family(name)
    token = end_token(marked, Renderer(marked).end_of_turn)
    assert marked.convert_ids_to_tokens(token) == end


def test_answers_that_occur_inside_the_end_mark(prepare: Any, model: Any, marked: Any) -> None:
    rows = [{"prompt": f"Problem {n}?", "completion": "abcdeot"[n % 7]} for n in range(40)]
    done = prepare(rows, model=model(family("llama3_1")), heldout={"max_rows": 8})
    assert done.manifest.end_of_turn == "<|eot_id|>"
    heldout = done.jsonl("heldout.jsonl")
    assert {row["end"] for row in heldout} == {"<|eot_id|>"}
    for row in heldout:
        number = int(row["question"].removeprefix("Problem ").removesuffix("?"))
        assert row["answer"] == "abcdeot"[number % 7]
        assert row["prompt"].endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert {text for row in done.rows() for text in learnt(marked, row)} <= {
        letter + "<|eot_id|>" for letter in "abcdeot"
    }


def test_held_out_rows_tokenise_as_training_rows(prepare: Any, model: Any, marked: Any) -> None:
    rows = [{"prompt": f"Problem {n}?", "completion": f"Answer {n}."} for n in range(20)]
    path = model(family("qwen3_5_think"))
    row = prepare(rows, model=path, heldout={"max_rows": 4}).jsonl("heldout.jsonl")[0]
    answer_only = {"prompt": row["question"], "completion": row["answer"]}
    trained = prepare([answer_only], model=path).rows()[0]
    whole = marked(row["prompt"] + row["answer"] + row["end"] + "\n", add_special_tokens=False)
    assert whole["input_ids"] == trained["input_ids"]
    assert row["prompt"].endswith("<|im_start|>assistant\n" + EMPTY_THINK)


def test_phi3_ends_with_one_token_and_keeps_a_conversation_in_one_row(
    prepare: Any, model: Any, marked: Any
) -> None:
    turns = [m for n in range(10) for m in (user(f"Number {n}?"), answer(f"It is {n}."))]
    done = prepare([{"messages": turns}], model=model(family("phi3")))
    (row,) = done.rows()
    assert learnt(marked, row) == [f"It is {n}.<|end|>" for n in range(10)]
    assert done.manifest.end_of_turn == "<|end|>"
    assert done.manifest.num_unfolded_conversations == 0


def test_unfolded_conversations_are_counted(prepare: Any, model: Any, caplog: Any) -> None:
    caplog.set_level("INFO")
    turns = [m for n in range(3) for m in (user(f"Number {n}?"), answer(f"It is {n}."))]
    rows = [{"messages": turns}, {"messages": turns[:2]}]
    done = prepare(rows, model=model(family("qwen3")))
    assert len(done.rows()) == 4
    assert done.manifest.num_unfolded_conversations == 1
    assert done.manifest.num_unfolded_rows == 3
    assert "1 conversations became 3 rows" in caplog.text
    assert "1 conversations became 3 rows" in done.page


def test_a_tokenizer_with_several_templates(prepare: Any, model: Any, marked: Any) -> None:
    row = {"prompt": "One?", "completion": "First."}
    texts = {"default": family("qwen2_5"), "tool_use": family("qwen3")}
    done = prepare([row], model=model(texts))
    assert "You are Qwen" in marked.decode(done.rows()[0]["input_ids"])
    path = model({"rag": family("qwen2_5"), "tool_use": family("qwen3")})
    with pytest.raises(
        DataError, match="the chat templates rag, tool_use and none .* is named def"
    ):
        prepare([row], model=path)


def test_a_template_in_chat_template_json(prepare: Any, model: Any, marked: Any) -> None:
    path = model(family("qwen2_5"))
    text = (path / "chat_template.jinja").read_text(encoding="utf-8")
    (path / "chat_template.jinja").unlink()
    (path / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    done = prepare([{"prompt": "One?", "completion": "First."}], model=path)
    assert learnt(marked, done.rows()[0]) == ["First.<|im_end|>"]
    # The steps after this one load the tokenizer, which does not have the template.
    assert (done.path / "chat_template.jinja").read_text(encoding="utf-8") == text


def test_a_template_that_reads_contents_in_parts(marked: Any) -> None:
    marked.chat_template = family("smolvlm")
    rendered = Renderer(marked).render(Example([user("One?"), answer("First.")]))
    row = rendered.heldout_row()
    assert (row["answer"].strip(), row["end"]) == ("First.", "<end_of_utterance>")
    assert "One?" in row["prompt"]


def test_the_date_of_a_template_is_that_of_the_data(
    prepare: Any, model: Any, marked: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    path = model(family("llama3_2"))
    source = tmp_path / "dated.jsonl"
    source.write_text(json.dumps({"prompt": "One?", "completion": "First."}) + "\n")
    moment = datetime.datetime(2026, 1, 31, 23, 30, tzinfo=datetime.UTC).timestamp()
    os.utime(source, (moment, moment))
    assert date_of(str(source), None) == datetime.date(2026, 1, 31)
    manifests = []
    for zone in ("Pacific/Kiritimati", "Pacific/Pago_Pago"):
        monkeypatch.setenv("TZ", zone)
        done = prepare(source, model=path)
        assert "Today Date: 31 Jan 2026" in marked.decode(done.rows()[0]["input_ids"])
        manifests.append(done.manifest)
    assert manifests[0].sha256 == manifests[1].sha256
    assert manifests[0].template_date == "2026-01-31"
    other = prepare(source, model=path, date="2026-02-01")
    assert "Today Date: 01 Feb 2026" in marked.decode(other.rows()[0]["input_ids"])
    assert other.manifest.sha256 != manifests[0].sha256
    undated = prepare(source, model=model(family("qwen2_5")), date="2026-02-01")
    assert undated.manifest.template_date is None


def test_further_templates_of_a_model_are_found(model: Any) -> None:
    path = model({"default": family("qwen2_5"), "tool_use": family("qwen3")})
    tokenizer, _ = load_tokenizer(str(path))
    assert sorted(tokenizer.chat_template) == ["default", "tool_use"]
    example = Example([user("One?"), answer("First.")], tools=TOOLS)
    assert EMPTY_THINK in Renderer(tokenizer).render(example).heldout_row()["prompt"]
