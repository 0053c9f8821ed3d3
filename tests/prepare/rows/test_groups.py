"""Which rows are of one group: equal, of one prompt or nearly the same, and which are not."""

from pathlib import Path

import numpy
import pytest

from tuneline.prepare.rows import shingles
from tuneline.prepare.rows.groups import BEGINNING, EQUAL, NEAR, PROMPT, Groups
from tuneline.prepare.rows.words import WordFile, hash_of, word_hashes, words_of


def group(rows: list[tuple[str, str]], work: Path, *, always: bool = False) -> Groups:
    """Group rows, each a prompt and its answer, as prepare does; no two have equal tokens."""
    words = WordFile(work / "words")
    texts, prompts = [], []
    for prompt, answer in rows:
        text = words_of(prompt) + words_of(answer)
        words.append(word_hashes(text).tobytes(), [len(text)])
        texts.append(hash_of(text))
        prompts.append(hash_of(words_of(prompt)))
    numbers = numpy.arange(len(rows))
    groups = Groups(
        numbers.astype(numpy.uint64),
        numbers,
        numpy.array(texts, numpy.uint64),
        numpy.array(prompts, numpy.uint64),
    )
    groups.link_prompts(always=always)
    groups.link_near(words, work)
    return groups


def prose(seed: int, num_words: int) -> list[str]:
    random = numpy.random.default_rng(seed)
    return [f"word{number}" for number in random.integers(5000, size=num_words)]


def others(count: int) -> list[tuple[str, str]]:
    """Rows of which no two are similar."""
    return [(" ".join(prose(1000 + n, 60)), " ".join(prose(2000 + n, 40))) for n in range(count)]


FIRST = prose(1, 100)
CHANGED = [*FIRST[:50], "changed", *FIRST[51:]]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (" ".join(FIRST).upper(), EQUAL),
        ("\n\n".join(FIRST) + "\u200b\u00a0", EQUAL),
        (", ".join(FIRST) + "!", EQUAL),
        (" ".join(FIRST).replace("word", "\uff57ord"), EQUAL),
        (" ".join(CHANGED), NEAR),
        (" ".join([*FIRST, *"Sent from my phone by Jane".split()]), NEAR),
        (" ".join(["Sure", "here", "it", "is", *CHANGED]).title(), NEAR),
    ],
)
def test_copies_are_of_one_group(answer: str, reason: str, tmp_path: Path) -> None:
    rows = [("Ask?", " ".join(FIRST)), *others(30), ("Asks, again?", answer)]
    if reason == EQUAL:
        rows[-1] = ("ask", answer)
    groups = group(rows, tmp_path)
    assert groups.numbers().tolist() == [*range(31), 0]
    assert groups.reason(31, 0) == reason


def test_all_copies_of_one_row_are_of_one_group(tmp_path: Path) -> None:
    rows = [("Ask?", " ".join([*FIRST[:n], "changed", *FIRST[n + 1 :]])) for n in range(0, 90, 10)]
    assert set(group([*rows, *others(50)], tmp_path).numbers()[:9]) == {0}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("3 + 4", "3 - 4"),
        ("Take -3.", "Take 3."),
        ("3.5", "35"),
        ("1,23", "123"),
        ("a*b", "a/b"),
        ("Is it \U0001f600", "Is it \U0001f622"),
        ("\uc624\ub298 \ube44", "\uc624\ub298 \ub208"),
    ],
)
def test_texts_that_mean_something_else_are_not_equal(first: str, second: str) -> None:
    assert words_of(first) != words_of(second)


def test_grouped_digits_are_one_number() -> None:
    assert words_of("Add 1,000 and 12,345,678, please.") == words_of("add 1000 and 12345678 please")
    assert words_of("1,23 or 1,2345") != words_of("123 or 12345")


