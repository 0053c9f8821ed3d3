"""Questions of benchmarks in training rows: which are found, and which are not."""

from pathlib import Path

import numpy
import pytest

from tuneline.artifacts import Contamination
from tuneline.prepare.rows.contamination import Question, find
from tuneline.prepare.rows.words import WordFile, hash_of, word_hashes, words_of


def prose(seed: int, num_words: int) -> str:
    random = numpy.random.default_rng(seed)
    return " ".join(f"word{number}" for number in random.integers(5000, size=num_words))


def search(
    questions: list[Question], rows: list[tuple[str, str]], work: Path, trained: list[bool]
) -> dict[str, Contamination]:
    words, asked = WordFile(work / "words"), []
    for question, answer in rows:
        text = words_of(f"<|user|> {question} <|assistant|> {answer}")
        words.append(word_hashes(text).tobytes(), [len(text)])
        asked.append(hash_of(words_of(question)))
    return find(questions, words, numpy.array(trained), numpy.array(asked, numpy.uint64))


LONG = prose(1, 40)
CHANGED = LONG.split()[:20] + ["other"] + LONG.split()[21:]


@pytest.mark.parametrize(
    ("question", "row", "found"),
    [
        (LONG, (f"Answer this: {LONG.upper()} Now.", "x"), True),
        (LONG, ("A text", LONG.replace(" ", "\n")), True),
        (LONG, (" ".join(CHANGED), "x"), True),
        # A quarter of the question, a quotation.
        (LONG, (" ".join(LONG.split()[:15]), "x"), False),
        (LONG, (prose(2, 40), "x"), False),
        ("What is the capital city of South Korea today?", ("x", "-"), False),
        (
            "What is the capital city of South Korea today?",
            ("Tell me, what is the capital city of South Korea today? Be brief.", "Seoul"),
            True,
        ),
        ("Who is Kim?", ("who is kim", "A name."), True),
        ("Who is Kim?", ("Can you say who is Kim? He wrote it.", "x"), False),
    ],
)
def test_a_question_is_found_by_half_of_its_ngrams_or_as_a_whole(
    question: str, row: tuple[str, str], found: bool, tmp_path: Path
) -> None:
    rows = [row, *((prose(50 + n, 60), prose(90 + n, 20)) for n in range(20))]
    done = search([Question("task", question)], rows, tmp_path, [True] * len(rows))
    assert (done["task"].num_questions, done["task"].num_found) == (1, int(found))
    assert done["task"].examples == ([question[:200]] if found else [])
    # The row is no training row.
    done = search([Question("task", question)], rows, tmp_path, [False] + [True] * 20)
    assert done["task"].num_found == 0


PLAIN = 'Is it R&D if Ann\'s "lab" spent 5,000 - 2 in 2019-2020?'


@pytest.mark.parametrize(
    "written",
    [
        "Is it R&amp;D if Ann&#39;s &quot;lab&quot; spent 5,000 - 2 in 2019-2020?",
        "Is it R&amp;amp;D if Ann&amp;#x27;s &ldquo;lab&rdquo; spent 5,000 - 2 in 2019&ndash;2020?",
        "Is&nbsp;it R&D if Ann&apos;s \u00ablab\u00bb spent 5&nbsp;000 \u2014 2 in 2019\u20142020?",
        "Is\u00a0it R&D if Ann\u2019s \u201elab\u201c spent 5\u00a0000 \u2013 2 in 2019\u20112020?",
        "Is it R\uff06D if Ann`s ``lab'' spent 5 000 &minus; 2 in 2019\u20132020\u2026?",
    ],
)
@pytest.mark.parametrize("as_answered", [True, False])
def test_a_short_question_is_found_however_it_is_written(
    written: str, as_answered: bool, tmp_path: Path
) -> None:
    others = [(prose(50 + n, 60), prose(90 + n, 20)) for n in range(20)]
    for asked, trained in ((PLAIN, written), (written, PLAIN)):
        # As the last question of a row, or with its answer somewhere within a text.
        row = ("Read on.", f"{trained} Yes, so say it all.") if as_answered else (trained, "No.")
        question = Question("task", asked, "Yes, so say it all")
        done = search([question], [row, *others], tmp_path, [True] * 21)
        assert done["task"].num_found == 1, (asked, trained)


def test_a_short_question_is_searched_for_with_its_answer(tmp_path: Path) -> None:
    question = Question("task", "Who wrote the letter?", "Kim wrote it in the spring of 1950")
    text = "They asked who wrote the letter. Kim wrote it in the spring of 1950, they say."
    assert search([question], [("Text", text)], tmp_path, [True])["task"].num_found == 1
    assert search([question], [("Text", text[:40])], tmp_path, [True])["task"].num_found == 0


def test_instructions_of_the_benchmark_are_not_searched_for(tmp_path: Path) -> None:
    instruction = prose(7, 60)
    asked = [Question("task", f"{instruction} {prose(100 + n, 30)}") for n in range(40)]
    rows = [(f"{instruction} {prose(300 + n, 30)}", "x") for n in range(30)]
    rows += [(asked[n].text, "x") for n in range(3)]
    counts = search(asked, rows, tmp_path, [True] * len(rows))["task"]
    assert (counts.num_questions, counts.num_checked, counts.num_found) == (40, 40, 3)
    assert counts.share == 3 / 40


def test_each_benchmark_is_counted(tmp_path: Path) -> None:
    asked = [Question(name, prose(n, 30)) for n, name in enumerate(["a", "b", "a", "c"])]
    asked.append(Question("c", "Hm?"))
    rows = [(prose(n, 30), "x") for n in (0, 2, 3)]
    found = search(asked, rows, tmp_path, [True] * 3)
    assert {name: (c.num_questions, c.num_found) for name, c in found.items()} == {
        "a": (2, 2),
        "b": (1, 0),
        "c": (2, 1),
    }
    assert search([], rows, tmp_path, [True] * 3) == {}
