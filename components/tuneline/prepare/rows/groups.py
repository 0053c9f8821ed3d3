"""Group rows that are equal or nearly the same, so that a split never puts one group in two parts.

Rows are linked if an example of both has the same tokens after truncation, if their normalised
texts are equal, if they answer the same prompt, if one conversation is the beginning of the other,
or if their texts are nearly the same (near.py).
Links hold through other rows: a group is every row that is linked with one of its rows.
"""

from array import array
from pathlib import Path

import numpy
from numpy.typing import NDArray

from tuneline.prepare.rows.near import link_near
from tuneline.prepare.rows.shingles import most_that_share
from tuneline.prepare.rows.words import Hashes, WordFile

Rows = NDArray[numpy.int64]

EQUAL, PROMPT, BEGINNING, NEAR = "equal", "prompt", "beginning", "near"
"""Why two rows are of one group: equal text or tokens, the same prompt, one conversation is the
beginning of the other, nearly the same text."""


class Groups:
    """The group of each row.

    Args:
        examples: hash of the tokens of each example, after truncation.
        owners: the row of each example, in ascending order.
        texts: hash of the words of each row's text.
        prompts: hash of the words of each row's prompt; 0 for none.
    """

    def __init__(self, examples: Hashes, owners: Rows, texts: Hashes, prompts: Hashes):
        self._examples, self._owners = examples, owners
        self._texts, self._prompts = texts, prompts
        self._beginnings, self._begun = numpy.empty(0, numpy.uint64), numpy.empty(0, numpy.int64)
        self._parents = array("q", range(len(texts)))
        self._link_equal(examples, owners)
        self._link_equal(texts, numpy.arange(len(texts)))

    def link_prompts(self, *, always: bool) -> None:
        """Link the rows that answer the same prompt.

        Args:
            always: whether to link them even if so many rows have the prompt that it is rather an
                instruction, and their answers are what tells them apart.
        """
        rows = numpy.flatnonzero(self._prompts)
        most = len(rows) if always else most_that_share(len(self._prompts))
        self._link_equal(self._prompts[rows], rows, most=most)

    def link_beginnings(self, beginnings: Hashes, owners: Rows) -> None:
        """Link each row with the conversations that begin with the row's whole text.

        A text with which very many conversations begin, such as a greeting, links no rows.

        Args:
            beginnings: hash of the words of conversations up to each answer but the last.
            owners: the row of each beginning, in ascending order.
        """
        order = numpy.argsort(self._texts, kind="stable")
        places = numpy.searchsorted(self._texts, beginnings, sorter=order)
        rows = order[numpy.minimum(places, len(order) - 1)]
        found = self._texts[rows] == beginnings
        self._beginnings, self._begun, rows = beginnings[found], owners[found], rows[found]
        counts = numpy.bincount(rows, minlength=len(order))[rows]
        few = counts <= most_that_share(len(order))
        for first, second in zip(rows[few].tolist(), self._begun[few].tolist(), strict=True):
            self._link(first, second)

    def link_near(self, words: WordFile, work: Path) -> None:
        """Link the rows whose texts are nearly the same; `work` is for temporary files."""
        first_of_text = numpy.zeros(len(self._texts), bool)
        first_of_text[numpy.unique(self._texts, return_index=True)[1]] = True
        link_near(
            words,
            first_of_text,
            work,
            groups=self.numbers,
            link=self._link,
        )

    def numbers(self) -> Rows:
        """Return the number of each row's group: the index of the group's first row."""
        parents = numpy.frombuffer(self._parents, numpy.int64).copy()
        while (parents[parents] != parents).any():
            parents = parents[parents]
        return parents

    def reason(self, row: int, other: int) -> str:
        """Return why two rows of a group are in it: EQUAL, PROMPT, BEGINNING or NEAR."""
        if self._texts[row] == self._texts[other]:
            return EQUAL
        ours, theirs = (_of(number, self._examples, self._owners) for number in (row, other))
        if not set(ours).isdisjoint(theirs):
            return EQUAL
        if self._prompts[row] and self._prompts[row] == self._prompts[other]:
            return PROMPT
        for longer, shorter in ((row, other), (other, row)):
            if self._texts[shorter] in _of(longer, self._beginnings, self._begun):
                return BEGINNING
        return NEAR

    def _link_equal(self, keys: Hashes, rows: Rows, *, most: int | None = None) -> None:
        order = numpy.argsort(keys, kind="stable")
        equal = numpy.diff(keys[order]) == 0
        if most is not None:
            _, group, sizes = numpy.unique(keys, return_inverse=True, return_counts=True)
            equal &= sizes[group[order[1:]]] <= most
        for place in numpy.flatnonzero(equal).tolist():
            self._link(int(rows[order[place]]), int(rows[order[place + 1]]))

    def _link(self, first: int, second: int) -> None:
        first, second = self._root(first), self._root(second)
        self._parents[max(first, second)] = min(first, second)

    def _root(self, row: int) -> int:
        while self._parents[row] != row:
            self._parents[row] = row = self._parents[self._parents[row]]
        return row


def _of(row: int, values: Hashes, owners: Rows) -> list[int]:
    """Return the values of a row; `owners` has the row of each value, in ascending order."""
    first, stop = numpy.searchsorted(owners, [row, row + 1])
    found: list[int] = values[first:stop].tolist()
    return found