def test_scripts_without_spaces_have_a_word_per_character(tmp_path: Path) -> None:
    assert words_of("\u4f60\u597d\uff0c\u4e16\u754c") == list("\u4f60\u597d\u4e16\u754c")
    random = numpy.random.default_rng(0)
    characters = [chr(0x4E00 + n) for n in random.integers(3000, size=100)]
    changed = [*characters[:50], "\u4e00", *characters[51:]]
    rows = [("?", "".join(characters)), ("!", "".join(changed)), *others(30)]
    assert group(rows, tmp_path).numbers().tolist()[:3] == [0, 0, 2]


@pytest.mark.parametrize("num_rows", [30, 1000])
def test_a_long_instruction_does_not_make_rows_similar(num_rows: int, tmp_path: Path) -> None:
    instruction = " ".join(prose(3, 150))
    rows = [
        (f"{instruction} Review {n}: {' '.join(prose(n, 8))}", ("good", "bad")[n % 2])
        for n in range(num_rows)
    ]
    assert group(rows, tmp_path).numbers().tolist() == list(range(num_rows))


def test_rows_of_several_instructions_are_not_similar(tmp_path: Path) -> None:
    rows = [
        (f"{' '.join(prose(n % 20, 150))} Review: {' '.join(prose(n, 6))}", "good")
        for n in range(1000)
    ]
    assert group(rows, tmp_path).numbers().tolist() == list(range(1000))


def test_rows_answer_the_same_prompt(tmp_path: Path) -> None:
    rows = [("Why is it?", "Because."), ("why is it", "No reason."), *others(30)]
    groups = group(rows, tmp_path)
    assert groups.numbers().tolist() == [0, 0, *range(2, 32)]
    assert groups.reason(1, 0) == PROMPT
    # A prompt of very many rows is an instruction; the prompts of preferences are compared anyway.
    rows = [("Write.", f"Poem {n}.") for n in range(30)]
    assert group(rows, tmp_path).numbers().tolist() == list(range(30))
    assert set(group(rows, tmp_path, always=True).numbers()) == {0}


def test_equal_examples_of_longer_rows_are_found() -> None:
    # Two conversations with the same first turn, each turn an example.
    examples = numpy.array([7, 1, 7, 2, 3], numpy.uint64)
    keys = numpy.array([11, 12, 13], numpy.uint64)
    groups = Groups(examples, numpy.array([0, 0, 1, 1, 2]), keys, keys)
    assert groups.numbers().tolist() == [0, 0, 2]
    assert groups.reason(1, 0) == EQUAL


def test_a_beginning_of_very_many_conversations_links_none() -> None:
    texts = numpy.arange(1, 301, dtype=numpy.uint64)
    groups = Groups(texts, numpy.arange(300), texts, numpy.zeros(300, numpy.uint64))
    # Rows 20 to 29 begin as row 0 is, rows 30 to 50 as row 1 is; no row is 999.
    begun = numpy.arange(20, 51)
    beginnings = numpy.where(begun < 30, 1, 2)
    beginnings[5] = 999
    groups.link_beginnings(beginnings.astype(numpy.uint64), begun)
    expected = [0 if 20 <= row < 30 and row != 25 else row for row in range(300)]
    assert groups.numbers().tolist() == expected
    assert groups.reason(0, 20) == groups.reason(20, 0) == BEGINNING
    assert groups.reason(20, 25) == NEAR


def test_long_texts_are_compared_by_their_smallest_hashes(tmp_path: Path) -> None:
    long = prose(9, 5000)
    rows = [("Ask?", " ".join(long)), ("Asks?", " ".join([*long[:2500], "x", *long[2501:]]))]
    rows += [("Other?", " ".join([*long[:2500], *prose(10, 2500)])), *others(30)]
    assert group(rows, tmp_path).numbers().tolist()[:3] == [0, 0, 2]


@pytest.mark.parametrize(
    ("num_rows", "most"), [(2, 2), (8, 4), (100, 10), (5000, 50), (10**6, 100)]
)
def test_rows_that_may_share_something(num_rows: int, most: int) -> None:
    assert shingles.most_that_share(num_rows) == most
