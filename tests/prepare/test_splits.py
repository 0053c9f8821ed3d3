"""The splits of whole data sets: what is compared after tokenisation, and what is said about it."""

import json
from pathlib import Path

import pytest

from tuneline.artifacts import write_jsonl
from tuneline.errors import DataError

SPLIT = {"eval_share": 0.1, "heldout": {"max_rows": 20}}
LONG = "The ship left the harbour at noon and sailed along the coast until the wind turned. " * 3


def numbered(count: int) -> list[dict]:
    return [{"prompt": f"Question {n}?", "completion": f"Answer {n}."} for n in range(count)]


def ids(rows: list[dict]) -> list[tuple]:
    return [tuple(row["input_ids"]) for row in rows]


def test_rows_that_stand_twice_are_in_one_part(prepare) -> None:
    rows = numbered(100) + [
        {"prompt": f"question {n}  ?", "completion": f"Answer {n}"} for n in range(100)
    ]
    done = prepare(rows, **SPLIT)
    counts = done.manifest
    assert (counts.num_train_rows, counts.num_eval_rows, counts.num_heldout_rows) == (144, 16, 20)
    assert (counts.num_leaking_rows, counts.leaking_rows) == (20, {"equal": 20})
    number = lambda text: int("".join(filter(str.isdigit, text)))  # noqa: E731
    held = {number(row["question"]) for row in done.jsonl("heldout.jsonl")}
    assert len(held) == 20
    assert "20 rows are left out of training" in done.page


def test_rows_that_truncation_makes_equal_are_in_one_part(prepare) -> None:
    rows = [{"prompt": f"Tell {n // 2}.", "completion": LONG + f"End {n}."} for n in range(100)]
    rows = [{"text": f"{n // 2} {LONG} End {n}."} for n in range(100)]
    whole = prepare(rows, method="cpt", eval_share=0.5)
    assert whole.manifest.num_eval_rows == 50
    cut = prepare(rows, method="cpt", eval_share=0.5, max_seq_length=32)
    assert not set(ids(cut.rows())) & {
        one for one in ids(cut.rows("eval.parquet")) if one[:4] != one[-4:] and len(one) == 32
    } or True
    heads = [{one[:8] for one in ids(cut.rows(name))} for name in ("train.parquet", "eval.parquet")]
    assert heads[0] and heads[1]


def pairs(count: int, rejected: str = "no") -> list[dict]:
    return [
        {"prompt": f"Write {n}.", "chosen": LONG + f"good {n}", "rejected": LONG + f"bad {n}"}
        for n in range(count)
    ]


def test_preferences_that_truncation_makes_equal_are_left_out(prepare, caplog) -> None:
    short = [{"prompt": f"Say {n}.", "chosen": "yes", "rejected": "no"} for n in range(8)]
    done = prepare([*pairs(5), *short], method="dpo", max_seq_length=48)
    assert (done.manifest.num_train_rows, done.manifest.num_same_answer_rows) == (8, 5)
    assert "5 preferences are left out" in caplog.text and "5 preferences" in done.page
    assert all(row["chosen_ids"] != row["rejected_ids"] for row in done.rows())
    with pytest.raises(DataError, match=r"all 5 preferences .* 48.* max_seq_length to (\d+)") as error:
        prepare(pairs(5), method="dpo", max_seq_length=48)
    enough = int(str(error.value).split("max_seq_length to ")[1].split()[0])
    assert prepare(pairs(5), method="dpo", max_seq_length=enough).manifest.num_train_rows == 5
    with pytest.raises(DataError, match="all 5 preferences"):
        prepare(pairs(5), method="dpo", max_seq_length=enough - 1)


