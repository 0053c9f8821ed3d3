"""Find the samples of a task that depend on each other.

Questions about one passage, and one question asked twice, are not independent: a model that knows
the passage gets all of its questions right. The gate resamples such clusters as wholes.
"""

import hashlib
import html
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

CLUSTER = "cluster"
"""Key of a document that names its cluster, for tasks that know better, such as paraphrases."""
PASSAGES = ("passage", "paragraph", "article", "context", "story", "document", "background")
QUESTIONS = ("question", "prompt", "query", "problem", "goal", "input", "ctx", "sentence", "text")
"""Keys under which lm-eval's tasks have the passage and the question of a document."""

WINDOW = 24
"""Words in succession that two held-out prompts have in common if they are about one passage."""
MAX_SHARE, MAX_SHARING = 0.05, 10
"""Words that more prompts have in common are an instruction or a system prompt: more than this
fraction of all prompts, and more than this number."""
_KEPT_WINDOWS = 4
"""One window of so many is looked at, chosen by its hash; a passage has many windows."""

# Control characters, marks of direction, variation selectors and others that show nothing.
_INVISIBLE = (
    r"\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f"
    r"\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb"
    r"\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
_ALIKE = {
    "'": "\u2018\u2019\u201b\u2032\u2035\u00b4\u02b9\u02bb\u02bc\u02bd\u055a\u05f3\ua78c",
    '"': "\u2033\u2036",
    "-": "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58",
    ",": "\u066c",
    ".": "\u066b",
    " ": "\u2800",
}
"""Characters that stand for the key; NFKC does not know that they are alike."""
_STAND_INS = {letter: key for key, letters in _ALIKE.items() for letter in letters}
_STRANGE = re.compile(f"[{_INVISIBLE}{''.join(_STAND_INS)}]")
_CONTROL = {number: None for number in range(128) if _STRANGE.match(chr(number))}
_APOSTROPHE = re.compile(r"(?<=\w)`(?=\w)")
_TEX_QUOTE = re.compile(r"(?<!`)``(?!`)")
# The set comes before the condition on what is in front of it, because it is searched for fast.
_SPACE_IN_NUMBER = re.compile(r"[\u00a0\u2009\u202f](?<=\d.)(?=\d{3}(?!\d))")
_PLAIN_SPACE_IN_NUMBER = re.compile(r" (?<=\d )(?=\d{3}(?!\d))")
# Three numbers of three digits, or more, are a list.
_GROUPS = re.compile(r"(?<!\d)(?<!\d )(?:\d{1,2}(?: \d{3})+|\d{3} \d{3})(?! ?\d)")
_MAX_ESCAPES = 4
"""Number of times that a text may have been escaped for HTML one after another."""
_MEANINGFUL = frozenset("-%&*/@#\\")
"""Signs that change the meaning of numbers and code, although Unicode calls them punctuation."""
_FOREIGN_DIGIT = re.compile(r"[^\D0-9]")


def clusters_of(documents: list[dict[str, Any]]) -> list[str | None]:
    """Return the name of each document's cluster, or None for a document that is alone in its own.

    Documents that share a passage or a question share a cluster, in both cases after
    normalisation. Held-out rows have the passage within the prompt, so prompts that have many words
    in succession in common share a cluster too. The value of `cluster`, if there is one, takes
    precedence over all of this.
    """
    names = list(_names(documents))
    parents = list(range(len(documents)))

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = number = parents[parents[number]]
        return number

    def link(numbers: Sequence[int]) -> None:
        for number in numbers[1:]:
            first, second = sorted((root(numbers[0]), root(number)))
            parents[second] = first

    same: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        if name:
            same.setdefault(name, []).append(number)
    for numbers in (*same.values(), *_about_one_passage(documents)):
        link(numbers)
    roots = [root(number) for number in range(len(documents))]
    times = Counter(roots)
    return [names[first] if times[first] > 1 else None for first in roots]


def _names(documents: Iterable[dict[str, Any]]) -> Iterator[str | None]:
    for document in documents:
        if key := _given(document):
            yield f"key {key}"
            continue
        texts = (document.get(key) for key in (*PASSAGES, *QUESTIONS))
        text = next((text for text in texts if isinstance(text, str) and text.strip()), None)
        yield None if text is None else hashlib.sha256(normalised(text).encode()).hexdigest()[:12]


def _given(document: dict[str, Any]) -> str:
    key = document.get(CLUSTER)
    return str(key) if isinstance(key, str | int) else ""


def _about_one_passage(documents: Sequence[dict[str, Any]]) -> Iterator[list[int]]:
    """Yield the numbers of held-out rows whose prompts have many words in succession in common."""
    found: dict[int, list[int]] = {}
    num_prompts = 0
    for number, document in enumerate(documents):
        if "endings" not in document or _given(document):
            continue
        num_prompts += 1
        words = normalised(document["prompt"]).split()
        windows = {
            zlib.crc32(" ".join(words[start : start + WINDOW]).encode())
            for start in range(len(words) - WINDOW + 1)
        }
        for window in windows:
            if window % _KEPT_WINDOWS == 0:
                found.setdefault(window, []).append(number)
    most = max(MAX_SHARING, int(num_prompts * MAX_SHARE))
    yield from (numbers for numbers in found.values() if 1 < len(numbers) <= most)


def normalised(text: str) -> str:
    """Return a text without the differences of case, punctuation, spaces and digit grouping.

    Signs of arithmetic and comparison stay, and so does the point within a number.
    """
    text = unified(text).casefold()
    text = re.sub(r"(?<=\d)[,'](?=\d{3}(?!\d))", "", text)
    words = re.findall(r"\d+(?:\.\d+)?|[^\W\d]+|[^\w\s]", text)
    return " ".join(word for word in words if not _is_punctuation(word)) or text


def unified(text: str) -> str:
    """Return a text in which characters that look alike are the same, and none is invisible.

    Of the forms of apostrophes, quotes of TeX, dashes, minus signs and digits one is left. A space
    between groups of digits becomes a comma. Characters that are escaped for HTML, such as &amp;
    and &#39;, become what they stand for.
    """
    if "&" in text:
        text = _unescaped(text)
    if "`" in text:
        text = _TEX_QUOTE.sub('"', _APOSTROPHE.sub("'", text))
    if text.isascii():
        return _grouped(text.translate(_CONTROL))
    text = _SPACE_IN_NUMBER.sub(",", text)
    text = _STRANGE.sub(lambda found: _STAND_INS.get(found[0], ""), text)
    text = unicodedata.normalize("NFKC", text)
    return _grouped(_FOREIGN_DIGIT.sub(lambda found: str(unicodedata.digit(found[0])), text))


def _unescaped(text: str) -> str:
    """Return a text without HTML's escapes, also if they were escaped again (&amp;amp;)."""
    for _ in range(_MAX_ESCAPES):
        before, text = text, html.unescape(text)
        if text == before:
            break
    return text


def _grouped(text: str) -> str:
    """Return a text with commas in place of plain spaces between the groups of digits."""
    # Few texts have such a space, and `_GROUPS` alone takes five times as long to find that out.
    if _PLAIN_SPACE_IN_NUMBER.search(text):
        text = _GROUPS.sub(lambda found: found[0].replace(" ", ","), text)
    return text


def _is_punctuation(word: str) -> bool:
    """Return whether a word is a sign that changes no meaning, i.e. no sign of arithmetic."""
    return word not in _MEANINGFUL and unicodedata.category(word[0]).startswith("P")
