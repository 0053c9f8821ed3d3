"""The formats by name: what each is for, and how far from the merged model it may be.

The bounds are there to catch a broken file, which is nats away, not to rank formats. They are
two to ten times what SmolLM2-135M measured (beside each, over 8 rows), and small models suffer
most from few bits; a recipe can tighten or loosen each.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Bound:
    """What an export has to prove on held-out prompts."""

    max_mean_kl: float
    """Nats a token, merged model against export."""
    min_top1_agreement: float
    """Share of positions with the same most likely token, 0 to 1."""


_16BIT = Bound(1e-3, 0.98)
_8BIT = Bound(0.05, 0.93)
_6BIT = Bound(0.1, 0.9)
_5BIT = Bound(0.5, 0.7)
_4BIT = Bound(1.5, 0.5)
_3BIT = Bound(2.0, 0.4)
_2BIT = Bound(3.0, 0.3)
_IQ = Bound(6.0, 0.1)

GGUF: dict[str, Bound] = {
    "f16": _16BIT,  # 3.4e-6 nats, 100 %
    "bf16": Bound(0.01, 0.95),  # 1.4e-4, 99.6 %: made from f16
    "q8_0": _8BIT,  # 0.0069, 97.7 %
    "q6_k": _6BIT,  # 0.017, 96.5 %
    "q5_k_m": _5BIT,  # 0.096, 86.4 %
    "q5_k_s": _5BIT,  # 0.15, 84.9 %
    "q5_1": _5BIT,  # 0.12, 87.6 %
    "q5_0": _5BIT,  # 0.090, 89.5 %
    "q4_k_m": _5BIT,  # 0.068, 91.9 %: most of its tensors fell back to 5 bits
    "q4_k_s": _5BIT,  # 0.12, 86.0 %
    "q4_1": _4BIT,  # 0.35, 74.0 %
    "q4_0": _4BIT,  # 0.71, 68.2 %
    "iq4_nl": _4BIT,  # 0.66, 68.2 %
    "iq4_xs": _4BIT,  # 0.65, 71.7 %
    "q3_k_l": _3BIT,  # 0.28, 76.4 %
    "q3_k_m": _3BIT,  # 0.26, 78.3 %
    "q3_k_s": _3BIT,  # 0.77, 65.9 %
    "q2_k": _2BIT,  # 0.77, 65.9 %
    # With an importance matrix of 128 rows; another SmolLM2, of which q4_k_m was 0.067 away and
    # q2_k 0.60. Only its 30 down projections have rows that these types take.
    "iq3_m": _IQ,  # 2.2, 39.8 %
    "iq3_s": _IQ,
    "iq3_xs": _IQ,
    "iq3_xxs": _IQ,
    "q2_k_s": _IQ,
    "iq2_m": _IQ,  # 5.0, 22.2 %
    "iq2_s": _IQ,
    "iq2_xs": _IQ,  # 2.5, 34.7 %
    "iq2_xxs": _IQ,
    "iq1_m": _IQ,  # 0.73, 57.1 %
    "iq1_s": _IQ,
}
"""llama.cpp's types, from many bits to few."""

NEEDS_IMPORTANCE = frozenset(name for name in GGUF if re.match("iq[123]|q2_k_s", name))
"""llama.cpp makes the iq3 types without a matrix, and SmolLM2 was 0.9 to 3.8 nats away."""

WEIGHED = frozenset(GGUF) - {"f16", "bf16", "q8_0"}
"""Types whose rounding an importance matrix changes."""

GPTQ: dict[str, Bound] = {"gptq-8bit": _8BIT, "gptq-4bit": _4BIT, "gptq-3bit": _3BIT}

NOT_MADE: dict[str, str] = {
    **dict.fromkeys(("tq1_0", "tq2_0", "q1_0", "q2_0"), "is for models trained in so few values"),
    **dict.fromkeys(("mxfp4_moe", "nvfp4"), "is for models published in it"),
}
"""Types that llama.cpp names and this step refuses, with the reason."""


def bound_of(
    format: str, max_mean_kl: dict[str, float], min_top1_agreement: dict[str, float]
) -> Bound:
    """Return a format's bound with what the recipe says instead."""
    bound = (GGUF | GPTQ)[format]
    return Bound(
        max_mean_kl.get(format, bound.max_mean_kl),
        min_top1_agreement.get(format, bound.min_top1_agreement),
    )


def check_importance(names: Iterable[str], num_rows: int) -> None:
    """Check that formats which need an importance matrix get one.

    Raises:
        ValueError: one does not.
    """
    lacking = [name for name in names if name in NEEDS_IMPORTANCE and not num_rows]
    if lacking:
        raise ValueError(
            f"the format '{lacking[0]}' needs an importance matrix: set "
            "quantize.num_importance_rows, e.g. to 128; q3_k_m and q2_k do without"
        )


def known_gguf(name: str) -> str:
    """Return the name of a GGUF format.

    Raises:
        ValueError: there is none; the message names the nearest, or why it is not made.
    """
    return _known(name, GGUF)


def known_gptq(name: str) -> str:
    """Return the name of a GPTQ format.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    return _known(name, GPTQ)


def known(name: str) -> str:
    """Return the name of a format of either kind.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    return _known(name, GGUF | GPTQ)


def _known(name: str, formats: dict[str, Bound]) -> str:
    if name in formats:
        return name
    plain = name.lower()
    if plain in NOT_MADE:
        raise ValueError(f"the format '{name}' {NOT_MADE[plain]}")
    near = difflib.get_close_matches(plain.replace("-", "_"), formats, n=1, cutoff=0.5)
    near = near or difflib.get_close_matches(plain, formats, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? known are" if near else "known are"
    raise ValueError(f"the export format '{name}' is not known; {hint} {', '.join(formats)}")