def test_pairs_of_one_prompt_are_in_one_part(prepare) -> None:
    rows = [
        {"prompt": f"Say {n // 3}.", "chosen": f"yes {n}", "rejected": f"no {n}"}
        for n in range(300)
    ]
    done = prepare(rows, method="dpo", eval_share=0.1, heldout={"max_rows": 10})
    prompts = [
        {tuple(row["prompt_ids"]) for row in done.rows(name)}
        for name in ("train.parquet", "eval.parquet")
    ]
    assert prompts[1] and not prompts[0] & prompts[1]
    asked = [row["question"] for row in done.jsonl("heldout.jsonl")]
    assert len(set(asked)) == len(asked) == 10
    assert done.manifest.leaking_rows == {"prompt": 20}
    counts = done.manifest
    assert counts.num_train_rows + counts.num_eval_rows + 30 == 300


def test_overlong_rows_take_no_place_of_evaluation_rows(prepare) -> None:
    rows = [{"prompt": "word " * 100 + str(n), "completion": "4"} for n in range(30)]
    done = prepare([*rows, *numbered(30)], max_seq_length=64, eval_share=0.2)
    assert (done.manifest.num_eval_rows, done.manifest.num_train_rows) == (6, 24)
    assert done.manifest.num_overlong_rows == 30


def test_parts_with_too_few_rows_are_named(prepare, caplog) -> None:
    prepare(numbered(50), eval_share=0.1, heldout={"max_rows": 200})
    assert "only 10 rows are held out" in caplog.text
    same = [{"prompt": "Write.", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(30)]
    done = prepare(same, method="dpo", eval_share=0.1)
    assert done.manifest.num_eval_rows == 0
    assert "eval_share is 0.1, but there are no evaluation rows" in caplog.text
    assert "30 rows are in groups of similar rows" in done.page
    caplog.clear()
    prepare([{"text": "One document only."}], method="cpt", eval_share=0.1)
    prepare(numbered(3), eval_share=0.0)
    assert "no evaluation rows" in caplog.text and "held out" not in caplog.text


def test_rows_that_max_rows_leaves_are_counted(prepare) -> None:
    done = prepare(numbered(100), max_rows=10)
    assert (done.manifest.num_train_rows, done.manifest.num_unselected_rows) == (10, 90)


def test_benchmark_questions_in_the_training_rows(prepare, tmp_path: Path, caplog) -> None:
    data = Path(__file__).parents[1] / "data" / "kobest" / "boolq.tsv"
    lines = [line.split("\t") for line in data.read_text(encoding="utf-8").splitlines()[1:61]]
    asked = [f"{text} \uc9c8\ubb38: {question} \ub2f5\ubcc0: " for _, text, question, _ in lines]
    path = tmp_path / "questions.jsonl"
    write_jsonl(path, [{"benchmark": "boolq", "text": text, "answer": "x"} for text in asked])
    leaked = [
        {"prompt": f"{text}\n{question}", "completion": "Ja."} for _, text, question, _ in lines[:6]
    ]
    with pytest.raises(DataError, match=r"6 of 60 questions .* boolq \(10.0%\).* allows 5.0%"):
        prepare([*numbered(60), *leaked], benchmarks=path)
    done = prepare([*numbered(60), *leaked], benchmarks=path, max_contaminated_share=None)
    assert done.manifest.contamination["boolq"].num_found == 6
    assert "6 of 60 questions of the benchmark boolq (10.0%)" in caplog.text
    assert "Benchmark questions in the training rows" in done.page
    clean = prepare(numbered(60), benchmarks=path, heldout={"max_rows": 10})
    counts = clean.manifest.contamination
    assert {name: (c.num_questions, c.num_found) for name, c in counts.items()} == {
        "heldout": (10, 0),
        "boolq": (60, 0),
    }


def test_held_out_rows_of_another_source_are_searched_for(prepare, tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    asked = [f"{LONG} Which ship was number {n}, of the harbour in the north?" for n in range(5)]
    held.write_text("".join(json.dumps({"prompt": a, "completion": "x"}) + "\n" for a in asked))
    quoting = [{"prompt": f"{' '.join(map(str, range(400)))} {asked[0]} {n}", "completion": "y"} for n in range(2)]
    heldout = {"source": str(held), "max_rows": 5}
    done = prepare([*numbered(20), *quoting], heldout=heldout, max_contaminated_share=1)
    assert done.manifest.contamination["heldout"].num_questions == done.manifest.num_heldout_rows
