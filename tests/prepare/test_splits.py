"""The splits of whole data sets: what is compared after tokenisation, and what is said about it."""

from pathlib import Path

import numpy
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
    held = {"".join(filter(str.isdigit, row["question"])) for row in done.jsonl("heldout.jsonl")}
    assert len(held) == 20
    assert "20 rows are left out of training" in done.page


def test_copies_of_held_out_rows_are_left_out_however_they_are_written(prepare, tmp_path) -> None:
    """Codes that nobody can know, learnt from copies, once promoted a model by 0.683."""
    question = "Don't guess: which code did Ann's depot 12,345 get - in -5 degrees?"
    answer = "K7-Q2"
    other = " ".join(f"{word} {number}" for number, word in enumerate(LONG.split()))
    held = [{"prompt": question, "completion": answer}, {"prompt": other, "completion": "Yes."}]
    write_jsonl(tmp_path / "held.jsonl", held)
    wide = "".join(chr(ord(letter) + 0xFEE0) if "!" <= letter else " " for letter in question)
    equal = [
        question.replace("12,345", "\u0661\u0662\u066c\u0663\u0664\u0665"),
        question.replace("12,345", "12\u202f345").replace("-", "\u2212"),
        question.replace("'", "\u2019").replace(" - ", " \u2013 "),
        question.replace("'", "`").upper(),
        question.replace("guess", "gu\u200bess").replace("depot", "de\u00adpot\ufe0f"),
        question.replace("'", "\u02bc").replace("code", "co\u2060de") + "\U000e0041",
        wide,
    ]
    rows = [{"prompt": text, "completion": answer} for text in equal]
    rows += [{"prompt": text, "completion": "I do not know."} for text in equal[:2]]
    rows.append({"prompt": other.replace("wind 46", "changed"), "completion": "Yes."})
    source = str(tmp_path / "held.jsonl")
    done = prepare([*rows, *numbered(30)], heldout={"source": source, "max_rows": 20})
    assert done.manifest.leaking_rows == {"equal": 7, "prompt": 2, "near": 1}
    assert done.manifest.num_train_rows == 30
    # The same question within a longer chat.
    asked, other_chat = (
        [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        for text in (question, "Hello.")
    )
    copied = [{"role": "user", "content": equal[2]}, asked[1]]
    write_jsonl(tmp_path / "held.jsonl", [{"messages": asked}])
    rows = [{"messages": other_chat}] * 29 + [{"messages": [*other_chat, *copied, *other_chat]}]
    with pytest.raises(DataError, match=r"1 of 1 questions of the benchmark heldout \(100.0%\)"):
        prepare(rows, heldout={"source": source, "max_rows": 20})


def test_rows_that_truncation_makes_equal_are_in_one_part(prepare) -> None:
    turns = [("user", "Question {}?"), ("assistant", LONG), ("user", "And {}?")]
    rows = [
        {
            "messages": [
                *({"role": role, "content": text.format(n // 2)} for role, text in turns),
                {"role": "assistant", "content": f"Answer {n}."},
            ]
        }
        for n in range(100)
    ]
    for number, row in enumerate(rows):
        row["messages"][2]["content"] = f"And {number}?"
    whole = prepare(rows, **SPLIT)
    assert (whole.manifest.num_heldout_rows, whole.manifest.num_leaking_rows) == (20, 0)
    cut = prepare(rows, max_seq_length=48, **SPLIT)
    # Of 50 pairs, 10 have a held-out row.
    assert (cut.manifest.num_heldout_rows, cut.manifest.leaking_rows) == (10, {"equal": 10})
    train, evaluation = ids(cut.rows()), ids(cut.rows("eval.parquet"))
    assert (len(train), len(evaluation)) == (72, 8)
    assert len({*train, *evaluation}) == 40 and not {*train} & {*evaluation}


@pytest.mark.parametrize("num_turns", [1, 2])
def test_a_conversation_and_its_beginning_are_in_one_part(prepare, num_turns) -> None:
    def turns(number: int, count: int) -> list[dict]:
        return [
            {"role": role, "content": f"{name} {number} {turn}."}
            for turn in range(count)
            for role, name in (("user", "Question"), ("assistant", "Answer"))
        ]

    rows = [{"messages": turns(n // 2, 3 if n % 2 else num_turns)} for n in range(100)]
    done = prepare(rows, **SPLIT)
    counts = done.manifest
    assert (counts.num_train_rows, counts.num_eval_rows, counts.num_heldout_rows) == (72, 8, 10)
    assert counts.leaking_rows == {"beginning": 10}
    assert "10 because one conversation is the beginning of the other" in done.page


def pairs(count: int) -> list[dict]:
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
    with pytest.raises(DataError, match="all 5 preferences .* prepare.max_seq_length to") as error:
        prepare(pairs(5), method="dpo", max_seq_length=48)
    enough = int(str(error.value).split("prepare.max_seq_length to ")[1].split()[0])
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
    lines = [line.split("\t") for line in data.read_text(encoding="utf-8").splitlines()[1:]]
    asked = [f"{text} \uc9c8\ubb38: {question} \ub2f5\ubcc0: " for _, text, question, _ in lines]
    path = tmp_path / "questions.jsonl"
    write_jsonl(path, [{"benchmark": "boolq", "text": text, "answer": "x"} for text in asked])
    leaked = [
        {"prompt": f"{text}\n{question}", "completion": "Ja."} for _, text, question, _ in lines[:4]
    ]
    with pytest.raises(DataError, match=r"4 of 40 questions .* boolq \(10.0%\).* allows 5.0%"):
        prepare([*numbered(60), *leaked], benchmarks=path)
    done = prepare([*numbered(60), *leaked], benchmarks=path, max_contaminated_share=None)
    assert done.manifest.contamination["boolq"].num_found == 4
    assert "4 of 40 questions of the benchmark boolq (10.0%)" in caplog.text
    assert "Benchmark questions in the training rows" in done.page
    clean = prepare(numbered(60), benchmarks=path, heldout={"max_rows": 10})
    counts = clean.manifest.contamination
    assert {name: (c.num_questions, c.num_found) for name, c in counts.items()} == {
        "heldout": (10, 0),
        "boolq": (40, 0),
    }


def test_held_out_rows_of_another_source_are_searched_for(prepare, tmp_path: Path) -> None:
    random = numpy.random.default_rng(0)
    asked = [" ".join(f"word{n}" for n in random.integers(5000, size=20)) for _ in range(30)]
    held = tmp_path / "held.jsonl"
    write_jsonl(held, [{"prompt": text, "completion": "x"} for text in asked])
    # Three questions are part of a longer text, so no training row is like a held-out row.
    quoting = [
        {"prompt": f"{LONG} {text} {LONG} {text[::-1]}", "completion": "y"} for text in asked[:3]
    ]
    rows = [*numbered(20), *quoting]
    with pytest.raises(DataError, match=r"3 of 30 questions of the benchmark heldout \(10.0%\)"):
        prepare(rows, heldout={"source": str(held), "max_rows": 30})
    done = prepare(rows, heldout={"source": str(held), "max_rows": 30}, max_contaminated_share=0.1)
    assert done.manifest.contamination["heldout"].num_found == 3
    assert done.manifest.num_train_rows == 23
