"""The whole step: splits, lengths, truncation, what is recorded, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tuneline.artifacts import DatasetManifest
from tuneline.errors import DataError, ModelError, RecipeError
from tuneline.prepare import PrepareConfig
from tuneline.prepare.sources import quantities

DATA = Path(__file__).parents[1] / "data"


def numbered(count: int) -> list[dict]:
    return [{"prompt": f"Question {n}?", "completion": f"Answer {n}."} for n in range(count)]


SPLIT = {"eval_share": 0.1, "heldout": {"max_rows": 20}}


def texts(tokenizer, rows: list[dict]) -> list[str]:
    return [tokenizer.decode(row["input_ids"]) for row in rows]


def test_split_is_disjoint_and_whole(prepare, tokenizer) -> None:
    done = prepare(numbered(200), template="chatml", **SPLIT)
    train, evaluation = texts(tokenizer, done.rows()), texts(tokenizer, done.rows("eval.parquet"))
    heldout = [
        row["prompt"] + row["answer"] + "<|im_end|>\n" for row in done.jsonl("heldout.jsonl")
    ]
    assert (len(train), len(evaluation), len(heldout)) == (162, 18, 20)
    expected = {
        f"<|im_start|>user\nQuestion {n}?<|im_end|>\n<|im_start|>assistant\nAnswer {n}.<|im_end|>\n"
        for n in range(200)
    }
    assert {*train, *evaluation, *heldout} == expected
    counts = done.manifest
    assert (counts.num_train_rows, counts.num_eval_rows, counts.num_heldout_rows) == (162, 18, 20)
    assert DatasetManifest.read(done.path).sha256 == counts.sha256


def test_split_is_decided_by_the_seed(prepare) -> None:
    first, again = (prepare(numbered(60), **SPLIT) for _ in range(2))
    other = prepare(numbered(60), seed=1, **SPLIT)
    for name in ("train.parquet", "eval.parquet", "heldout.jsonl"):
        assert (first.path / name).read_bytes() == (again.path / name).read_bytes()
        assert (first.path / name).read_bytes() != (other.path / name).read_bytes()
    assert first.manifest.sha256 == again.manifest.sha256 != other.manifest.sha256
    cut = prepare(numbered(60), max_seq_length=48, **SPLIT)
    assert cut.manifest.sha256 != first.manifest.sha256


def test_small_data_sets_hold_out_a_fifth(prepare, caplog) -> None:
    done = prepare(numbered(50), heldout={"max_rows": 200})
    assert done.manifest.num_heldout_rows == 10
    assert "asks for 200 rows, but 10 are held out" in caplog.text


def test_max_rows_are_drawn_by_the_seed(prepare, tokenizer) -> None:
    done = prepare(numbered(100), max_rows=10)
    assert done.manifest.num_train_rows == 10
    answers = sorted(
        int(text.split("Answer ")[1].split(".")[0]) for text in texts(tokenizer, done.rows())
    )
    assert answers != list(range(10)) and len(set(answers)) == 10


def test_rows_equal_to_a_heldout_row_are_left_out(prepare, tmp_path) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps(row) + "\n" for row in numbered(3)))
    done = prepare(numbered(10), heldout={"source": str(held), "max_rows": 2})
    assert [row["question"] for row in done.jsonl("heldout.jsonl")] == [
        "Question 0?",
        "Question 1?",
    ]
    assert (done.manifest.num_train_rows, done.manifest.num_leaking_rows) == (8, 2)
    with pytest.raises(DataError, match="all 3 rows are the same as held-out rows"):
        prepare(numbered(3), heldout={"source": str(held)})


def test_general_rows_are_mixed_in_by_their_share(prepare, tokenizer, tmp_path, caplog) -> None:
    general = tmp_path / "general.jsonl"
    rows = [{"ask": f"General {n}?", "say": f"Reply {n}."} for n in range(400)]
    # Equal to rows of the data set, some of which are held out.
    rows += [{"ask": row["prompt"], "say": row["completion"]} for row in numbered(200)]
    general.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixture = {
        "source": str(general),
        "share": 0.25,
        "columns": {"prompt": "ask", "completion": "say"},
    }
    plain = prepare(numbered(200), template="chatml", **SPLIT)
    done = prepare(numbered(200), template="chatml", general=mixture, **SPLIT)
    assert plain.manifest.num_general_rows == 0
    assert (done.manifest.num_train_rows, done.manifest.num_general_rows) == (162 + 54, 54)
    assert done.manifest.sha256 != plain.manifest.sha256
    for name in ("eval.parquet", "heldout.jsonl"):
        assert (done.path / name).read_bytes() == (plain.path / name).read_bytes()
    mixed = texts(tokenizer, done.rows())
    assert {*texts(tokenizer, plain.rows())} <= {*mixed}
    # Mixed, not appended.
    places = [place for place, text in enumerate(mixed) if "General" in text]
    assert places[0] < 54 and places[-1] > 162
    asked = [row["prompt"] for row in done.jsonl("heldout.jsonl")]
    assert not any(text.startswith(prompt) for text in mixed for prompt in asked)
    assert prepare(numbered(200), template="chatml", general=mixture, **SPLIT).rows() == done.rows()

    short = prepare(numbered(3000), general={**mixture, "share": 0.5})
    assert short.manifest.num_general_rows == 600
    assert "asks for 3000 rows" in caplog.text and "they are 16.7 %" in caplog.text


def test_a_general_source_that_is_not_there(prepare, tmp_path) -> None:
    with pytest.raises(DataError, match="absent"):
        prepare(numbered(5), general={"source": str(tmp_path / "absent.jsonl")})
    with pytest.raises(RecipeError, match=r"general\.share"):
        prepare(numbered(5), general={"source": "x", "share": 1.5})


def test_builtin_holds_out_its_last_rows(prepare) -> None:
    done = prepare("builtin:kubernetes-quantities", heldout={"max_rows": 200}, max_rows=50)
    last = list(quantities.rows())[-quantities.NUM_HELDOUT :]
    heldout = done.jsonl("heldout.jsonl")
    assert [row["question"] for row in heldout] == [row["prompt"] for row in last]
    assert [row["choices"][row["label"]] for row in heldout] == [row["completion"] for row in last]
    assert [row["answer"] for row in heldout] == [row["completion"] for row in last]
    assert done.manifest.num_train_rows == 50


def test_truncation_keeps_the_head_and_its_share_is_recorded(prepare, tokenizer) -> None:
    rows = [{"prompt": "Count.", "completion": " ".join(["word"] * n)} for n in (2, 10, 40)]
    whole = {len(row["input_ids"]): row for row in prepare(rows, template="chatml").rows()}
    sizes = sorted(whole)
    limit = sizes[1]
    done = prepare(rows, template="chatml", max_seq_length=limit)
    lost = sizes[2] - limit
    assert done.manifest.truncated_token_share == round(lost / sum(sizes), 6)
    assert done.manifest.lengths.max == sizes[2]
    assert done.manifest.lengths.mean == round(sum(sizes) / 3, 2)
    assert done.manifest.lengths.median == sizes[1]
    assert done.manifest.num_tokens == sizes[0] + 2 * limit
    cut = max(done.rows(), key=lambda row: sum(row["loss_mask"]))
    assert cut["input_ids"] == whole[sizes[2]]["input_ids"][:limit]
    assert cut["loss_mask"] == whole[sizes[2]]["loss_mask"][:limit]


def test_rows_without_a_token_to_learn_are_left_out(prepare) -> None:
    rows = [{"prompt": "word " * 100, "completion": "4"}, *numbered(9)]
    done = prepare(rows, max_seq_length=64)
    assert (done.manifest.num_train_rows, done.manifest.num_overlong_rows) == (9, 1)
    assert "1 rows are left out" in done.page


def test_auto_length_is_the_99th_percentile_in_64s(prepare) -> None:
    rows = [*numbered(199), {"prompt": "word " * 500, "completion": "4"}]
    manifest = prepare(rows, max_seq_length="auto").manifest
    assert manifest.lengths.max > 500
    assert manifest.lengths.p99 < 64
    assert manifest.max_seq_length == manifest.recommended_max_seq_length == 64
    assert sum(count for _, _, count in manifest.lengths.histogram) == 200
    assert manifest.num_overlong_rows == 1


def test_length_is_lowered_to_what_the_model_holds(prepare, caplog) -> None:
    assert prepare(numbered(3), max_seq_length=100_000).manifest.max_seq_length == 2048
    assert "more than the model's 2048 positions" in caplog.text


def test_page_shows_what_was_prepared(prepare) -> None:
    rows = [*numbered(150), {"prompt": "no answer <b>"}]
    page = prepare(rows, template="chatml").page
    assert len(re.findall(r"<mark[^>]*>Answer \d+\.&lt;\|im_end\|&gt;</mark>", page)) == 4
    assert "completion is missing" in page
    assert "no answer &lt;b&gt;" in page
    assert "p99" in page and "max_seq_length" in page
    assert "<svg" in page and "http-equiv" not in page and "src=" not in page


def test_bad_rows_are_counted_and_listed(prepare) -> None:
    rows = numbered(300)
    rows[4] = {"prompt": "Question 4?"}
    rows[7] = {"prompt": "Question 7?", "completion": 7}
    done = prepare(rows)
    assert (done.manifest.num_rejected_rows, done.manifest.num_train_rows) == (2, 298)
    listed = [(row["line"], row["reason"]) for row in done.jsonl("rejected.jsonl")]
    assert listed == [(5, "completion is missing"), (8, "completion is a number, not text")]


def test_row_without_its_answer(prepare, tmp_path) -> None:
    message = (
        r"1 of 3 rows of .*rows-1\.jsonl cannot be used \(rows-1\.jsonl line 2: completion is "
        r"missing\): that is 33\.3%, but max_rejected_share allows 1\.0%"
    )
    with pytest.raises(DataError, match=message):
        prepare([numbered(1)[0], {"prompt": "Question?"}, numbered(1)[0]])
    assert not (tmp_path / "prepared-1").exists()
    assert not list(tmp_path.glob(".prepared*"))


def test_mapped_column_is_named_as_the_source_names_it(prepare) -> None:
    columns = {"prompt": "question", "completion": "answer"}
    rows = [{"question": "a?", "answer": "4"}, {"question": "b?", "answer": ""}]
    with pytest.raises(DataError, match=r"line 2: answer \(completion\) is empty"):
        prepare(rows, columns=columns)
    with pytest.raises(DataError, match="maps completion to 'answr', but .* question, answer"):
        prepare(rows, columns=columns | {"completion": "answr"})


def test_empty_data_set(prepare, tmp_path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.jsonl has no rows: it is empty"):
        prepare(tmp_path / "empty.jsonl")


def test_a_file_in_another_encoding_is_read_and_named(prepare, tmp_path) -> None:
    path = tmp_path / "korean.jsonl"
    row = json.dumps({"prompt": "\uc9c8\ubb38", "completion": "\ub2f5"}, ensure_ascii=False)
    path.write_bytes(f"{row}\n".encode("cp949") * 20)
    prepared = prepare(path)
    path.write_text(f"{row}\n" * 20, encoding="utf-8")
    assert prepare(path).manifest.sha256 == prepared.manifest.sha256
    (source,) = prepared.manifest.sources
    assert source.remarks == [
        "korean.jsonl: read as CP949, which its bytes look like; set prepare.encoding if that is "
        "wrong"
    ]
    assert source.remarks[0] in prepared.page


def test_truncated_last_line(prepare, tmp_path) -> None:
    path = tmp_path / "cut.jsonl"
    path.write_text(json.dumps(numbered(1)[0]) + '\n{"prompt": "Ques')
    with pytest.raises(DataError, match="line 2: the line ends inside a JSON value"):
        prepare(path)


def test_all_rows_too_long(prepare) -> None:
    rows = [{"prompt": "word " * n, "completion": "4"} for n in (100, 200)]
    longest = prepare(rows).manifest.lengths.max
    message = rf"all 2 training rows .* max_seq_length 32 .* to {longest} \(fits every row\)"
    with pytest.raises(DataError, match=message):
        prepare(rows, max_seq_length=32)


def test_model_without_tokenizer(prepare, tiny_model_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ModelError, match="has no tokenizer"):
        prepare(numbered(2), model=model)


def test_model_without_chat_template(prepare, tiny_model_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model, ignore=shutil.ignore_patterns("*.jinja"))
    with pytest.raises(DataError, match="no chat template.*alpaca, chatml or llama3"):
        prepare(numbered(2), model=model)
    assert prepare(numbered(2), model=model, template="chatml").manifest.num_train_rows == 2


def test_template_whose_tokens_are_missing(prepare) -> None:
    with pytest.raises(DataError, match=r"llama3 needs the tokens <\|start_header_id\|>"):
        prepare(numbered(2), template="llama3")


def test_short_max_seq_length_is_refused() -> None:
    with pytest.raises(RecipeError, match="at least 8 tokens"):
        PrepareConfig.parse({"max_seq_length": 4})


def test_settings_that_are_ignored_are_named(prepare, caplog) -> None:
    prepare([{"text": "Some text."}], method="cpt", template="chatml", system_prompt="x")
    assert "prepare.template is ignored" in caplog.text
    assert "prepare.system_prompt is ignored" in caplog.text


def test_gsm8k_through_the_column_map(prepare, tokenizer) -> None:
    source, held = DATA / "gsm8k" / "train.jsonl", DATA / "gsm8k" / "test.jsonl"
    done = prepare(
        source,
        columns={"prompt": "question", "completion": "answer"},
        heldout={"source": str(held), "max_rows": 30},
        max_rows=50,
        max_seq_length="auto",
    )
    assert done.manifest.num_rejected_rows == 0
    assert (done.manifest.num_train_rows, done.manifest.num_heldout_rows) == (50, 30)
    with open(held, encoding="utf-8") as lines:
        asked = [json.loads(next(lines)) for _ in range(30)]
    assert [row["question"] for row in done.jsonl("heldout.jsonl")] == [
        r["question"] for r in asked
    ]
    assert [row["answer"] for row in done.jsonl("heldout.jsonl")] == [r["answer"] for r in asked]


def test_gsm8k_preferences(prepare) -> None:
    done = prepare(DATA / "gsm8k" / "preferences.jsonl", method="dpo", max_rows=25)
    assert done.manifest.num_train_rows == 25
    assert all(
        row["prompt_ids"] and row["chosen_ids"] != row["rejected_ids"] for row in done.rows()
    )


def test_korean_text_is_tokenised_losslessly(prepare, tokenizer) -> None:
    source = DATA / "kobest" / "boolq.tsv"
    done = prepare(source, method="cpt", columns={"text": "Text"}, max_rows=30, max_seq_length=2048)
    lines = source.read_text(encoding="utf-8").splitlines()[1:]
    known = {line.split("\t")[1] for line in lines}
    decoded = [tokenizer.decode(row["input_ids"][:-1]) for row in done.rows()]
    assert len(decoded) == 30
    assert set(decoded) <= known


def test_rows_with_one_reason_are_named_once(prepare) -> None:
    rows = [{"prompt": f"{n}?", "completion": "" if n % 2 else "a"} for n in range(8)]
    rows[4] = {"prompt": "4?", "completion": 4}
    with pytest.raises(DataError) as error:
        prepare(rows)
    message = str(error.value)
    assert re.search(r"line 2 and 3 more: completion is empty; .* line 5: completion is a", message)
    assert message.count("is empty") == 1


def test_a_base_that_stops_at_a_common_token(prepare, tokenizer, tiny_model_dir, tmp_path) -> None:
    model = tmp_path / "stops-early"
    shutil.copytree(tiny_model_dir, model)
    common = tokenizer("Answer")["input_ids"]
    settings = {"eos_token_id": [tokenizer.eos_token_id, common[0]]}
    (model / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"\('An\w*'\), which 9 of the first 9 training rows"):
        prepare(numbered(9), model, template="chatml")
    # The token is no part of these answers, and the text before an answer does not matter.
    rows = [{"prompt": "Answer?", "completion": f"It is {n}."} for n in range(9)]
    prepare(rows, model, template="chatml")
    prepare(numbered(9), model, template="chatml", loss_on="all")


def test_the_hash_depends_on_the_part_of_each_row(prepare) -> None:
    rows = [{"prompt": f"Question {n}?", "completion": f"Answer {n}."} for n in range(20)]
    hashes = {
        prepare(rows, eval_share=share, heldout={"max_rows": held}).manifest.sha256
        for share, held in ((0, 0), (0.1, 0), (0, 2), (0.1, 2))
    }
    assert len(hashes) == 4
