"""The script that a text is mostly written in, which tells most languages of data apart."""

import re
from collections import Counter

_SCRIPTS = {
    "Latin": r"A-Za-z\u00c0-\u024f",
    "Hangul (Korean)": r"\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3",
    "Kana (Japanese)": r"\u3040-\u30ff",
    "Han (Chinese)": r"\u3400-\u4dbf\u4e00-\u9fff",
    "Cyrillic": r"\u0400-\u04ff",
    "Greek": r"\u0370-\u03ff",
    "Arabic": r"\u0600-\u06ff",
    "Hebrew": r"\u0590-\u05ff",
    "Devanagari": r"\u0900-\u097f",
    "Thai": r"\u0e00-\u0e7f",
}
_PATTERNS = {name: re.compile(f"[{characters}]") for name, characters in _SCRIPTS.items()}
LATIN, KANA, HAN = "Latin", "Kana (Japanese)", "Han (Chinese)"
OTHER = "other characters"
"""What stands for a text without letters of these scripts."""
_MIN_KANA_SHARE = 0.1
"""Fraction of Kana in Han and Kana from which a text is Japanese."""

WORDY = _PATTERNS[LATIN], _PATTERNS["Cyrillic"], _PATTERNS["Greek"]
"""Patterns of the scripts whose words are a token or two; other scripts take one per character."""


def script_of(text: str) -> str:
    """Return the script of most letters of a text."""
    if text.isascii():
        return LATIN if _PATTERNS[LATIN].search(text) else OTHER
    counts = Counter({name: len(found.findall(text)) for name, found in _PATTERNS.items()})
    if counts[KANA] > _MIN_KANA_SHARE * (counts[HAN] + counts[KANA]):
        counts[KANA] += counts.pop(HAN)
    # A Hangul syllable or a Han character says as much as two or three letters.
    counts[LATIN] //= 3
    name, count = counts.most_common(1)[0]
    return name if count else OTHER
