"""Which samples of a task depend on each other."""

import pytest

from tuneline.models.clusters import clusters_of, normalised


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("How many Mi is 2Gi?", "how many  mi is 2Gi"),
        ("Add 1,000 and 2.", "add 1000 and 2"),
        ("What is \uff21?", "what is A"),
        ("Who is Ann\u2019s \u201cboss\u201d\u2026", 'who is Ann\'s "boss"'),
        ("Don\u02bct add \u22125 and 1\u202f000.", "Don`t add -5 and 1,000."),
        ("Add \u0663\u066b\u0665 and 2\u20133.", "add 3.5 and 2-3"),
        ("AT&amp;T isn&#39;t &lt; 5&nbsp;000?", "AT&T isn't < 5,000"),
        ("Is &amp;amp;lt; a &quot;tag&quot;&hellip;", "is < a 'tag'"),
        ("Sum 10 000 and 100 200 300.", "sum 10,000 and 100 200 300"),
        ("A da\u00adta\u200bba\u034fse\ufe0f\U000e0100 of \u202ait\x00", "a database of it"),
    ],
)
def test_questions_that_are_the_same(one: str, other: str) -> None:
    assert normalised(one) == normalised(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1.5 cores", "15 cores"),
        ("3 + 4", "3 - 4"),
        ("Is a < b?", "Is a > b?"),
        ("?", "!"),
        ("Is a &lt; b?", "Is a &gt; b?"),
        ("Sort 100 200 300", "Sort 100 200300"),
    ],
)
def test_questions_that_are_not(one: str, other: str) -> None:
    assert normalised(one) != normalised(other)


def test_samples_with_a_passage_or_a_question_in_common_are_one_cluster() -> None:
    documents = [
        {"passage": "Seoul is large.", "question": "Is it?"},
        {"passage": "Busan is near the sea.", "question": "Is it?"},
        {"passage": "seoul is large", "question": "Where?"},
        {"question": "Why?"},
        {"premise": "no key that is known"},
    ]
    first, second, third, *others = clusters_of(documents)
    assert first == third is not None
    assert [second, *others] == [None, None, None]


def test_a_document_may_name_its_cluster() -> None:
    documents = [
        {"question": "How many?", "cluster": "7"},
        {"question": "What number?", "cluster": "7"},
        {"question": "How many?", "cluster": ""},
    ]
    assert clusters_of(documents) == ["key 7", "key 7", None]


def held_out(*prompts: str, **values: str) -> list[dict]:
    return [{"prompt": prompt, "endings": [], **values} for prompt in prompts]


def words(name: str, count: int) -> str:
    return " ".join(f"{name}{'abcdefghij'[number // 10]}{number % 10}x" for number in range(count))


def test_held_out_rows_about_one_passage_are_one_cluster() -> None:
    first, other = words("seoul", 60), words("busan", 60)
    rows = held_out(
        f"{first} Is it large?", f"{other} Is it large?", f"Read this. {first} Where is it?"
    )
    one, alone, again = clusters_of(rows)
    assert one == again is not None and alone is None
    # The value of `cluster` takes precedence.
    assert clusters_of([{**row, "cluster": str(n)} for n, row in enumerate(rows)]) == [None] * 3


def test_an_instruction_that_many_rows_have_makes_no_cluster() -> None:
    instruction = words("answer", 60)
    rows = held_out(*(f"{instruction} {words(f'q{n}q', 30)}" for n in range(40)))
    assert clusters_of(rows) == [None] * 40
    # Ten questions about one passage are few enough in any dataset.
    assert len(set(clusters_of(rows[:10]))) == 1 and clusters_of(rows[:10])[0]
