"""The demo's dataset: questions about Kubernetes resource quantities, generated from a seed.

There are ten kinds of questions, equally many of each. Each question has four choices: the answer
and three common mistakes (a wrong power of ten, 1000 instead of 1024, a wrong suffix, a wrong
digit). The skill is narrow enough for a model with 135M parameters, and useful in practice, e.g. to
write `0.25` as `250m`, or to tell `Mi` from `M`.

Held-out questions cannot be answered from memory: for each kind of question, the quantities are
first divided into a training and a held-out pool, so no held-out quantity occurs in a training
question of the same kind. Only the number of replicas (2 to 9) is drawn from the same range in
training and held-out questions.

Kubernetes writes a quantity as a number and a suffix: m (1/1000), k, M, G (powers of 1000), Ki,
Mi, Gi (powers of 1024). There is no K, MB, MiB or mi.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

_NUM_TRAIN = 1200
NUM_HELDOUT = 200
"""Number of rows at the end of the dataset that are meant to be held out."""

_UNIT_BYTES = {"k": 10**3, "Ki": 2**10, "M": 10**6, "Mi": 2**20, "G": 10**9, "Gi": 2**30}
_UNIT_NAMES = {
    "k": "1000 bytes",
    "M": "1000^2 bytes",
    "G": "1000^3 bytes",
    "Ki": "1024 bytes",
    "Mi": "1024^2 bytes",
    "Gi": "1024^3 bytes",
}
# Correct suffix -> misspellings of the suffix that the Kubernetes API server refuses.
_MISSPELT = {
    "Ki": ("KB", "KiB", "ki", "K"),
    "Mi": ("MB", "MiB", "mi", "mb"),
    "Gi": ("GB", "GiB", "gi", "gb"),
    "m": ("mc", "mCPU", "mcpu", "mcore"),
}

# A question, its answer, and three wrong answers.
_Item = tuple[str, str, list[str]]
_Maker = Callable[[random.Random, list[int]], _Item]


def rows(seed: int = 3407) -> Iterator[dict[str, Any]]:
    """Yield the rows: 1,200 for training, then `NUM_HELDOUT` for the benchmark.

    Args:
        seed: determines the numbers, the order of the rows and the order of the choices.

    Yields:
        {"prompt": question, "completion": answer, "choices": four texts, one of them the answer}.
        No question occurs twice.
    """
    rng = random.Random(seed)
    kinds = [(maker, _deal(rng, pool)) for maker, pool in _KINDS.items()]
    seen: set[str] = set()
    for part, num_rows in enumerate((_NUM_TRAIN, NUM_HELDOUT)):
        batch = []
        for maker, pools in kinds:
            num_made = 0
            while num_made < num_rows // len(kinds):
                question, answer, wrong = maker(rng, pools[part])
                if question in seen:
                    continue
                seen.add(question)
                choices = [answer, *wrong]
                rng.shuffle(choices)
                batch.append({"prompt": question, "completion": answer, "choices": choices})
                num_made += 1
        rng.shuffle(batch)
        yield from batch


def _deal(rng: random.Random, pool: range) -> tuple[list[int], list[int]]:
    """Divide the numbers of a kind of question into training and held-out pools, 6 to 1."""
    numbers = list(pool)
    rng.shuffle(numbers)
    num_heldout_numbers = len(numbers) // 7
    return numbers[num_heldout_numbers:], numbers[:num_heldout_numbers]


def _to_millicores(rng: random.Random, pool: list[int]) -> _Item:
    milli = rng.choice(pool)
    question = rng.choice(["Write {} CPU in millicores.", "How many millicores is {} CPU?"])
    wrong = [f"{milli // 10}m", f"{milli * 10}m", f"{_thousandth(milli)}m"]
    return question.format(_thousandth(milli)), f"{milli}m", wrong


def _to_cores(rng: random.Random, pool: list[int]) -> _Item:
    milli = rng.choice(pool)
    question = rng.choice(["Write {}m CPU in cores.", "How many cores is {}m CPU?"])
    wrong = [_thousandth(milli * 10), _thousandth(milli * 100), f"{milli / 10000:.5f}".rstrip("0")]
    return question.format(milli), _thousandth(milli), wrong


def _to_mebibytes(rng: random.Random, pool: list[int]) -> _Item:
    quarters = rng.choice(pool)
    question = rng.choice(["Write {}Gi in Mi.", "How many Mi is {}Gi?"])
    right = quarters * 256
    wrong = [f"{quarters * 250}Mi", f"{right * 10}Mi", f"{right}Ki"]
    return question.format(f"{quarters / 4:g}"), f"{right}Mi", wrong


def _to_megabytes(rng: random.Random, pool: list[int]) -> _Item:
    mega = rng.choice(pool)
    question = rng.choice(["Write {}G in M.", "How many M is {}G?"])
    wrong = [f"{mega * 1024 // 1000}M", f"{mega * 10}M", f"{mega}Mi"]
    return question.format(_thousandth(mega)), f"{mega}M", wrong


def _largest_cpu(rng: random.Random, pool: list[int]) -> _Item:
    while True:
        millis = sorted(rng.sample(pool, 4), reverse=True)
        if millis[0] >= 1.2 * millis[1]:
            break
    texts = [rng.choice([f"{milli}m", _thousandth(milli)]) for milli in millis]
    return _ask(rng, ["Which CPU is largest: {}?", "Most CPU: {}?"], texts)


def _largest_memory(rng: random.Random, pool: list[int]) -> _Item:
    while True:
        units = [rng.choice(["Ki", "M", "Mi", "G", "Gi"]) for _ in range(4)]
        sized = [
            (number * _UNIT_BYTES[unit], f"{number}{unit}")
            for number, unit in zip(rng.sample(pool, 4), units, strict=True)
        ]
        sized.sort(reverse=True)
        if sized[0][0] >= 1.2 * sized[1][0]:
            break
    return _ask(
        rng, ["Which memory is largest: {}?", "Most memory: {}?"], [text for _, text in sized]
    )


def _replicas(rng: random.Random, pool: list[int]) -> _Item:
    millis, replicas = rng.choice(pool), rng.randint(2, 9)
    question = rng.choice(
        ["{} replicas request {}m each. Total?", "What do {} replicas of {}m request in all?"]
    )
    right = millis * replicas
    wrong = [f"{right * 10}m", f"{right}", f"{right + millis}m"]
    return question.format(replicas, millis), f"{right}m", wrong


def _pod_total(rng: random.Random, pool: list[int]) -> _Item:
    first, second = rng.sample(pool, 2)
    question = rng.choice(
        ["Two containers request {}m and {}m. Total?", "A pod requests {}m plus {}m. Total?"]
    )
    right = first + second
    # Common mistakes: 100 too many (a carry added) or 100 too few (a carry forgotten).
    wrong = [f"{right * 10}m", f"{right + 100}m", f"{right - 100 if right > 100 else right + 200}m"]
    return question.format(first, second), f"{right}m", wrong


def _valid(rng: random.Random, pool: list[int]) -> _Item:
    number, suffix = rng.choice(pool), rng.choice(sorted(_MISSPELT))
    suffixes = [suffix, *rng.sample(_MISSPELT[suffix], 3)]
    return _ask(
        rng,
        ["Which quantity is valid: {}?", "Valid quantity: {}?"],
        [f"{number}{suffix}" for suffix in suffixes],
    )


def _suffix(rng: random.Random, pool: list[int]) -> _Item:
    number, suffix = rng.choice(pool), rng.choice(sorted(_UNIT_NAMES))
    question = rng.choice(["What is {1} in {0}{1}?", "In {0}{1}, what does {1} mean?"])
    base = 4 if suffix.endswith("i") else 0
    twin = suffix[0].upper() + "i" if base == 0 else {"K": "k"}.get(suffix[0], suffix[0])
    relatives = [twin, *(other for other in _UNIT_NAMES if other.endswith("i") == bool(base))]
    wrong = [_UNIT_NAMES[other] for other in relatives if other != suffix]
    return question.format(number, suffix), _UNIT_NAMES[suffix], wrong


def _ask(rng: random.Random, questions: list[str], texts: list[str]) -> _Item:
    """Ask which of four texts is correct, in random order; the first of `texts` is correct."""
    listed = list(texts)
    rng.shuffle(listed)
    return rng.choice(questions).format(", ".join(listed)), texts[0], texts[1:]


def _thousandth(number: int) -> str:
    """Return number / 1000 without trailing zeros."""
    return f"{number / 1000:.3f}".rstrip("0").rstrip(".")


# Kind of question -> the numbers that such a question asks about. 1 in 7 numbers is held out.
_KINDS: dict[_Maker, range] = {
    _to_millicores: range(10, 8000, 10),
    _to_cores: range(10, 8000, 10),
    _to_mebibytes: range(1, 201),
    _to_megabytes: range(50, 16000, 50),
    _largest_cpu: range(10, 8000, 10),
    _largest_memory: range(2, 1000),
    _replicas: range(10, 1000, 10),
    _pod_total: range(10, 1000, 10),
    _valid: range(2, 300),
    _suffix: range(2, 300),
}
