"""Find questions of benchmarks in the training rows, by their n-grams of words.

A question of 13 or more words counts as found if at least half of its 13-grams are in training
rows. 13 words is the length that GPT-3's report (arXiv:2005.14165, appendix C) and lm-eval's own
decontamination use. One shared 13-gram is not enough, because questions quote texts; n-grams that
many questions of the benchmark share are left out, because they are its instructions. A question of
8 to 12 words is searched for as a whole, and a shorter one, with its answer. A short question also
counts as found if it is the last question of a training row.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from tuneline.artifacts import Contamination
from tuneline.prepare.parallel import in_order, ranges
from tuneline.prepare.rows.words import Hashes, WordFile, hash_of, ngrams, word_hashes, words_of

NUM_WORDS = 13
"""Number of words of an n-gram."""
_MIN_WORDS = 8
"""Smallest number of words that are searched for; fewer occur by chance."""
_MIN_SHARE = 0.5
"""Fraction of a question's n-grams of which at least so many must be in training rows."""
_MOST_QUESTIONS = 10
"""Largest number of questions of one benchmark that may share an n-gram which counts."""
_NUM_BITS = 22
"""Size of the filter in front of the search: the first bits of a hash."""
_BATCH = 512
_NUM_EXAMPLES = 3
_EXAMPLE_LENGTH = 200


@dataclass(frozen=True)
class Question:
    """A question of a benchmark."""

    benchmark: str
    text: str
    answer: str = ""


def find(
    questions: Sequence[Question],
    words: WordFile,
    is_trained: NDArray[numpy.bool_],
    last_questions: Hashes,
) -> dict[str, Contamination]:
    """Return for each benchmark how many of its questions are in training rows.

    Args:
        questions: the questions of all benchmarks.
        words: the words of all rows.
        is_trained: whether a row is a training row.
        last_questions: hash of the words of each row's last question; 0 for none.
    """
    needles: dict[int, list[Hashes]] = defaultdict(list)
    owners: dict[int, list[int]] = defaultdict(list)
    whole = numpy.zeros(len(questions), numpy.uint64)
    for number, question in enumerate(questions):
        wanted = words_of(question.text)
        if wanted and len(wanted) < NUM_WORDS:
            whole[number] = hash_of(wanted)
        if len(wanted) < _MIN_WORDS:
            wanted = [*wanted, *words_of(question.answer)][:NUM_WORDS]
        if len(wanted) >= _MIN_WORDS:
            length = min(NUM_WORDS, len(wanted))
            searched = numpy.unique(ngrams(numpy.array(word_hashes(wanted)), length))
            needles[length].append(searched)
            owners[length] += [number] * len(searched)
    num_needles = numpy.zeros(len(questions), numpy.int64)
    num_found = numpy.zeros(len(questions), numpy.int64)
    hashes = {length: numpy.concatenate(parts) for length, parts in needles.items()}
    owned_by = {length: numpy.array(numbers) for length, numbers in owners.items()}
    if NUM_WORDS in hashes:
        kept = ~_is_common(hashes[NUM_WORDS], owned_by[NUM_WORDS], questions)
        hashes[NUM_WORDS], owned_by[NUM_WORDS] = hashes[NUM_WORDS][kept], owned_by[NUM_WORDS][kept]
    found = _search(hashes, words, is_trained)
    for length, values in hashes.items():
        numpy.add.at(num_needles, owned_by[length], 1)
        numpy.add.at(num_found, owned_by[length][numpy.isin(values, found[length])], 1)
    is_checked = (num_needles > 0) | (whole != 0)
    is_found = (num_needles > 0) & (num_found >= _MIN_SHARE * num_needles)
    is_found |= (whole != 0) & numpy.isin(whole, last_questions[is_trained])
    return _counts(questions, is_checked, is_found)


def _is_common(
    hashes: Hashes, owners: NDArray[numpy.int64], questions: Sequence[Question]
) -> NDArray[numpy.bool_]:
    """Return whether so many questions of a benchmark share an n-gram that it says nothing."""
    names = [question.benchmark for question in questions]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    benchmarks = numpy.array([numbers[name] for name in names])
    most = numpy.clip(numpy.bincount(benchmarks) // 10, 1, _MOST_QUESTIONS)
    common = numpy.zeros(len(hashes), bool)
    for number in numbers.values():
        mine = benchmarks[owners] == number
        _, group, counts = numpy.unique(hashes[mine], return_inverse=True, return_counts=True)
        common[mine] = counts[group] > most[number]
    return common


def _search(
    hashes: dict[int, Hashes], words: WordFile, is_trained: NDArray[numpy.bool_]
) -> dict[int, Hashes]:
    """Return the n-grams, by their number of words, that training rows contain."""
    shift = numpy.uint64(64 - _NUM_BITS)
    filters = {}
    for length, values in hashes.items():
        filters[length] = numpy.zeros(2**_NUM_BITS, bool)
        filters[length][values >> shift] = True

    def search(rows: range) -> dict[int, Hashes]:
        batch = words.read(rows.start, rows.stop).only(is_trained[rows.start : rows.stop])
        found = {}
        for length, values in hashes.items():
            present = batch.ngrams(length)[0]
            present = present[filters[length][present >> shift]]
            found[length] = numpy.intersect1d(present, values)
        return found

    seen: dict[int, set[int]] = {length: set() for length in hashes}
    for _, found in in_order(search, ranges(len(words), _BATCH)) if hashes else ():
        for length, values in found.items():
            seen[length].update(values.tolist())
    return {length: numpy.array(sorted(values), numpy.uint64) for length, values in seen.items()}


def _counts(
    questions: Sequence[Question],
    is_checked: NDArray[numpy.bool_],
    is_found: NDArray[numpy.bool_],
) -> dict[str, Contamination]:
    names = numpy.array([question.benchmark for question in questions])
    counts = {}
    for name in dict.fromkeys(names.tolist()):
        found = numpy.flatnonzero((names == name) & is_found)
        counts[name] = Contamination(
            num_questions=int((names == name).sum()),
            num_checked=int((is_checked & (names == name)).sum()),
            num_found=len(found),
            examples=[questions[row].text[:_EXAMPLE_LENGTH] for row in found[:_NUM_EXAMPLES]],
        )
    return counts
