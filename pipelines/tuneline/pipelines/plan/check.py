"""One thing that `plan` looked at, and what it found."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warn", "fail", "unknown"]
"""`fail`: the run cannot work as it stands; `warn`: it may not; `unknown`: it could not be seen."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    words: str
    advice: str = ""
