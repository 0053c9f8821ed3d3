"""Find the samples of a task that depend on each other.

Questions about one passage, and one question asked twice, are not independent: a model that knows
the passage gets all of its questions right. The gate resamples such clusters as wholes.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

CLUSTER = "cluster"
"""Key of a document that names its cluster, for tasks that know better, such as paraphrases."""
PASSAGES = ("passage", "paragraph", "article", "context", "story", "document", "background")
QUESTIONS = ("question", "prompt", "query", "problem", "goal", "input", "ctx", "sentence", "text")
"""Keys under which lm-eval's tasks have the passage and the question of a document."""


def clusters_of(documents: list[dict[str, Any]]) -> list[str | None]:
    """Return the name of each document's cluster, or None for a document that is alone in its own.

    Documents that share a passage or a question share a cluster, in both cases after
    normalisation. The value of `cluster`, if there is one, takes precedence over both.
    """
    names = list(_names(documents))
    times = Counter(names)
    return [name if name and times[name] > 1 else None for name in names]


def _names(documents: Iterable[dict[str, Any]]) -> Iterator[str | None]:
    for document in documents:
        key = document.get(CLUSTER)
        if isinstance(key, str | int) and str(key):
            yield f"key {key}"
            continue
        texts = (document.get(key) for key in (*PASSAGES, *QUESTIONS))
        text = next((text for text in texts if isinstance(text, str) and text.strip()), None)
        yield None if text is None else hashlib.sha256(normalised(text).encode()).hexdigest()[:12]


def normalised(text: str) -> str:
    """Return a text without the differences of case, punctuation, spaces and digit grouping.

    Signs of arithmetic and comparison stay, and so does the point within a number.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    return " ".join(re.findall(r"\d+(?:\.\d+)?|[^\W\d]+|[^\w\s.,;:!?'\"()\[\]{}]", text)) or text
