import re
from fractions import Fraction

import pytest

from tuneline.prepare.sources.quantities import NUM_HELDOUT, rows

SUFFIXES = {
    "m": Fraction(1, 1000),
    "": Fraction(1),
    "k": Fraction(10**3),
    "M": Fraction(10**6),
    "G": Fraction(10**9),
    "Ki": Fraction(2**10),
    "Mi": Fraction(2**20),
    "Gi": Fraction(2**30),
}
QUANTITY = re.compile(r"(\d+(?:\.\d+)?)([A-Za-z]*)")


def value(text: str) -> Fraction:
    """Read a quantity as the Kubernetes documentation defines it."""
    match = QUANTITY.fullmatch(text)
    assert match and match[2] in SUFFIXES, f"{text} is not a quantity"
    return Fraction(match[1]) * SUFFIXES[match[2]]


def kind(row: dict) -> str:
    """Name the kind of question: its words, the quantities blanked."""
    return re.sub(r"\b(Ki|Mi|Gi|k|M|G)\b", "U", re.sub(r"\d[\d.]*[A-Za-z]*", "#", row["prompt"]))


def right_answer(row: dict) -> str:
    """Work the answer out from the question alone."""
    question, choices = row["prompt"], row["choices"]
    asked = [text.rstrip(".") for text in re.findall(r"\d[\d.]*[A-Za-z]*", question)]
    if "larg" in question or "Most" in question:
        return max(asked, key=value)
    if "valid" in question.lower():
        (valid,) = [text for text in asked if QUANTITY.fullmatch(text)[2] in SUFFIXES]
        return valid
    if "mean" in question or "What is" in question:
        base, power = {"k": (1000, 1), "M": (1000, 2), "G": (1000, 3)}.get(
            QUANTITY.fullmatch(asked[0])[2]
        ) or (1024, "KMG".index(QUANTITY.fullmatch(asked[0])[2][0]) + 1)
        return f"{base} bytes" if power == 1 else f"{base}^{power} bytes"
    if "replicas" in question:
        total, unit = value(asked[0]) * value(asked[1]), "m"
    elif "containers" in question or "pod" in question:
        total, unit = value(asked[0]) + value(asked[1]), "m"
    else:
        total = value(asked[0])
        unit = next(
            unit
            for words, unit in (
                ("millicores", "m"),
                ("cores", ""),
                ("Mi", "Mi"),
                ("M", "M"),
            )
            if words in question
        )
    (right,) = [
        choice
        for choice in choices
        if QUANTITY.fullmatch(choice)[2] == unit and value(choice) == total
    ]
    return right


@pytest.fixture(scope="module")
def made() -> list[dict]:
    return list(rows())


def test_counts_and_keys(made):
    assert len(made) == 1400
    assert NUM_HELDOUT == 200
    assert all(set(row) == {"prompt", "completion", "choices"} for row in made)


def test_the_same_seed_gives_the_same_rows(made):
    assert made == list(rows(3407))
    assert made != list(rows(1))


@pytest.mark.parametrize("seed", [3407, 1, 2])
def test_every_answer_is_right_and_is_one_of_four_different_choices(seed):
    for row in rows(seed):
        assert row["completion"] in row["choices"]
        assert len(set(row["choices"])) == 4
        assert right_answer(row) == row["completion"], row


@pytest.mark.parametrize("seed", [3407, 1])
def test_heldout_questions_and_numbers_are_not_in_training(seed):
    made = list(rows(seed))
    train, heldout = made[:-NUM_HELDOUT], made[-NUM_HELDOUT:]
    assert len({row["prompt"] for row in made}) == len(made)

    def numbers(row: dict) -> set[str]:
        found = set(re.findall(r"\d[\d.]*[A-Za-z]*", row["prompt"].rstrip(".?")))
        # How many replicas (2 to 9) is shared; the request that they make is not.
        found = {text for text in found if not ("replicas" in row["prompt"] and len(text) == 1)}
        # 0.25 and 250m are one number; a misspelt suffix does not make another one.
        return {
            str(value(text) * 1000 if "." in text and "m" not in text else QUANTITY.match(text)[1])
            for text in found
            if QUANTITY.fullmatch(text.rstrip(".")) and QUANTITY.fullmatch(text)[2] in SUFFIXES
        }

    def group(row: dict) -> str:
        # Two wordings of one kind ask for the same pool.
        words = row["prompt"]
        for mark in (
            "millicores",
            "cores",
            "larg",
            "Most",
            "alid",
            "replicas",
            "containers",
            "pod",
            "mean",
            "What is",
            "Mi",
        ):
            if mark in words:
                return {"containers": "pod", "What is": "mean", "Most": "larg"}.get(mark, mark) + (
                    str("CPU" in words)
                )
        return "M"

    trained: dict[str, set[str]] = {}
    for row in train:
        trained.setdefault(group(row), set()).update(numbers(row))
    for row in heldout:
        assert not numbers(row) & trained[group(row)], row


def test_the_answer_stands_in_every_place(made):
    places = [row["choices"].index(row["completion"]) for row in made]
    assert all(280 < places.count(place) < 420 for place in range(4))


def test_kinds_are_shared_out_evenly(made):
    heldout = {kind(row) for row in made[-NUM_HELDOUT:]}
    assert heldout == {kind(row) for row in made[:-NUM_HELDOUT]}
    # Ten kinds, two wordings each; the wordings for Gi in Mi and G in M read the same blanked.
    assert len(heldout) == 18
