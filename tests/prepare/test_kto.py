"""Labelled answers become rows for method kto, whatever their spelling."""

import json

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from tuneline.artifacts import DatasetManifest, read_jsonl
from tuneline.errors import DataError
from tuneline.models.heldout_rows import read_rows
from tuneline.prepare import PrepareConfig
from tuneline.prepare.run import run


def prepare(tmp_path, base_dir, lines, name="rows.jsonl", **settings):
    source = tmp_path / name
    if name.endswith(".csv"):
        source.write_text("\n".join(lines))
    else:
        source.write_text("\n".join(map(json.dumps, lines)))
    settings = {"eval_share": 0, "heldout": {"max_rows": 0}, **settings}
    return run(
        PrepareConfig.parse({"method": "kto", **settings}),
        source=str(source),
        base_model_dir=str(base_dir),
        dataset_dir=str(tmp_path / "data"),
        statistics_path=str(tmp_path / "page.html"),
    )


def rows_of(tmp_path, name="train"):
    return pq.read_table(tmp_path / "data" / f"{name}.parquet").to_pylist()


def question(number):
    return [{"role": "user", "content": f"Question {number}?"}]


def answer(number):
    return [{"role": "assistant", "content": f"Answer {number}."}]


SPELLINGS = {
    "kto-mix": lambda n: {"prompt": question(n), "completion": answer(n), "label": n % 2 == 0},
    "texts": lambda n: {
        "prompt": f"Question {n}?",
        "completion": f"Answer {n}.",
        "label": ["true", "False"][n % 2],
    },
    "numbers": lambda n: {"messages": [*question(n), *answer(n)], "label": 1 - n % 2},
    "llama-factory": lambda n: {
        "conversations": [
            {"from": "human", "value": f"Question {n}?"},
            {"from": "gpt", "value": f"Answer {n}."},
        ],
        "kto_tag": n % 2 == 0,
    },
    "alpaca": lambda n: {
        "instruction": f"Question {n}?",
        "input": "",
        "output": f"Answer {n}.",
        "kto_tag": n % 2 == 0,
    },
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_the_same_rows(tmp_path, tiny_model_dir, spelling):
    manifest = prepare(tmp_path, tiny_model_dir, [SPELLINGS[spelling](n) for n in range(10)])
    assert (manifest.num_train_rows, manifest.num_desirable_rows) == (10, 5)
    assert manifest.unused == {}
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    found = set()
    for row in rows_of(tmp_path):
        prompt, text = (tokenizer.decode(row[key]) for key in ("prompt_ids", "completion_ids"))
        number = int(text.split()[1][0])
        assert row["label"] == (number % 2 == 0)
        turn = tokenizer.apply_chat_template(
            question(number), tokenize=False, add_generation_prompt=True
        )
        assert (prompt, text) == (turn, f"Answer {number}.<|im_end|>")
        found.add(number)
    assert found == set(range(10))
    page = (tmp_path / "page.html").read_text()
    assert "training answers, and 5 undesirable" in page
    assert "<b>desirable answer</b>" in page or "<b>undesirable answer</b>" in page


def test_labels_in_a_csv_file(tmp_path, tiny_model_dir):
    lines = ["prompt,completion,label", "Why?,Because.,true", "When?,Later.,0", "Who?,Me.,TRUE"]
    manifest = prepare(tmp_path, tiny_model_dir, lines, name="rows.csv")
    assert (manifest.num_train_rows, manifest.num_desirable_rows) == (3, 2)


def test_a_row_is_cut_in_its_answer(tmp_path, tiny_model_dir):
    long = {"prompt": "Count!", "completion": "one two three " * 40, "label": True}
    lost = {"prompt": "word " * 300, "completion": "Yes.", "label": False}
    short = {"prompt": "Hello!", "completion": "Hi.", "label": False}
    manifest = prepare(tmp_path, tiny_model_dir, [long, lost, short], max_seq_length=64)
    assert (manifest.num_train_rows, manifest.num_overlong_rows) == (2, 1)
    sizes = sorted(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows_of(tmp_path))
    assert sizes[-1] == 64 and sizes[0] < 64
    assert manifest.num_loss_tokens == sum(len(row["completion_ids"]) for row in rows_of(tmp_path))


def test_only_desirable_answers_are_held_out(tmp_path, tiny_model_dir, caplog):
    rows = [SPELLINGS["kto-mix"](n) for n in range(10)]
    held = tmp_path / "held.jsonl"
    held.write_text("\n".join(json.dumps(SPELLINGS["kto-mix"](n)) for n in range(20, 26)))
    with caplog.at_level("INFO"):
        manifest = prepare(
            tmp_path, tiny_model_dir, rows, heldout={"source": str(held), "max_rows": 6}
        )
    assert (manifest.num_heldout_rows, manifest.num_undesirable_heldout_rows) == (3, 3)
    heldout = read_jsonl(tmp_path / "data" / "heldout.jsonl")
    assert {row["answer"] for row in heldout} == {"Answer 20.", "Answer 22.", "Answer 24."}
    assert "3 held-out rows are left out: their answer is undesirable" in caplog.text
    assert "3 held-out rows are left out" in (tmp_path / "page.html").read_text()


def test_proofs_compare_models_on_desirable_answers(tmp_path, tiny_model_dir):
    prepare(tmp_path, tiny_model_dir, [SPELLINGS["kto-mix"](n) for n in range(10)])
    good = [row for row in rows_of(tmp_path) if row["label"]]
    found = read_rows(tmp_path / "data", 10, tokenise=list)
    expected = [(row["prompt_ids"] + row["completion_ids"], len(row["prompt_ids"])) for row in good]
    assert [(row.ids, row.start) for row in found] == expected


@pytest.mark.parametrize(
    ("label", "message"),
    [(-1, "label is -1, but it has to be true or 1"), ("good", "label is 'good'"), (None, "label")],
)
def test_other_labels_are_refused(tmp_path, tiny_model_dir, label, message):
    rows = [SPELLINGS["kto-mix"](n) | {"label": label} for n in range(3)]
    with pytest.raises(DataError, match=message):
        prepare(tmp_path, tiny_model_dir, rows)


def test_answers_of_one_kind(tmp_path, tiny_model_dir, caplog):
    rows = [SPELLINGS["kto-mix"](n) | {"label": False} for n in range(4)]
    with pytest.raises(DataError, match="all 4 training rows .* undesirable answers"):
        prepare(tmp_path, tiny_model_dir, rows)
    manifest = prepare(tmp_path, tiny_model_dir, [row | {"label": True} for row in rows])
    assert manifest.num_desirable_rows == 4
    assert DatasetManifest.read(tmp_path / "data").num_desirable_rows == 4
    assert "method sft learns from answers like these faster" in caplog.text


def test_labelled_rows_are_no_right_answers(tmp_path, tiny_model_dir):
    rows = [SPELLINGS["kto-mix"](n) for n in range(4)]
    with pytest.raises(DataError, match="Set prepare.method to kto"):
        prepare(tmp_path, tiny_model_dir, rows, method="sft")
